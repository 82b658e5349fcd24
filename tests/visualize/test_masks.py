"""Drawn masks: where the pixels are, small objects, holes, objects of one class, crowds."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.structures import Detections
from deformable_detr.utils.rle import encode_masks
from deformable_detr.visualize import draw as drawing
from deformable_detr.visualize.draw import PALETTE, draw, draw_on
from deformable_detr.visualize.masks import HALO, OPACITY, SHADES, shade


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def disk(x, y, radius, size=(400, 600)):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def detections(masks, labels=None, image=None):
    """Return detections with the boxes of their masks."""
    N, height, width = len(masks), *masks[0].shape
    extents = [[(m.any(axis).nonzero()[0] if m.any() else np.array([0, -1])) for axis in (0, 1)] for m in masks]
    boxes = [[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in extents]
    labels = torch.tensor(labels if labels is not None else range(N))
    image = np.full((height, width, 3), 128, np.uint8) if image is None else image
    scores = torch.linspace(0.99, 0.5, N)
    boxes = torch.tensor(np.array(boxes), dtype=torch.float32)
    rles = encode_masks(np.stack(masks))
    return Detections(boxes, scores, labels, labels, ("cat",) * N, (height, width), image, rles)


@pytest.fixture
def no_labels(monkeypatch):
    monkeypatch.setattr(drawing, "_draw_labels", lambda *_: None)


@pytest.mark.usefixtures("no_labels")
@pytest.mark.parametrize("factor", [1, 3])
def test_fill_outline_rim_and_hole(factor):
    size = (400 // factor, 600 // factor)
    mask = disk(300 // factor, 200 // factor, 120 // factor, size) & ~disk(
        300 // factor, 200 // factor, 40 // factor, size
    )
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    result = detections([mask], image=image)
    before = image.repeat(factor, 0).repeat(factor, 1)
    pixels = np.asarray(draw_on(Image.fromarray(before), result, factor)).astype(int)
    mask = mask.repeat(factor, 0).repeat(factor, 1)

    def grown(mask, steps):
        for _ in range(steps):
            padded = np.pad(mask, 1)
            mask = padded[1:-1, 1:-1] | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        return mask

    inside, rim = ~grown(~mask, 2), grown(mask, 1) & ~mask
    blend = (before.astype(float) * (255 - OPACITY) + rgb(PALETTE[0]) * OPACITY) / 255
    assert np.abs(pixels - blend)[inside].max() <= 1
    assert (pixels[mask & ~inside] == rgb(PALETTE[0])).all()
    assert (pixels[rim] == rgb(HALO)).all()
    hole = disk(*(side // factor * factor for side in (300, 200)), 30, mask.shape)
    assert (pixels[hole] == before[hole]).all()
    changed = (pixels != before).any(-1)
    corner = np.s_[: 60 // factor * factor, :]
    assert not changed[corner].any()


@pytest.mark.usefixtures("no_labels")
def test_small_masks_are_on_top_of_large_ones_and_colors_do_not_mix():
    small, large = disk(300, 200, 30), disk(320, 200, 150)
    alone = np.asarray(draw(detections([small], labels=[1])))
    for order in (slice(None), slice(None, None, -1)):
        both = np.asarray(draw(detections([small, large][order], labels=[1, 0][order])))
        assert (both[small] == alone[small]).all()
        assert (both[large & ~disk(300, 200, 33)] != 128).any(-1).all()


@pytest.mark.usefixtures("no_labels")
@pytest.mark.parametrize("corner", [(0, 0), (399, 599), (200, 300)])
def test_a_mask_of_one_pixel_is_visible(corner):
    mask = np.zeros((400, 600), bool)
    mask[corner] = True
    pixels = np.asarray(draw(detections([disk(300, 200, 180), mask], labels=[0, 1])))
    assert (pixels[corner] == rgb(PALETTE[1])).all()
    y, x = corner
    assert (pixels[abs(y - 1), x] == rgb(HALO)).all()


@pytest.mark.usefixtures("no_labels")
def test_empty_masks_show_their_boxes():
    result = detections([np.zeros((400, 600), bool), disk(500, 300, 20)])
    result = replace(result, boxes=torch.tensor([[100.0, 100.0, 200.0, 200.0], [480.0, 280.0, 521.0, 321.0]]))
    pixels = np.asarray(draw(result))
    assert (pixels[150, 100] == rgb(PALETTE[0])).all()
    assert (pixels[150, 150] == 128).all()


def test_objects_of_one_class_have_different_shades():
    masks = [disk(100 + 90 * k, 200, 50) for k in (3, 0, 4, 1, 2)]
    result = detections(masks, labels=[2] * 5)
    colors = shade([PALETTE[2]] * 5, result.boxes.numpy())
    by_position = [colors[index] for index in (1, 3, 4, 0, 2)]
    assert by_position[0] == PALETTE[2]
    assert by_position[3:] == by_position[:2]
    distances = [np.abs(rgb(a) - rgb(b)).max() for a, b in itertools.pairwise(by_position)]
    assert min(distances) >= 40
    pixels = np.asarray(draw(result))
    left, right = pixels[200, 100], pixels[200, 190]
    assert np.abs(left.astype(int) - right).max() >= 20
    assert len(SHADES) == len(set(colors)) == 3
    assert shade(["#000000", "#FFFFFF"], np.zeros((2, 4))) == ["#000000", "#FFFFFF"]


def test_labels_of_a_crowd_leave_masks_visible(monkeypatch):
    """Without masks, every label is drawn."""
    rng = np.random.default_rng(0)
    masks = [disk(*rng.uniform((20, 20), (460, 300)), rng.uniform(4, 40), (320, 480)) for _ in range(50)]
    result = detections(masks)
    texts = []
    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: texts.append(text))
    draw(result)
    assert 10 < len(texts) < 40
    assert texts[-1] == "cat 0.99"
    texts.clear()
    draw(replace(result, segmentations=None))
    assert len(texts) == 50


def test_labels_avoid_small_masks(monkeypatch):
    masks = [disk(100 + 25 * (k % 5), 100 + 25 * (k // 5), 7) for k in range(25)]
    result = detections(masks, labels=[0] * 25)
    visible = {}
    for weight in (16, 0):
        monkeypatch.setattr(drawing, "SMALL", weight)
        pixels = np.asarray(draw(result)).astype(int)
        centers = [pixels[100 + 25 * (k // 5), 100 + 25 * (k % 5)] for k in range(25)]
        fills = [
            (128 * (255 - OPACITY) + rgb(color) * OPACITY) / 255
            for color in shade([PALETTE[0]] * 25, result.boxes.numpy())
        ]
        visible[weight] = sum(np.abs(a - b).max() <= 1 for a, b in zip(centers, fills, strict=True))
    assert visible[16] > visible[0]


def test_speed_depends_on_the_area_of_the_masks():
    masks = [disk(50 + 180 * (k % 7), 100 + 220 * (k // 7), 60, (720, 1280)) for k in range(20)]
    image = np.zeros((720, 1280, 3), np.uint8)
    result = detections(masks, image=image)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        draw_on(Image.fromarray(image), result)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1  # 0.2 s and more if each mask costs as much as the image
