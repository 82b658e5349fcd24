"""The `predict` command: images, videos, drawn files, JSON, and one line per error."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.cli.predict import PredictOptions, find_sources, predict_files
from deformable_detr.predict.frames import Video
from deformable_detr.utils.errors import UserError
from tests.support.training import tiny_config
from tests.support.videos import Finder, read_lines, write_video

pytest.importorskip("av", reason="needs PyAV")


def saved_model(folder):
    from deformable_detr.detector import DeformableDETR

    DeformableDETR(tiny_config().model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("image", ["a.png", "b.jpg"])
def test_each_image_is_decoded_once(tmp_path, monkeypatch, image):
    """Drawing reuses the decoded pixels."""
    source = tmp_path / image
    Image.new("RGB", (64, 48), (200, 0, 0)).save(source)
    opened, open_image = Counter(), Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.update([file.name]) or open_image(file, *rest))
    out, table = tmp_path / "out", tmp_path / "all.json"
    assert predict_files(Finder(), [source], PredictOptions(out, table, 0.3), report=lambda line: None) == 0
    assert opened == {str(source): 1}
    assert len(json.loads(table.read_text())[0]["detections"]) == 1
    assert json.loads(table.read_text())[0]["image"] == str(source)
    monkeypatch.undo()
    drawn = Image.open(out / image)
    assert drawn.size == (320, 240)
    assert len(drawn.convert("RGB").getcolors(1 << 20)) > 2  # has a box and a label


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_truncated_video(tmp_path, kind):
    complete = write_video(
        tmp_path / f"complete.{kind}", frames=60, movflags="faststart" if kind == "mp4" else ""
    ).read_bytes()
    source = tmp_path / f"truncated.{kind}"
    source.write_bytes(complete[: len(complete) * 6 // 10])
    lines, errors = [], []
    out = tmp_path / "out"
    assert predict_files(Finder(), [source], PredictOptions(out), lines.append, errors.append) == 1
    (error,) = errors
    assert str(source) in error
    assert "cut off after" in error
    assert "\n" not in error
    records = read_lines(out / "truncated.jsonl")
    assert 10 < len(records) < 50
    with Video(out / "truncated.mp4") as written:
        assert sum(1 for _ in written) == len(records)
    complete_path = tmp_path / f"complete.{kind}"
    assert predict_files(Finder(), [complete_path], PredictOptions(out), lines.append, errors.append) == 0


def test_images_and_videos_may_be_mixed(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_video(source / "b.mp4", frames=5)
    Image.new("RGB", (64, 48), (200, 0, 0)).save(source / "a.png")
    (source / "notes.txt").write_text("neither")
    assert [path.name for path in find_sources([source])] == ["a.png", "b.mp4"]
    lines = []
    out, table = tmp_path / "out", tmp_path / "all.json"
    assert predict_files(Finder(), find_sources([source]), PredictOptions(out, table), lines.append) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.jsonl", "b.mp4"]
    image, video_record = json.loads(table.read_text())
    assert "detections" in image
    assert video_record == {
        "video": str(source / "b.mp4"), "frames": 5, "annotated": str(out / "b.mp4"), "lines": str(out / "b.jsonl"),
    }  # fmt: skip
    assert len(lines) == 2
    with pytest.raises(UserError, match="would overwrite"):
        predict_files(Finder(), [source / "b.mp4"], PredictOptions(source))


def test_sources_are_not_overwritten(tmp_path):
    """The drawing of a.bmp would overwrite a.png, and so could the JSON file."""
    Image.new("RGB", (64, 48), (200, 0, 0)).save(tmp_path / "a.bmp")
    Image.new("RGB", (64, 48), (0, 200, 0)).save(tmp_path / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, table in ((tmp_path, None), (None, tmp_path / "a.png")):
        with pytest.raises(UserError, match=r"a\.png would overwrite the source .*a\.png"):
            predict_files(Finder(), find_sources([tmp_path]), PredictOptions(out, table))
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert predict_files(Finder(), find_sources([tmp_path]), PredictOptions()) == 0, "nothing is drawn"
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").hardlink_to(tmp_path / "a.png")
    with pytest.raises(UserError, match="would overwrite the source"):
        predict_files(Finder(), [tmp_path / "a.png"], PredictOptions(out))
    (out / "a.png").unlink()
    (out / "a.png").symlink_to("a.png")  # a loop
    assert predict_files(Finder(), [tmp_path / "a.png"], PredictOptions(out)) == 0


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"b\xe9.png")
    Image.new("RGB", (64, 48)).save(tmp_path / name)
    assert predict_files(Finder(), find_sources([tmp_path]), PredictOptions(json=tmp_path / "all.json")) == 0
    assert json.loads((tmp_path / "all.json").read_text())[0]["image"].endswith(name)


@pytest.mark.parametrize("address", ["rtsp://user:secret@camera:554/live", "https://example.org/a.jpg", "udp://@:1234"])
def test_addresses_are_refused(address):
    for read in (lambda: find_sources([Path(address)]), lambda: Finder().predict(address)):
        with pytest.raises(UserError) as caught:
            read()
        shown = address.replace("user:secret@", "").replace("//@", "//")
        hint = "download the file, or record the stream with FFmpeg"
        assert str(caught.value) == f"{shown}: addresses are not read; {hint}"


def test_too_long_file_name(tmp_path):
    with pytest.raises(UserError, match="no such image, video or folder"):
        find_sources([tmp_path / ("a" * 300 + ".jpg")])


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    model = saved_model(tmp_path / "model")
    for arguments, message in (
        ([], "nothing to predict"),
        (["--camera", "97"], "camera 97 cannot be opened"),
        (["--camera", "-1"], "--camera. Must be >= 0"),
        ([str(tmp_path / "gone.mp4")], "no such image, video or folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["predict", model, *arguments])
        assert caught.value.code == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    write_video(tmp_path / "street.mp4", frames=3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit):
        main(["predict", model, str(tmp_path / "street.mp4")])
    assert "pip install 'deformable-detr[video]'" in capsys.readouterr().err


def test_default_video_output_is_the_working_directory(tmp_path, monkeypatch, capsys):
    saved_model(tmp_path / "model")
    write_video(tmp_path / "street.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    main(
        ["predict", "model", "street.mp4", "--threshold", "0.3"],
    )
    assert (tmp_path / "street-detected.mp4").is_file()
    assert len(read_lines(tmp_path / "street-detected.jsonl")) == 3
    assert "street.mp4: 3 frames" in capsys.readouterr().out
