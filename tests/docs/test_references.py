"""The generated references: every config field and every option of the command line has a description."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import deformable_detr
from deformable_detr.cli import app
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.config.schema import Config, DataConfig, ModelConfig, ResNetShape, TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    "": Config, "model.": ModelConfig, "model.backbone_shape.": ResNetShape, "data.": DataConfig, "train.": TrainConfig,
}  # fmt: skip


@pytest.fixture(scope="module")
def hooks():
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package, reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_config_field_has_an_entry_with_a_description(hooks):
    entries = dict(
        re.findall(r"^### `([\w.]+)` \{ #\1 \}\n\n(.+)\n\n.+\n\{: \.facts \}$", hooks.config_reference(), re.M)
    )
    keys = {prefix + name for prefix, section in SECTIONS.items() for name in section.model_fields}
    keys |= {f"model.{name}" for name in AdapterConfig.model_fields.keys() - ModelConfig.model_fields.keys()}
    assert entries.keys() == keys - {"model", "data", "train"}
    assert all(text.endswith(".") or "…" in text for text in entries.values())


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("train.lr", "number above 0 · default: `0.0002` · small: `0.001` · option: `--lr`"),
        ("train.epochs", "integer above 0 or `auto` or `null` · default: `50` · small: `auto` · option: `--epochs`"),
        ("train.dice_weight", "number from 0 · default: `2.5`"),
        ("train.lr_schedule", "`step`, `cosine` · default: `step` · small: `cosine`"),
        ("model.box_eps", "2 numbers: number above 0, number above 0 · default: `[1.0e-05, 1.0e-05]`"),
        ("model.category_ids", "list of integer · default: `[]`"),
        ("model.backbone_shape", "[keys](#resnet-of-any-shape) or `null` · default: `null`"),
        ("model.backbone_shape.depths", "list of integer from 1 to 1000 · default: `[3, 4, 6, 3]`"),
        ("model.family", "string"),
        ("data.workers", "integer from 0 · default: `2` · option: `--workers`"),
    ],
)
def test_facts_of_a_field(hooks, key, facts):
    entry = hooks.config_reference().partition(f"### `{key}` ")[2].partition("### ")[0]
    assert f"\n{facts}\n" in entry


def test_every_command_and_option_has_a_description(hooks):
    text = hooks.cli_reference()
    commands = dict(re.findall(r"^## ([\w-]+)\n\n```bash\n.+\n```\n\n(.+)$", text, re.M))
    assert commands.keys() == {name for name in app if not name.startswith("-")}
    for name, part in zip(commands, re.split(r"^## .+$", text, flags=re.M)[1:], strict=True):
        arguments = app[name].assemble_argument_collection()
        for argument in arguments.filter_by(show=True):
            assert re.search(rf"^\* `[^`]*{argument.name}\b[^`]*`: \w", part, re.M), f"{name} {argument.name}"


def test_api_page_lists_public_names_that_exist():
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference/api.md").read_text(encoding="utf-8"), re.M)
    for name in names:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        assert value.__doc__, name
    public = {f"deformable_detr.{name}" for name in deformable_detr.__all__}
    for package in ("evaluation", "export", "ops"):
        module = importlib.import_module(f"deformable_detr.{package}")
        public |= {f"deformable_detr.{package}.{name}" for name in module.__all__}
    assert public - set(names) == {"deformable_detr.evaluation.evaluate", "deformable_detr.ops.Shapes"}
    assert len(set(names)) == len(names)
