"""Cheap imports and the public names of the package."""

import subprocess
import sys

import pytest

import deformable_detr
from deformable_detr.utils.files import replace_file

# Slow to import and needed by some commands only.
HEAVY = ("timm", "torchvision", "scipy", "supervision", "transformers", "hotcoco", "matplotlib", "cyclopts")
HEAVY += ("torch.utils.tensorboard", "tensorboard")


def loaded_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after running the code."""
    show = "import sys; sys.stderr.write('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_public_names_load_no_heavy_package_except_torch():
    loaded = loaded_after("import deformable_detr\nfor name in deformable_detr.__all__: getattr(deformable_detr, name)")
    assert "deformable_detr.model.network" in loaded  # the names were resolved
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_package_import_does_not_load_torch():
    assert "torch" not in loaded_after("import deformable_detr")


def test_heavy_import_is_detected():
    assert "scipy" in loaded_after("import deformable_detr, scipy")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["demo", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments):
    code = (
        f"from deformable_detr.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code"
    )
    loaded = loaded_after(code)
    assert "deformable_detr.cli" in loaded
    assert "torch" not in loaded


def test_public_names_are_listed_and_defined():
    assert set(deformable_detr.__all__) <= set(dir(deformable_detr))
    for name in deformable_detr.__all__:
        assert getattr(deformable_detr, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="DeformableDETRR"):
        deformable_detr.DeformableDETRR  # noqa: B018


def test_version_matches_the_installed_package():
    from importlib.metadata import version

    assert deformable_detr.__version__ == version("deformable-detr")


@pytest.mark.parametrize("name", ["a", "é" * 120, "n" * 255])
def test_files_of_any_name_are_replaced(tmp_path, name):
    path = tmp_path / name
    path.write_text("before")
    replace_file(path, lambda temporary: temporary.write_text("after"))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "after"


def test_random_numbers_and_start_method_are_left_to_the_caller(tmp_path):
    """In a process of its own, which has not used multiprocessing yet."""
    code = f"""
import multiprocessing, torch
from deformable_detr import DeformableDETR, load_detector, presets
before = torch.get_rng_state()
model = DeformableDETR(presets.small(num_classes=3, backbone_weights="none"))
assert not torch.equal(torch.get_rng_state(), before)  # control
before = torch.get_rng_state()
model.save_pretrained({str(tmp_path)!r})
load_detector({str(tmp_path)!r}, "cpu").optimize()
assert torch.equal(torch.get_rng_state(), before)
assert multiprocessing.get_start_method(allow_none=True) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
