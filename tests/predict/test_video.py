"""Videos: every frame once and at its time, damage reported in one line, constant memory."""

import errno
import gc
import struct
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from deformable_detr.predict import stream
from deformable_detr.predict import video as module
from deformable_detr.predict.frames import VIDEO_SUFFIXES, Video
from deformable_detr.predict.video import VideoWriter, _output_files, predict_video
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.rle import decode_masks
from tests.support.masks import with_masks
from tests.support.videos import Finder, read_lines, write_video

pytest.importorskip("av", reason="needs PyAV")

FRAMES = 23


def test_every_frame_is_predicted_once_at_its_time(tmp_path):
    source = write_video(tmp_path / "street.mp4")
    result = predict_video(Finder(), source, tmp_path / "out.mp4", tmp_path / "out.jsonl", threshold=0.3, batch_size=4)
    assert (result.frames, result.problem) == (FRAMES, None)
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["frame"] for record in records] == list(range(FRAMES))
    assert [record["time"] for record in records] == pytest.approx([n / 10 for n in range(FRAMES)], abs=1e-3)
    assert {(record["video"], record["width"], record["height"]) for record in records} == {(str(source), 96, 64)}
    # The square is at x = 4 + n in frame n.
    lefts = [record["detections"][0]["box"][0] for record in records]
    assert lefts == pytest.approx([4 + n for n in range(FRAMES)], abs=3)
    assert sum(result.counts.values()) == sum(len(record["detections"]) for record in records)

    with Video(tmp_path / "out.mp4") as written:
        frames = list(written)
    assert len(frames) == FRAMES
    assert [frame.seconds for frame in frames] == pytest.approx([n / 10 for n in range(FRAMES)], abs=2e-3)
    assert frames[0].pixels.shape == (256, 384, 3)  # enlarged four times to fit labels
    assert not list(tmp_path.glob(".*"))


def test_masks_are_drawn_and_written(tmp_path):
    source = write_video(tmp_path / "street.mp4", frames=4)
    frames = {}
    for name, model in {"masks": with_masks(Finder()), "boxes": Finder()}.items():
        predict_video(model, source, tmp_path / f"{name}.mp4", tmp_path / f"{name}.jsonl", batch_size=3)
        with Video(tmp_path / f"{name}.mp4") as written:
            frames[name] = [frame.pixels for frame in written]
    with_rle, without = (read_lines(tmp_path / f"{name}.jsonl") for name in ("masks", "boxes"))
    for frame, (record, plain) in enumerate(zip(with_rle, without, strict=True)):
        [detection] = record["detections"]
        [mask] = decode_masks([detection.pop("mask")], (64, 96))
        x1, y1, x2, y2 = (round(side) for side in detection["box"])
        assert mask[:, :x1].sum() + mask[:, x2:].sum() == 0
        assert 0.5 < mask[y1:y2, x1:x2].float().mean() < 0.8  # π/4 without the hole
        assert record == plain
        red = frames["boxes"][frame][4 * y1 + 16, 2 * (x1 + x2)].astype(int)
        assert np.abs(frames["masks"][frame][4 * y1 + 16, 2 * (x1 + x2)] - red).max() > 30


# The display matrix (a, b, c, d: x' = ax + cy, y' = bx + dy), and what it does to an image.
DISPLAY = {
    "as stored": ((1, 0, 0, 1), lambda a: a),
    "clockwise": ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    "half turn": ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda a: np.rot90(a)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
    "anti-transposed": ((0, -1, -1, 0), lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("suffix", ["mp4", "mov", "3gp"])
@pytest.mark.parametrize("kind", DISPLAY)
def test_frames_are_upright(tmp_path, kind, suffix):
    source = write_video(tmp_path / f"film.{suffix}", frames=2)
    assert source.suffix in VIDEO_SUFFIXES
    with Video(source) as video:
        stored = next(iter(video)).pixels
    (a, b, c, d), transform = DISPLAY[kind]
    content, identity = source.read_bytes(), display_matrix(1, 0, 0, 1)
    position = content.index(identity, content.index(b"tkhd"))
    source.write_bytes(content[:position] + display_matrix(a, b, c, d) + content[position + len(identity) :])
    with Video(source) as video:
        np.testing.assert_array_equal(next(iter(video)).pixels, transform(stored))


def display_matrix(a, b, c, d):
    return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


def test_invalid_videos_are_reported(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mkv").write_bytes(b"")
    moov_last = write_video(tmp_path / "complete.mp4").read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(moov_last[: len(moov_last) // 2])
    for name in ("text.mp4", "empty.mkv", "truncated.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            Video(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_failed_run_keeps_the_output_of_an_earlier_one(tmp_path):
    lines = tmp_path / "video.jsonl"
    lines.write_text("earlier output\n")
    with pytest.raises(RuntimeError):
        write(lines, "", RuntimeError())
    with pytest.raises(UserError, match=r"video\.jsonl cannot be written: No space left on device"):
        write(lines, "partial line", OSError(errno.ENOSPC, "No space left on device"))
    assert lines.read_text() == "earlier output\n"
    with pytest.raises(RuntimeError):
        write(lines, "a line\n", RuntimeError())
    assert lines.read_text() == "a line\n"
    assert list(tmp_path.iterdir()) == [lines]


def write(path, text, error):
    with _output_files(path) as (temporary,):
        temporary.write_text(text)
        raise error


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_each_encoder(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(module, "ENCODERS", {encoder: module.ENCODERS[encoder]})
    writer = VideoWriter(tmp_path / "video.mp4", Fraction(30000, 1001))
    for number in range(6):
        writer.add(Image.new("RGB", (64, 48), (40 * number, 0, 0)), number * 1001 / 30000)
    writer.close()
    with Video(tmp_path / "video.mp4") as written:
        seconds = [frame.seconds for frame in written]
    assert seconds == pytest.approx([number * 1001 / 30000 for number in range(6)], abs=1e-4)


def test_odd_and_changing_frame_sizes(tmp_path):
    writer = VideoWriter(tmp_path / "odd.mp4", Fraction(25))
    writer.add(Image.new("RGB", (33, 21)), 0.0)
    writer.add(Image.new("RGB", (50, 40)), 0.04)
    writer.add(Image.new("RGB", (33, 21)), 0.04)  # a duplicate timestamp becomes the next tick
    writer.close()
    with Video(tmp_path / "odd.mp4") as written:
        assert [frame.pixels.shape for frame in written] == [(22, 34, 3)] * 3


def test_memory_is_independent_of_the_length(tmp_path):
    short, long = write_video(tmp_path / "short.mp4", frames=10), write_video(tmp_path / "long.mp4", frames=80)
    model = Finder()
    peaks = []
    for source in (short, short, long):
        tracemalloc.start()
        predict_video(model, source, tmp_path / "out.mp4", tmp_path / "out.jsonl", 0.3, batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 20 * 96 * 64 * 3  # far less than the 70 additional frames


def test_frames_are_freed_without_the_garbage_collector(tmp_path):
    """Buffers of decoded frames are megabytes; PyAV's `side_data` keeps them until a collection."""
    source = write_video(tmp_path / "street.mp4", frames=30)
    gc.collect()
    gc.disable()
    try:
        with Video(source) as frames:
            assert sum(1 for _ in frames) == 30
        kept = [item for item in gc.get_objects() if type(item).__name__ == "VideoFrame"]
    finally:
        gc.enable()
    assert len(kept) <= 2  # the first one, and the last one


def test_camera_runs_until_interrupted(tmp_path, monkeypatch, capsys):
    source = write_video(tmp_path / "camera-source.mp4", frames=20)
    monkeypatch.setattr(stream, "_camera", lambda number: (str(source), None))
    for name, value in {"SETTLE": -1.0, "QUEUE": 100, "MAX_AGE": 100.0}.items():  # a file arrives at once
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(module, "draw_on", interrupt_at(8))
    monkeypatch.chdir(tmp_path)
    result = predict_video(Finder(), 0, tmp_path / "camera.mp4", tmp_path / "camera.jsonl", 0.3, batch_size=1)
    assert result.frames == 7
    assert result.problem is None
    assert len(read_lines(tmp_path / "camera.jsonl")) == 7

    monkeypatch.setattr(module, "draw_on", interrupt_at(8))
    with pytest.raises(KeyboardInterrupt):
        predict_video(Finder(), source, tmp_path / "file.mp4", tmp_path / "file.jsonl", 0.3, batch_size=1)
    with Video(tmp_path / "file.mp4") as video:
        assert sum(1 for _ in video) == 7


def interrupt_at(count):
    """Return a drawing function that raises KeyboardInterrupt at the count-th call."""
    calls = []

    def draw(image, *_):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return image

    return draw
