"""Prediction in tiles: small objects are found, each once, at their place in the whole image."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.predict import tiles
from deformable_detr.predict.predictor import predict, predict_each, predict_iter
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.rle import decode_masks
from deformable_detr.utils.tiles import Tiling, check_tiling
from tests.support.blob_finder import BlobFinder, paint, scattered


def check(detections, objects, pixels=2.0):
    """Every object has one detection of its class that is off by at most `pixels`, and there is no other."""
    assert len(detections) == len(objects)
    distances = np.abs(detections.boxes.numpy()[:, None] - np.asarray(objects)).max(2)
    nearest = distances.argmin(1)
    assert sorted(nearest) == list(range(len(objects)))
    assert distances.min(1).max() <= pixels
    assert detections.labels.tolist() == (nearest % 2).tolist()
    assert detections.category_ids.tolist() == [(5, 9)[label] for label in detections.labels]
    assert detections.scores.tolist() == sorted(detections.scores.tolist(), reverse=True)


@pytest.mark.parametrize("size", [(700, 500), (1001, 333), (129, 2000)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_each_object_is_found_once(size, batch_size):
    objects = scattered(*size, 60)
    model = BlobFinder()
    check(predict(model, paint(*size, objects), tile=128, batch_size=batch_size), objects)
    *batches, whole = model.input_shapes
    assert {shape[1:] for shape in batches} == {(3, 128, 128)}
    assert all(shape[0] == batch_size for shape in batches[:-1])
    assert whole[0] == 1


def test_without_tiles_or_without_the_merge_it_is_not_so(monkeypatch):
    objects = scattered(700, 500, 60)
    image = paint(700, 500, objects)
    assert len(predict(BlobFinder(), image)) < 40
    everything = lambda boxes, *_: [[index] for index in range(len(boxes))]  # noqa: E731
    monkeypatch.setattr(tiles, "merge_views", everything)
    assert len(predict(BlobFinder(), image, tile=128)) > 80


def test_more_than_a_thousand_objects_with_a_limit_per_tile():
    objects = scattered(1500, 1500, 1300, sides=(8, 16), cell=40)
    detections = predict(BlobFinder(), paint(1500, 1500, objects), tile=128, top_k=40)
    check(detections, objects)
    assert len(detections) == 1300


def test_the_limit_per_tile_is_named(caplog):
    objects = scattered(300, 300, 90)
    image = paint(300, 300, objects)
    predict(BlobFinder(), image, tile=128, top_k=80)
    assert not caplog.messages
    assert len(predict(BlobFinder(), image, tile=128, top_k=5)) < 90
    assert re.fullmatch(r"an image: 5 detections in \d+ tiles, the maximum; allow more with top_k", caplog.messages[0])


def test_a_large_object_comes_from_the_whole_image():
    objects = np.array([[20, 30, 600, 450], [640, 470, 655, 482]])
    check(predict(BlobFinder(), paint(500, 700, objects), tile=128), objects, pixels=6)


def test_images_of_one_tile_are_predicted_as_usual(tmp_path):
    images = [paint(*size, scattered(*size, 5, seed=3)) for size in ((128, 128), (90, 128), (60, 60))]
    for batch_size in (1, 3):
        usual, tiled = BlobFinder(), BlobFinder()
        expected = predict(usual, images, batch_size=batch_size)
        results = predict(tiled, images, batch_size=batch_size, tile=128)
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result.boxes, other.boxes)
            assert torch.equal(result.scores, other.scores)
        assert tiled.input_shapes == usual.input_shapes


def test_large_and_small_images_and_errors_keep_their_order(tmp_path):
    sizes = [(60, 60), (400, 300), (90, 60), (300, 400), (50, 70), (100, 60)]
    objects = [scattered(*size, 3, seed=seed) for seed, size in enumerate(sizes)]
    for number, (size, boxes) in enumerate(zip(sizes, objects, strict=True)):
        Image.fromarray(paint(*size, boxes)).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"no image")
    results = list(predict_each(BlobFinder(), tmp_path, batch_size=2, tiling=Tiling(128)))
    assert "2b.png" in str(results.pop(3))
    for detections, size, boxes in zip(results, sizes, objects, strict=True):
        assert detections.image_size == size
        check(detections, boxes)


def test_masks_are_those_of_the_whole_image():
    objects = [*scattered(300, 280, 10), np.array([310, 100, 395, 270])]  # the last one is cut everywhere
    image = paint(300, 400, objects)
    detections = predict(BlobFinder(masks=True), image, tile=128, tile_overlap=0.25)
    check(detections, objects, pixels=4)
    areas = torch.stack([torch.from_numpy((image == image[y1, x1]).all(2)) for x1, y1, x2, y2 in objects])
    for mask, box in zip(detections.masks, detections.boxes.tolist(), strict=True):
        index = np.abs(np.asarray(objects) - box).max(1).argmin()
        x1, y1, x2, y2 = objects[index]
        expected = torch.zeros(300, 400, dtype=torch.bool)
        expected[y1:y2, x1:x2] = areas[index][y1:y2, x1:x2]
        assert (mask & expected).sum() > 0.85 * (mask | expected).sum()
    assert torch.equal(decode_masks(detections.segmentations, (300, 400)), detections.masks)


def test_pieces_of_a_long_object_are_joined_with_their_masks():
    objects = [[30, 100, 400, 108]]  # too thin for the whole image at its usual size
    detections = predict(BlobFinder(masks=True), paint(600, 600, objects), tile=128)
    check(detections, objects)
    assert detections.masks[0].sum() == pytest.approx(370 * 8, rel=0.05)


def test_the_next_tiles_are_prepared_while_the_model_runs_and_errors_pass():
    class Failing(BlobFinder):
        def forward(self, pixels, padding_mask=None):
            raise RuntimeError("model")

    with pytest.raises(RuntimeError, match="model"):
        predict(Failing(), paint(300, 300, []), tile=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile 0: must be at least 32 pixels"),
        ({"tile": 128, "tile_overlap": 1.5}, "tile_overlap 1.5: must be from 0 to 0.9"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        predict_iter(BlobFinder(), [], **options)
    assert check_tiling(None, 0.2) is None


def test_the_overview_of_a_large_file_equals_the_resized_image():
    from deformable_detr.config.image_size import ShortestEdge
    from deformable_detr.data.transforms import resize

    image = torch.from_numpy(paint(1130, 1517, scattered(1130, 1517, 300))).permute(2, 0, 1).contiguous()
    for overlap in (0, 0.2):
        rule = ShortestEdge(90, 200)
        windows = tiles.TiledImage(image, Tiling(300, overlap), rule).windows
        overview = tiles.Overview(windows, rule)
        for window in windows[:-1]:
            top, left, height, width = window
            overview.add(window, image[:, top : top + height, left : left + width])
        expected, result = resize(image, rule).float(), overview.image().float()
        assert result.shape == expected.shape
        assert (result - expected).abs().mean() < 1.5
        assert (result - expected).abs().max() < 40
