"""The `explain` command: output formats, summary and errors."""

import json

import pytest
import torch
from PIL import Image

from deformable_detr.explanation import trace
from tests.support.commands import is_one_line_error, run_command
from tests.support.explanations import random_image, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    random_model(two_stage=True, refine=True).save_pretrained(folder / "model")
    Image.fromarray(random_image(67, 101).permute(1, 2, 0).numpy()).save(folder / "image.png")
    (folder / "file").touch()
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    return lambda text: run_command(capsys, "explain", *text.split(), "--device", "cpu")


def test_default_is_the_best_detection(run, folder):
    code, out, err = run("model image.png --threshold 0 --json raw.json")
    assert (code, err) == (0, "")
    assert Image.open(folder / "image-explained.png").format == "PNG"
    raw = json.loads((folder / "raw.json").read_text())
    explanation = trace(random_model(two_stage=True, refine=True), folder / "image.png", 0.0).detection(0)
    torch.testing.assert_close(torch.tensor(raw["layers"][-1]["locations"]), explanation.layers[-1].locations)
    first, last = explanation.attention_inside_box().tolist()
    assert raw["layers"][0]["share_inside_box"] == pytest.approx(first)
    assert f"inside the detected box: first decoder layer {first:.1%}, last {last:.1%}" in out
    assert "detection 1 of 18" in out


@pytest.mark.parametrize(
    ("arguments", "file", "start"),
    [
        ("--detection 3 --layer 2 --out new/one.png", "new/one.png", b"\x89PNG"),
        ("--detection 2 --out moving.gif", "moving.gif", b"GIF8"),
        ("--point 100.5,3 --out point.jpg", "point.jpg", b"\xff\xd8"),
        ("--point 0,67 --layer 1 --out point.html", "point.html", b"<!doctype html>"),
        ("--out page.html", "page.html", b"<!doctype html>"),
    ],
)
def test_suffix_selects_the_format(run, folder, arguments, file, start):
    code, out, err = run(f"model image.png --threshold 0 {arguments}")
    assert (code, err) == (0, "")
    assert (folder / file).read_bytes().startswith(start)
    assert file in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model image.png", ["image.png", "no detection 1: 0 have a score of 0.5 or more"]),
        ("model image.png --threshold 0 --detection 19", ["no detection 19", "18"]),
        ("model image.png --threshold 0 --detection 0", ["--detection", "Must be >= 1"]),
        ("model image.png --threshold 0 --layer 3", ["no layer 3", "decoder has 2"]),
        ("model image.png --threshold 0 --layer 0", ["--layer", "Must be >= 1"]),
        ("model image.png --point 102,3", ["102,3", "outside", "101 × 67"]),
        ("model image.png --point=-1,3", ["-1,3", "outside"]),
        ("model image.png --point 5", ["--point 5", "X,Y"]),
        ("model image.png --point nan,1", ["nan,1", "outside"]),
        ("model image.png --point 1,1 --layer 3", ["no layer 3", "encoder has 2"]),
        ("model image.png --point 1,1 --detection 1", ["--detection and --point"]),
        ("model image.png --threshold 0 --out file/a.png", ["--out file/a.png"]),
        ("model image.png --threshold 0 --out model", ["--out", "model"]),
        ("model image.png --threshold 0 --out a.xyz", ["a.xyz", ".png"]),
        ("model image.png --threshold 0 --out image.png", ["--out image.png", "overwrite"]),
        ("model image.png --threshold 0 --json file/a.json", ["--json file/a.json"]),
        ("model image.png --threshold 2", ["--threshold", "Must be <= 1"]),
        ("model nothing.png --threshold 0", ["nothing.png", "no such"]),
        ("nowhere image.png", ["nowhere"]),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, folder, arguments, words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, out, err = run(arguments)
    assert code == 2
    assert is_one_line_error(err)
    assert out == ""
    for word in words:
        assert word in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path != folder} == {
        path: time for path, time in before.items() if path != folder
    }
