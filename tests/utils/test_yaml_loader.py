"""YAML that would take minutes, fill the memory or raise any exception is refused in one line."""

import time

import pytest
import yaml

from deformable_detr.config.resolve import parse_overrides, read_config_file
from deformable_detr.data.dataset import open_dataset
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.yaml_loader import MAX_VALUES, load_yaml
from tests.support.datasets import write_yolo_dataset
from tests.support.special_files import needs_pipes, replace_by_pipe, time_limit


def bomb(levels=9, merge=False):
    """Each value repeats the one before nine times."""
    lines = ["a0: &a0 {k0: 1, k1: 2}"]
    for n in range(1, levels):
        repeated = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} {{<<: [{repeated}]}}" if merge else f"a{n}: &a{n} [{repeated}]")
    return "\n".join(lines) + "\n"


HOSTILE = {
    "aliases": bomb(),
    "merges": bomb(merge=True),
    "many values": "a: [" + "1, " * MAX_VALUES + "1]\n",
    "alias of its own value": "a: &a [*a]\n",
    "deep nesting": "[" * 5000,
    "empty number": "a: !!int ''\n",
    "no timestamp": "a: !!timestamp x\n",
    "unknown tag": "a: !!python/object/apply:os.system [ls]\n",
    "list as a key": "? [a]\n: b\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused_at_once(name, tmp_path):
    text = HOSTILE[name]
    (tmp_path / "config.yaml").write_text(text)
    root = write_yolo_dataset(tmp_path / "set", yaml_text=text)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value)
    for read in (
        lambda: read_config_file(tmp_path / "config.yaml"),
        lambda: parse_overrides([f"train.lr={text}"]),
        lambda: open_dataset(root, "train"),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert len(str(error.value).splitlines()) == 1 or "--set" in str(error.value)
    assert time.process_time() - started < 30


def test_large_files_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("a: " + "x" * 11 * 2**20)
    with pytest.raises(UserError, match="it has 11 MiB"):
        read_config_file(tmp_path / "config.yaml")


@needs_pipes
def test_pipe_as_config_is_refused(tmp_path):
    replace_by_pipe(tmp_path / "config.yaml")
    with time_limit(), pytest.raises(UserError, match=r"config\.yaml: not a regular file"):
        read_config_file(tmp_path / "config.yaml")


def test_ordinary_texts_load_as_before():
    names = {number: f"class {number}" for number in range(20_000)}
    text = yaml.safe_dump({"names": names, "nested": [[1, 2.5, None], {"a": True}]})
    text += "base: &base {lr: 1, seed: 2}\nrun: {<<: *base, seed: 3}\nagain: [*base, *base]\nempty:\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None
    assert load_yaml(bomb(4)) == yaml.safe_load(bomb(4))
    assert load_yaml(bomb(4, merge=True))["a3"] == {"k0": 1, "k1": 2}
