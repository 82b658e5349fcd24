"""Every command that may run for seconds says what it does, on a terminal and, later, in a log."""

import re

import pytest

from deformable_detr.utils import progress
from tests.support.commands import run_command
from tests.support.datasets import write_image
from tests.support.models import tiny, write_pseudo_labeled_dataset

COMMANDS = {  # the arguments of each command, and what it shows
    "check": ("DATA", "check, step 1 of 3, read the annotations|check images: .*/6|step 3 of 3"),
    "check --fix": ("DATA --fix OUT", "copy train: .*/3"),
    "split": ("DATA/train --out OUT --val 0.4", "copy train: .*/3"),
    "evaluate": ("MODEL DATA --device cpu --workers 0 --report OUT.html", "evaluate: .*3/3|report, step 1 of 1, write"),
    "predict": ("MODEL DATA/valid --device cpu --out OUT", "predict: .*/3"),
    "convert": ("MODEL --to native --out OUT", "convert, step 1 of 2, read|step 2 of 2, write the files"),
    "explain": (
        "MODEL DATA/valid/1.png --device cpu --threshold 0 --out OUT.html",
        "explain, step 1 of 3, load the model|step 2 of 3, find what it looks at in 1.png|step 3 of 3, write OUT.html",
    ),
    "export": (
        "MODEL --to onnx --out OUT.onnx --data DATA --image-size 64,96",
        "export, step 1 of 6, trace the model|step 2 of 6, convert to ONNX|step 3 of 6, measure AP|evaluate: .*3/3"
        "|step 4 of 6, write OUT.onnx|step 5 of 6, verify OUT.onnx|step 6 of 6, measure AP",
    ),
    "benchmark": ("MODEL --repeats 2 --image-size 64,96", "export, step 1 of 4, trace the model|time: .*/3"),
}
SLOW = {"export", "benchmark"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    model = tiny()
    model.save_pretrained(folder / "MODEL")
    write_pseudo_labeled_dataset(folder / "DATA", model)
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def run(command):
        arguments = COMMANDS[command][0].replace("OUT", str(tmp_path / "OUT"))
        return run_command(capsys, command.split()[0], *arguments.split())

    return run


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in COMMANDS])
def test_commands_show_their_progress_on_a_terminal(run, monkeypatch, command):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, err = run(command)
    assert code == 0, err
    for words in COMMANDS[command][1].split("|"):
        assert re.search(words, err), (words, err)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - SLOW))
def test_logs_have_lines_only(run, monkeypatch, command):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    code, out, err = run(command)
    assert code == 0, err
    assert err
    assert not set(out + err) & set("\r\x1b█")


def test_short_commands_are_silent_in_logs(run):
    """The control of the test above."""
    _, _, err = run("predict")
    assert err == ""


def test_one_image_needs_no_bar(folder, tmp_path, capsys, monkeypatch):
    image = write_image(tmp_path / "a.png")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, err = run_command(capsys, "predict", folder / "MODEL", image, "--device", "cpu")
    assert (code, err) == (0, "")
