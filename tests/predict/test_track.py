"""Tracks: the ids are the tracker's own, classes do not share them, and every output has them."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deformable_detr.predict.predictor import predict_iter
from deformable_detr.predict.track import Tracker
from deformable_detr.predict.video import predict_video
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.rle import encode_masks
from deformable_detr.visualize.draw import NO_TRACK, draw_on
from tests.support.commands import run_command
from tests.support.tracks import SIZE, ClipDetector, detections, random_clip
from tests.support.videos import read_lines, write_video

trackers = pytest.importorskip("trackers", reason="needs the extra track")

THRESHOLD = 0.5
FRAME = np.zeros((*SIZE, 3), np.uint8)


def byte_track(frames, frame_rate, times=None):
    """Return {box: id} per frame: what the tracker itself says about detections down to 0.1."""
    tracker = trackers.ByteTrackTracker(
        frame_rate=frame_rate, track_activation_threshold=THRESHOLD, high_conf_det_threshold=THRESHOLD
    )
    results = []
    for number, frame in enumerate(frames):
        frame = frame.select(frame.scores >= 0.1).to_supervision()
        tracked = tracker.update(frame, timestamp=None if times is None else times[number])
        results.append(dict(zip(map(tuple, tracked.xyxy.tolist()), tracked.tracker_id.tolist(), strict=True)))
    return results


def displayed(frame, expected):
    """Return the expected ids of the boxes that are displayed."""
    return {box: expected[box] for box in map(tuple, frame.boxes.tolist())}


def ids_by_box(frame):
    return dict(zip(map(tuple, frame.boxes.tolist()), frame.track_ids.tolist(), strict=True))


def test_ids_are_those_of_the_tracker():
    clip = random_clip(seed=0, frames=60)
    images = [FRAME] * len(clip)
    every = list(predict_iter(ClipDetector(clip), images, 0.0))
    found = list(predict_iter(ClipDetector(clip), images, THRESHOLD, track=True, frame_rate=10, batch_size=3))
    expected = byte_track(every, frame_rate=10)
    assert [ids_by_box(frame) for frame in found] == [
        displayed(frame, ids) for frame, ids in zip(found, expected, strict=True)
    ]
    assert [len(frame) for frame in found] == [int((frame.scores >= THRESHOLD).sum()) for frame in every]


@pytest.mark.parametrize("frame_rate", [30, 10, 60])
def test_ids_in_many_clips(frame_rate):
    rng = np.random.default_rng(frame_rate)
    for seed in range(4):
        frames = [detections(*frame) for frame in random_clip(seed)]
        uneven = np.cumsum(rng.uniform(0.5, 1.5, len(frames))) / frame_rate
        for times in (None, uneven.tolist()):
            tracker, expected = Tracker(THRESHOLD, frame_rate), byte_track(frames, frame_rate, times)
            highest = -1
            for number, (frame, ids) in enumerate(zip(frames, expected, strict=True)):
                found = tracker.update(frame.select(frame.scores >= 0.1), None if times is None else times[number])
                assert ids_by_box(found) == displayed(found, ids)
                assert len(found) == (frame.scores >= THRESHOLD).sum()
                highest = max(highest, *ids.values())
            assert tracker.count == highest + 1 > 12
            without_low = [frame.select(frame.scores >= THRESHOLD) for frame in frames]
            assert byte_track(without_low, frame_rate, times) != expected, "low scores do not matter in this clip"


def test_each_class_is_tracked_on_its_own():
    """The ids of each class are those of a tracker that sees this class only, in other numbers."""
    frames = [detections(*frame) for frame in random_clip(seed=3, objects=20, classes=2)]
    tracker = Tracker(THRESHOLD, 25)
    found = [tracker.update(frame.select(frame.scores >= 0.1)) for frame in frames]
    numbers = {}
    for label in (0, 1):
        expected = byte_track([frame.select(frame.labels == label) for frame in frames], 25)
        for frame, ids in zip(found, expected, strict=True):
            for box, number in ids_by_box(frame.select(frame.labels == label)).items():
                if ids[box] < 0:
                    assert number == -1
                else:
                    assert numbers.setdefault(number, (label, ids[box])) == (label, ids[box])
    assert set(numbers) <= set(range(tracker.count))  # a track whose later scores are low is never displayed
    assert len(set(numbers.values())) == len(numbers) > 20


def moving(number, score=0.9, label=0, step=4):
    x = 100 + step * number
    return [[x, 100, x + 60, 180]], [score], [label]


def test_a_changed_class_is_another_track():
    tracker = Tracker()
    ids = [tracker.update(detections(*moving(n, label=int(5 <= n < 10)))).track_ids.tolist() for n in range(15)]
    assert ids == [[-1], [0], [0], [0], [0], [-1], [1], [1], [1], [1], [0], [0], [0], [0], [0]]


def test_two_classes_of_one_query_are_two_tracks():
    tracker = Tracker()
    box = moving(0)[0]
    for n in range(4):
        ids = tracker.update(detections(box * 2, [0.9, 0.8], [n % 2, 1 - n % 2])).track_ids.tolist()
        assert ids == ([-1, -1] if n == 0 else [n % 2, 1 - n % 2])


def test_low_scores_continue_a_track_and_are_not_returned():
    scores = [0.9, 0.9, 0.15, 0.3, 0.15, 0.9, 0.05, 0.9]
    tracker = Tracker(0.5)
    assert tracker.min_score == 0.1
    found = [tracker.update(detections(*moving(n, score))).track_ids.tolist() for n, score in enumerate(scores)]
    assert found == [[-1], [0], [], [], [], [0], [], [0]]
    tracker = Tracker(0.03)
    assert tracker.min_score == 0.03
    assert [len(tracker.update(detections(*moving(n, 0.04)))) for n in range(3)] == [1, 1, 1]
    assert tracker.count == 1


def test_a_track_ends_after_a_second():
    for rate, missing, expected in ((10, 10, 0), (10, 11, 1), (30, 30, 0), (30, 31, 1)):
        tracker = Tracker(frame_rate=rate)
        for n in range(5):
            tracker.update(detections(*moving(n, step=0)))
        for _ in range(missing):
            assert len(tracker.update(detections([], [], []))) == 0
        ids = [tracker.update(detections(*moving(0))).track_ids.item() for n in range(2)]
        assert ids[1] == expected, (rate, missing)


def test_times_of_the_frames_decide_where_an_object_is_expected():
    """After a gap of ten frames, an object has moved beyond its last box; the tracker needs the time to know."""
    numbers = [*range(10), *range(20, 24)]
    for timed, expected in ((True, 0), (False, 1)):
        tracker = Tracker(frame_rate=25)
        for n in numbers:
            found = tracker.update(detections(*moving(n, step=12)), n / 25 if timed else None)
        assert found.track_ids.tolist() == [expected]


def test_times_that_go_back_are_taken_as_the_next_frame(recwarn):
    tracker = Tracker(frame_rate=25)
    times = [0.0, 0.04, 0.04, 0.02, 0.08, 0.12]
    ids = [tracker.update(detections(*moving(n)), time).track_ids.item() for n, time in enumerate(times)]
    assert ids == [-1, 0, 0, 0, 0, 0]
    assert not recwarn


def test_ended_tracks_leave_no_memory():
    tracker = Tracker(frame_rate=10)
    for n in range(60):  # a new object every other frame, far from the last one
        x = 100 * (n // 2 % 5)
        tracker.update(detections([[x, 0, x + 40, 40]], [0.9], [n // 20 % 2]), n * 0.7)
    assert tracker.count == 30
    assert sum(len(tracks.ids) for tracks in tracker._classes.values()) <= 3
    tracker.update(detections([], [], []), 100.0)
    assert not tracker._classes


def test_all_formats_have_the_id():
    tracker = Tracker()
    tracker.update(detections(*moving(0)))
    two = [[*moving(1)[0], [400, 300, 460, 380]], [0.9, 0.8], [0, 0]]
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 100:180, 104:164], masks[1, 300:380, 400:460] = True, True
    found = tracker.update(replace(detections(*two), segmentations=encode_masks(masks)))
    assert found.track_ids.tolist() == [0, -1]
    assert found.track_ids.dtype == torch.int64
    assert [row["track_id"] for row in json.loads(json.dumps(found.to_dict()))["detections"]] == [0, None]
    assert found.to_supervision().tracker_id.tolist() == [0, -1]
    assert detections(*two).to_supervision().tracker_id is None
    assert "track_id" not in detections(*two).to_dict()["detections"][0]
    second = found.select(torch.tensor([1]))
    assert (second.track_ids.tolist(), second.boxes.tolist()) == ([-1], [[400, 300, 460, 380]])
    assert torch.equal(second.masks, masks[1:])
    assert torch.equal(found.select(torch.tensor([True, False])).masks, masks[:1])


@pytest.mark.parametrize("masked", [False, True])
def test_the_color_is_that_of_the_track(masked):
    """Two objects of a class keep their colors when they change places and scores."""
    boxes = [[100, 100, 180, 180], [400, 100, 480, 180]]
    colors = []
    for frame in ([0, 1], [1, 0]):
        found = detections([boxes[i] for i in frame], [0.9, 0.8], [0, 0])
        found = replace(found, track_ids=torch.tensor([3, 10]))
        if masked:
            masks = torch.zeros(2, *SIZE, dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(masks, found.boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
            found = replace(found, segmentations=encode_masks(masks))
        drawn = np.asarray(draw_on(Image.fromarray(FRAME.copy()), found))
        corners = [drawn[179 if masked else 180, int(x)].tolist() for x in found.boxes[:, 0] + 40]
        colors.append([tuple(color) for color in corners])
    assert colors[0] == colors[1]
    assert len({*colors[0]}) == 2, "ids of the same color differ in shade"


def test_labels_have_the_number(monkeypatch):
    texts = []
    pen = ImageDraw.ImageDraw
    draw_text = pen.text

    def text(self, place, text, *rest, **options):
        texts.append(text)
        draw_text(self, place, text, *rest, **options)

    monkeypatch.setattr(pen, "text", text)
    found = detections([[100, 100, 180, 180], [400, 100, 480, 180]], [0.93, 0.8], [1, 0])
    draw_on(Image.fromarray(FRAME.copy()), replace(found, track_ids=torch.tensor([7, -1])))
    assert sorted(texts) == ["#7 red 0.93", "green 0.80"]


def test_unconfirmed_detections_are_gray():
    found = replace(detections(*moving(0)), track_ids=torch.tensor([-1]))
    drawn = draw_on(Image.fromarray(FRAME.copy()), found)
    assert drawn.getpixel((130, 180)) == tuple(bytes.fromhex(NO_TRACK[1:]))


def test_video(tmp_path):
    pytest.importorskip("av", reason="needs PyAV")
    source = write_video(tmp_path / "street.mp4", frames=60, size=SIZE[::-1], rate=20)
    clip = random_clip(seed=5, frames=60)
    result = predict_video(
        ClipDetector(clip), source, tmp_path / "out.mp4", tmp_path / "out.jsonl", THRESHOLD, batch_size=4, track=True
    )
    every = list(predict_iter(ClipDetector(clip), [FRAME] * 60, 0.0))
    expected = byte_track(every, 20, [n / 20 for n in range(60)])
    highest = -1
    for record, ids in zip(read_lines(tmp_path / "out.jsonl"), expected, strict=True):
        found = {tuple(row["box"]): row["track_id"] for row in record["detections"]}
        assert min(row["score"] for row in record["detections"]) >= THRESHOLD
        assert found == {box: None if ids[box] < 0 else ids[box] for box in found}
        highest = max([highest, *ids.values()])
    assert result.tracks == highest + 1
    assert result.frames == 60


def test_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("av", reason="needs PyAV")
    monkeypatch.setattr(
        "deformable_detr.detector.load_detector", lambda *_: ClipDetector([moving(n) for n in range(20)])
    )
    source = write_video(tmp_path / "street.mp4", frames=20, size=SIZE[::-1])
    out = tmp_path / "out"
    code, printed, error = run_command(capsys, "predict", "model", source, "--track", "--out", out)
    assert (code, error) == (0, "")
    assert "20 frames, green 20× in 1 track;" in printed
    ids = [row["track_id"] for record in read_lines(out / "street.jsonl") for row in record["detections"]]
    assert ids == [None] + [0] * 19
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    code, _, error = run_command(capsys, "predict", "model", tmp_path / "a.png", "--track")
    assert (code, error) == (2, "error: --track is for videos: name one, or a camera with --camera\n")
    monkeypatch.setitem(sys.modules, "trackers", None)
    code, _, error = run_command(capsys, "predict", "model", source, "--track", "--out", out)
    assert (code, error) == (2, "error: trackers is not installed: pip install 'deformable-detr[track]'\n")


def test_settings_out_of_range():
    for settings, message in (((1.5, 30), "threshold 1.5"), ((0.5, 0), "frame_rate 0"), ((0.5, float("nan")), "nan")):
        with pytest.raises(UserError, match=message):
            Tracker(*settings)
    with pytest.raises(UserError, match=r"threshold 1\.5: must be from 0 to 1"):
        predict_iter(ClipDetector([moving(0)]), [FRAME], 1.5, track=True)
    with pytest.raises(UserError, match="batch_size 0"):
        predict_iter(ClipDetector([moving(0)]), [FRAME], batch_size=0, track=True)


def test_the_counting_example_of_the_docs(tmp_path, monkeypatch, capsys):
    """Three cars go down over the line, one goes up, one stays above it, and two are in the left half."""
    pytest.importorskip("av", reason="needs PyAV")
    page = (Path(__file__).parents[2] / "docs/video.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lefts, tops, steps = [50, 400, 460, 520, 200], [100, 80, 60, 380, 60], [5, 5, 5, -5, 0]
    clip = [
        (
            [[x, y + n * d, x + 40, y + n * d + 40] for x, y, d in zip(lefts, tops, steps, strict=True)],
            [0.9] * 5,
            [0] * 5,
        )
        for n in range(50)
    ]
    clip = [(np.array(boxes), *rest) for boxes, *rest in clip]
    write_video(tmp_path / "street.mp4", frames=50, size=SIZE[::-1])
    detector = ClipDetector(clip)
    detector.optimize = lambda: detector
    monkeypatch.setattr("deformable_detr.load_detector", lambda _: detector)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/video.md", "exec"), {})
    counts = capsys.readouterr().out.strip()
    assert counts in ("3 in, 1 out, 2 in the zone", "1 in, 3 out, 2 in the zone")
