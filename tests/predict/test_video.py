"""Videos: every frame once and in time, damage is one line and keeps what was done, memory does not grow."""

import json
import os
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.cli.predict_files import find_sources, predict_files
from deformable_detr.predict import video as module
from deformable_detr.predict.predictor import predict
from deformable_detr.predict.video import Video, VideoWriter, _Lines, predict_video
from deformable_detr.utils.errors import UserError
from tests.support.red_box import RedBoxFinder
from tests.support.training import tiny_config

av = pytest.importorskip("av", reason="needs PyAV")

FRAMES = 23


class Finder(RedBoxFinder):
    def predict(self, source, threshold=0.5):
        return predict(self, source, threshold)


def finder():
    return Finder()


def saved_model(folder):
    from deformable_detr.detector import DeformableDETR

    DeformableDETR(tiny_config().model).save_pretrained(folder)
    return str(folder)


def made(path, frames=FRAMES, size=(96, 64), rate=10, movflags=""):
    """A video in which a red square goes to the right; its brightness says the frame."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 30 + 2 * number % 60, dtype=np.uint8)
            pixels[20:44, 4 + number : 28 + number] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_frame_is_there_once_and_in_time(tmp_path):
    source = made(tmp_path / "way.mp4")
    done = predict_video(finder(), source, tmp_path / "out.mp4", tmp_path / "out.jsonl", threshold=0.3, batch_size=4)
    assert (done.frames, done.trouble) == (FRAMES, None)
    records = lines(tmp_path / "out.jsonl")
    assert [record["frame"] for record in records] == list(range(FRAMES))
    assert [record["time"] for record in records] == pytest.approx([n / 10 for n in range(FRAMES)], abs=1e-3)
    assert {(record["video"], record["width"], record["height"]) for record in records} == {(str(source), 96, 64)}
    # The square is at 4 + n: the detections belong to their own frame.
    lefts = [record["detections"][0]["box"][0] for record in records]
    assert lefts == pytest.approx([4 + n for n in range(FRAMES)], abs=3)
    assert sum(done.found.values()) == sum(len(record["detections"]) for record in records)

    with Video(tmp_path / "out.mp4") as written:
        frames = list(written)
    assert len(frames) == FRAMES
    assert [frame.seconds for frame in frames] == pytest.approx([n / 10 for n in range(FRAMES)], abs=2e-3)
    assert frames[0].pixels.shape == (256, 384, 3)  # enlarged four times, to have room for labels
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_cut_off(tmp_path, kind):
    whole = made(tmp_path / f"whole.{kind}", frames=60, movflags="faststart" if kind == "mp4" else "").read_bytes()
    source = tmp_path / f"cut.{kind}"
    source.write_bytes(whole[: len(whole) * 6 // 10])
    said, complaints = [], []
    out = tmp_path / "out"
    assert predict_files(finder(), [source], out, report=said.append, complain=complaints.append) == 1
    (complaint,) = complaints
    assert str(source) in complaint
    assert "cut off after" in complaint
    assert "\n" not in complaint
    records = lines(out / "cut.jsonl")
    assert 10 < len(records) < 50
    with Video(out / "cut.mp4") as written:
        assert sum(1 for _ in written) == len(records)
    whole_path = tmp_path / f"whole.{kind}"
    assert predict_files(finder(), [whole_path], out, report=said.append, complain=complaints.append) == 0


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mkv").write_bytes(b"")
    moov_last = made(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "tail.mp4").write_bytes(moov_last[: len(moov_last) // 2])
    for name in ("text.mp4", "empty.mkv", "tail.mp4", "gone.mp4"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            Video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_images_and_videos_may_be_mixed(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    made(source / "b.mp4", frames=5)
    Image.new("RGB", (64, 48), (200, 0, 0)).save(source / "a.png")
    (source / "notes.txt").write_text("neither")
    assert [path.name for path in find_sources([source])] == ["a.png", "b.mp4"]
    said = []
    out, table = tmp_path / "out", tmp_path / "all.json"
    assert predict_files(finder(), find_sources([source]), out, json_file=table, report=said.append) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.jsonl", "b.mp4"]
    image, film = json.loads(table.read_text())
    assert "detections" in image
    assert film == {
        "video": str(source / "b.mp4"), "frames": 5, "annotated": str(out / "b.mp4"), "lines": str(out / "b.jsonl"),
    }  # fmt: skip
    assert len(said) == 2
    with pytest.raises(UserError, match="would replace"):
        predict_files(finder(), [source / "b.mp4"], source)


def test_nothing_that_is_to_be_read_is_written_over(tmp_path):
    """The drawing of a.bmp would be a.png, which is another picture; the JSON may not be one either."""
    Image.new("RGB", (64, 48), (200, 0, 0)).save(tmp_path / "a.bmp")
    Image.new("RGB", (64, 48), (0, 200, 0)).save(tmp_path / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, table in ((tmp_path, None), (None, tmp_path / "a.png")):
        with pytest.raises(UserError, match=r"a\.png would replace .*a\.png, which is to be read"):
            predict_files(finder(), find_sources([tmp_path]), out, json_file=table)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert predict_files(finder(), find_sources([tmp_path]), None) == 0, "nothing is drawn then"


def test_file_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"b\xe9.png")
    Image.new("RGB", (64, 48)).save(tmp_path / name)
    assert predict_files(finder(), find_sources([tmp_path]), json_file=tmp_path / "all.json") == 0
    assert json.loads((tmp_path / "all.json").read_text())[0]["image"].endswith(name)


def test_a_film_without_a_picture_leaves_the_lines_of_an_earlier_run(tmp_path):
    lines = tmp_path / "film.jsonl"
    lines.write_text("an earlier run's\n")
    with pytest.raises(RuntimeError), _Lines(lines):
        raise RuntimeError
    assert lines.read_text() == "an earlier run's\n"
    assert list(tmp_path.iterdir()) == [lines]


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_each_encoder_alone(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(module, "ENCODERS", {encoder: module.ENCODERS[encoder]})
    writer = VideoWriter(tmp_path / "film.mp4", Fraction(30000, 1001))
    for number in range(6):
        writer.add(Image.new("RGB", (64, 48), (40 * number, 0, 0)), number * 1001 / 30000)
    writer.close()
    with Video(tmp_path / "film.mp4") as written:
        seconds = [frame.seconds for frame in written]
    assert seconds == pytest.approx([number * 1001 / 30000 for number in range(6)], abs=1e-4)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="no such image, video or folder"):
        find_sources([tmp_path / ("a" * 300 + ".jpg")])


def test_odd_sizes_and_changing_ones(tmp_path):
    writer = VideoWriter(tmp_path / "odd.mp4", Fraction(25))
    writer.add(Image.new("RGB", (33, 21)), 0.0)
    writer.add(Image.new("RGB", (50, 40)), 0.04)
    writer.add(Image.new("RGB", (33, 21)), 0.04)  # a time twice: the next tick
    writer.close()
    with Video(tmp_path / "odd.mp4") as written:
        assert [frame.pixels.shape for frame in written] == [(22, 34, 3)] * 3


def test_memory_does_not_grow(tmp_path):
    short, long = made(tmp_path / "short.mp4", frames=10), made(tmp_path / "long.mp4", frames=80)
    model = finder()
    peaks = []
    for source in (short, short, long):
        tracemalloc.start()
        predict_video(model, source, tmp_path / "out.mp4", tmp_path / "out.jsonl", 0.3, batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 20 * 96 * 64 * 3  # far fewer than the 70 frames that it is longer by


def test_a_camera_runs_until_interrupted(tmp_path, monkeypatch, capsys):
    source = made(tmp_path / "seen.mp4", frames=20)
    monkeypatch.setattr(module, "_camera", lambda number: (str(source), None))
    monkeypatch.setattr(module, "draw_on", interrupting(8))
    monkeypatch.chdir(tmp_path)
    done = predict_video(finder(), 0, tmp_path / "camera.mp4", tmp_path / "camera.jsonl", 0.3, batch_size=1)
    assert done.frames == 7
    assert done.trouble is None
    assert len(lines(tmp_path / "camera.jsonl")) == 7

    monkeypatch.setattr(module, "draw_on", interrupting(8))
    with pytest.raises(KeyboardInterrupt):
        predict_video(finder(), source, tmp_path / "file.mp4", tmp_path / "file.jsonl", 0.3, batch_size=1)
    with Video(tmp_path / "file.mp4") as kept:
        assert sum(1 for _ in kept) == 7


def interrupting(count):
    """Ctrl-C at the count-th drawing."""
    seen = []

    def drawing(picture, *_):
        seen.append(1)
        if len(seen) == count:
            raise KeyboardInterrupt
        return picture

    return drawing


def test_complaints_of_the_command_line(tmp_path, monkeypatch, capsys):
    model = saved_model(tmp_path / "model")
    for arguments, wanted in (
        ([], "nothing to look at"),
        (["--camera", "97"], "camera 97 cannot be opened"),
        (["--camera", "-1"], "must be 0 or more"),
        ([str(tmp_path / "gone.mp4")], "no such image, video or folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["predict", model, *arguments])
        assert caught.value.code == 2
        said = capsys.readouterr().err.strip()
        assert wanted in said
        assert "\n" not in said
    made(tmp_path / "way.mp4", frames=3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit):
        main(["predict", model, str(tmp_path / "way.mp4")])
    assert "pip install 'deformable-detr[video]'" in capsys.readouterr().err


def test_without_a_folder_a_video_is_written_here(tmp_path, monkeypatch, capsys):
    saved_model(tmp_path / "model")
    made(tmp_path / "way.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    main(
        ["predict", "model", "way.mp4", "--threshold", "0.3"],
    )
    assert (tmp_path / "way-detected.mp4").is_file()
    assert len(lines(tmp_path / "way-detected.jsonl")) == 3
    assert "way.mp4: 3 frames" in capsys.readouterr().out
