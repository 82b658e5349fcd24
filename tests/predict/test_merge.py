"""Merging the views of one image: each object once, whole, and no other is lost.

The views are those of an oracle: it returns the visible part of every object, with a score that falls with the visible
share, and coordinates that are off by up to a pixel of the model's input.
"""

import numpy as np
import pytest

from deformable_detr.predict import merge
from deformable_detr.predict.merge import merge_views
from deformable_detr.utils.tiles import Window, tile_grid

SIZE, TILE = 2000, 640


def box_iou(a, b):
    shared = (np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])).clip(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared)


class Oracle:
    """Detections of `objects` (N, 4) with `labels` (N,) in the tiles of a square image and in the whole one."""

    def __init__(self, objects, labels=None, size=SIZE, overlap=0.2, smallest=16.0, seed=0):
        objects = np.asarray(objects, dtype=np.float64).reshape(-1, 4)
        self.labels_of_objects = np.zeros(len(objects), int) if labels is None else np.asarray(labels)
        self.objects, random = objects, np.random.default_rng(seed)
        self.windows = [*tile_grid(size, size, TILE, overlap), Window(0, 0, size, size)]
        boxes, scores, labels, views = [], [], [], []
        for view, window in enumerate(self.windows):
            frame, scale = np.array(window.box), window.width / TILE
            for box, label in zip(objects, self.labels_of_objects, strict=True):
                visible = np.concatenate([box[:2].clip(frame[:2], frame[2:]), box[2:].clip(frame[:2], frame[2:])])
                sides = visible[2:] - visible[:2]
                is_tile = view < len(self.windows) - 1
                if sides.min() < 1 or (not is_tile and sides.max() < smallest):  # the whole image hides small objects
                    continue
                jitter = (
                    random.uniform(-0.5, 0.5, 4)
                    * scale
                    * (visible > frame[[0, 1, 0, 1]])
                    * (visible < frame[[2, 3, 2, 3]])
                )
                share = sides.prod() / (box[2:] - box[:2]).prod()
                boxes.append(visible + jitter)
                scores.append((0.4 + 0.5 * share) * random.uniform(0.8, 1))
                labels.append(label)
                views.append(view)
        self.boxes, self.scores = np.array(boxes).reshape(-1, 4), np.array(scores)
        self.labels, self.views = np.array(labels, int), np.array(views, int)

    def merged(self):
        groups = merge_views(self.boxes, self.scores, self.labels, self.views, self.windows)
        boxes = [np.concatenate([self.boxes[g, :2].min(0), self.boxes[g, 2:].max(0)]) for g in groups]
        return np.array(boxes).reshape(-1, 4), self.labels[[g[0] for g in groups]]

    def assert_once_each(self, min_iou=0.8):
        """Every object has one detection of its class, and there is no other."""
        boxes, labels = self.merged()
        iou = box_iou(self.objects, boxes) * (self.labels_of_objects[:, None] == labels)
        assert len(boxes) == len(self.objects)
        assert (iou.argmax(1)[iou.argmax(0)] == np.arange(len(boxes))).all()
        assert iou.max(1).min() > min_iou


def crossing_seams(count=1000, size=8000, side=(8, 120), seed=1):
    """Return objects that do not touch each other, the i-th at the i-th position relative to the tile edges."""
    random = np.random.default_rng(seed)
    cells = random.permutation((size // 160) ** 2)[:count]  # one object per cell of 160 pixels
    corners = np.stack([cells % (size // 160), cells // (size // 160)], 1) * 160.0
    sides = random.uniform(*side, (count, 2))
    corners += random.uniform(0, 1, (count, 2)) * (158 - sides)
    return np.concatenate([corners, corners + sides], 1), size


def test_objects_at_every_position_relative_to_the_seams_are_found_once():
    objects, size = crossing_seams()
    oracle = Oracle(objects, np.arange(1000) % 3, size=size)
    assert len(oracle.boxes) > 1500  # without merging, many are found several times
    oracle.assert_once_each(0.75)


@pytest.mark.parametrize("x", range(400, 700, 7))
def test_an_object_at_each_offset_from_an_edge(x):
    Oracle([[x, x + 3, x + 90, x + 70]], smallest=1000).assert_once_each()


def test_without_the_merge_objects_at_seams_are_found_several_times(monkeypatch):
    monkeypatch.setattr(merge, "_neighbors", lambda *_: (np.zeros(0, int), np.zeros(0, int)))
    with pytest.raises(AssertionError):
        Oracle(crossing_seams()[0], size=8000).assert_once_each(0.75)


def test_without_joining_pieces_a_long_object_is_found_in_parts(monkeypatch):
    long = [[100, 300, 900, 330]]  # wider than a tile
    Oracle(long, smallest=1000).assert_once_each()
    monkeypatch.setattr(merge, "_agree", lambda boxes, views, frames, a, b: np.zeros(len(a), bool))
    with pytest.raises(AssertionError):
        Oracle(long, smallest=1000).assert_once_each()


def test_large_objects_come_from_the_whole_image():
    oracle = Oracle([[100, 100, 1700, 1500], [1200, 1600, 1400, 1900]])
    groups = merge_views(oracle.boxes, oracle.scores, oracle.labels, oracle.views, oracle.windows)
    assert oracle.views[groups[0]].tolist() == [len(oracle.windows) - 1]
    oracle.assert_once_each()


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("side", [10, 40, 100])
def test_neighbors_that_nearly_touch_stay_apart(gap, side):
    starts = 350 + (side + gap) * np.arange(400 // (side + gap))
    x, y = (axis.ravel() for axis in np.meshgrid(starts, starts))
    Oracle(np.stack([x, y, x + side, y + side], 1), smallest=1000).assert_once_each(0.6)


def test_a_small_object_in_front_of_a_large_one_of_its_class_stays():
    Oracle([[200, 200, 1800, 1800], [600, 600, 640, 650], [900, 900, 960, 930]], smallest=200).assert_once_each()


@pytest.mark.parametrize("shown", [False, True])
def test_a_cluster_in_the_whole_image_gives_way_unless_tiles_show_its_pieces(shown):
    windows = [*tile_grid(SIZE, SIZE, TILE), Window(0, 0, SIZE, SIZE)]
    cluster, small = [100, 100, 700, 400], [[120, 120, 160, 160], [300, 300, 330, 340], [400, 150, 440, 190]]
    boxes = np.array([*small, cluster, [100, 100, 640, 400]][: 4 + shown])
    views = np.array([0, 0, 0, len(windows) - 1, 0][: 4 + shown])
    groups = merge_views(boxes, np.linspace(0.9, 0.7, 5)[: 4 + shown], np.zeros(4 + shown, int), views, windows)
    assert groups == ([[0], [1], [2], [3]] if shown else [[0], [1], [2]])


def test_classes_are_merged_separately():
    Oracle([[480, 480, 560, 560]] * 2, [0, 1]).assert_once_each()


def test_a_blurred_detection_of_the_whole_image_gives_way_to_those_of_tiles():
    windows = [*tile_grid(SIZE, SIZE, TILE), Window(0, 0, SIZE, SIZE)]
    last = len(windows) - 1
    boxes = np.array([[100, 100, 120, 120], [130, 100, 150, 120], [96, 96, 154, 124]])  # the third one covers both
    assert merge_views(boxes, np.array([0.6, 0.7, 0.9]), np.zeros(3, int), np.array([0, 0, last]), windows) == [
        [1],
        [0],
    ]


def test_no_detections():
    windows = [Window(0, 0, 10, 10)]
    assert merge_views(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), np.zeros(0, int), windows) == []
