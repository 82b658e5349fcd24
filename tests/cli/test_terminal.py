"""Names from files cannot control the terminal."""

import logging

from deformable_detr.cli.app import _configure_logging
from deformable_detr.training.logger import TrainingLogger, TrainState
from deformable_detr.utils.terminal import printable
from tests.support.commands import run_command
from tests.support.datasets import write_coco_dataset, write_image
from tests.support.models import tiny
from tests.support.training import tiny_config

HOSTILE = "cat\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202etac\nAP 1.0"


def assert_harmless(text, named=True):
    assert "cat\\x1b]0;owned\\x07" in text or not named
    assert not [character for character in text if not character.isprintable() and character not in "\n\t"], repr(text)
    assert not any(line.startswith("AP 1.0") for line in text.splitlines())


def test_text_is_kept_except_control_characters():
    text = "été 猫\t1 × 2\nnext"
    assert printable(text) == text
    assert printable("a\x1b[0m\x85\u202e") == "a\\x1b[0m\\x85\\u202e"


def test_class_names_in_commands(tmp_path, capsys):
    names = (HOSTILE, f"{HOSTILE}2", f"{HOSTILE}3")  # the model may detect any of them
    tiny(class_names=names, category_ids=(1, 2, 3)).save_pretrained(tmp_path / "model")
    data = write_coco_dataset(tmp_path / "set", names=names)
    image = write_image(tmp_path / "a.png")
    commands = {
        "predict": (tmp_path / "model", image, "--threshold", "0.0"),
        "evaluate": (tmp_path / "model", data, "--device", "cpu"),
        "explain": (tmp_path / "model", image, "--threshold", "0.0", "--out", tmp_path / "out.png"),
        "check": (data,),
        "split": (data / "train", "--out", tmp_path / "copy", "--val", "0.5"),
    }
    for command, arguments in commands.items():
        _, out, err = run_command(capsys, command, *arguments)
        assert_harmless(out + err, named=command != "split")


def test_file_names_in_errors(tmp_path, capsys):
    code, out, err = run_command(capsys, "check", tmp_path / "cat\x1b]0;owned\x07")
    assert code == 2
    assert_harmless(out + err)


def test_warnings_and_lines_of_training(tmp_path, capsys):
    _configure_logging([])
    assert logging.lastResort is not None
    record = logging.LogRecord("x", logging.WARNING, "", 0, "class %s", (HOSTILE.removesuffix("\nAP 1.0"),), None)
    assert_harmless(logging.lastResort.format(record))
    logger = TrainingLogger(tiny_config().train, tmp_path)
    with logger.open(TrainState()):
        logger.print(HOSTILE.removesuffix("\nAP 1.0"))
    assert_harmless(capsys.readouterr().err)
