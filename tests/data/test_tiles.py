"""Training on tiles: which views an epoch shows, and which objects they have."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data import dataset as dataset_module
from deformable_detr.data.dataloader import LoaderOptions, build_dataloader
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.mosaic import MosaicDataset
from deformable_detr.data.tiles import MIN_AREA, TiledDataset
from deformable_detr.data.transforms import TrainTransform
from deformable_detr.utils.tiles import tile_grid

RULE, TILE = ShortestEdge(64, 107), 64
SIDE = 12  # of most objects in pixels
# size (height, width) → xywh of the objects: one at a corner of tiles, in the middle, at a border, and none
IMAGES = {
    (200, 300): [(52, 50, SIDE, SIDE), (150, 120, SIDE, SIDE), (288, 60, SIDE, SIDE)],
    (64, 50): [(10, 20, SIDE, SIDE)],
    (40, 400): [(100, 10, 150, 20), (390, 0, SIDE, SIDE)],
    (256, 256): [],
    (30, 30): [],
}


def write_images(root, images=None, declared=None, masks=False):
    """Write black images, in which object n has the gray level 10 · (n + 1)."""
    folder = root / "train"
    folder.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for number, ((height, width), boxes) in enumerate((images or IMAGES).items()):
        pixels = np.zeros((height, width), dtype=np.uint8)
        for x, y, w, h in boxes:
            count = len(content["annotations"])
            pixels[y : y + h, x : x + w] = 10 * (count + 1)
            record = {"id": count, "image_id": number, "category_id": 1 + (count == 0), "bbox": [x, y, w, h]}
            if masks:
                record["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
            content["annotations"].append({**record, "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        h, w = (declared or {}).get((height, width), (height, width))
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": h, "width": w})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def tiled(root, share=0.0, masks=False, transform=None, tile=TILE):
    return TiledDataset(open_dataset(root, masks=masks, transform=transform), tile, share, RULE)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("set"))


def always(samples):
    """Return the views of every epoch."""
    return np.flatnonzero(samples.sampling().frequencies == 1).tolist()


def objects(image, target):
    """Return the gray level → (x0, y0, x1, y1) of the target's boxes; the label must fit the level."""
    height, width = image.shape[-2:]
    boxes = {}
    for label, (cx, cy, w, h) in zip(target.labels.tolist(), target.boxes.tolist(), strict=True):
        x, y = int(cx * width), int(cy * height)
        level = int(image[0, y, x])
        assert label == (level == 10)
        box = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        boxes[level] = [round(value, 3) for value in box]
    return boxes


def visible(image):
    """Return the gray level → its extent in the pixels, and its number of pixels."""
    extents = {}
    for level in set(image[0].unique().tolist()) - {0}:
        rows, columns = torch.where(image[0] == level)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        extents[level] = [float(value) for value in box], len(rows)
    return extents


def areas(images=None):
    boxes = [box for group in (images or IMAGES).values() for box in group]
    return {10 * (number + 1): w * h for number, (_, _, w, h) in enumerate(boxes)}


def test_targets_fit_the_pixels_of_their_tile(root):
    samples, full = tiled(root), areas()
    shown, places, with_objects = set(), set(), set(always(samples))
    for seed in range(30):
        torch.manual_seed(seed)
        for view in np.flatnonzero(samples.sizes.max(1) == TILE).tolist():
            image, target = samples.load(view)
            extents, boxes = visible(image), objects(image, target)
            assert tuple(image.shape[-2:]) == tuple(samples.sizes[view])
            assert boxes.keys() == {level for level, (_, area) in extents.items() if area >= MIN_AREA * full[level]}
            assert all(boxes[level] == extents[level][0] for level in boxes)
            assert boxes or view not in with_objects, "one object stays in the tile"
            shown |= boxes.keys()
            places.add((view, str(extents)))
    assert shown == set(full), "every object is in a tile"
    assert len(places) > 100, "tiles are at another place each time"


def test_a_shifted_tile_keeps_one_of_its_objects(tmp_path):
    """The object reaches two pixels into the second tile, which is shifted by up to six pixels."""
    left = tile_grid(TILE, 300, TILE)[1].left
    samples = tiled(write_images(tmp_path, {(TILE, 300): [(left + TILE - 2, 20, SIDE, SIDE)]}))
    lefts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = samples[2]  # after the whole image and the first tile
        assert len(target.labels) == 1
        lefts.add(int(image[0].max(0).values.argmax()))
    assert min(lefts) < TILE - 4
    assert max(lefts) == TILE - 2


def test_views_of_an_epoch(root):
    samples = tiled(root)
    sizes, shown = [tuple(size) for size in samples.sizes.tolist()], always(samples)
    tiles = sum(len(tile_grid(*size, TILE)) for size in ((200, 300), (40, 400), (256, 256)))
    assert len(sizes) == len(IMAGES) + tiles
    # Small images, and the large one with an object that is not tiny as a whole.
    assert sorted(sizes[view] for view in shown if sizes[view] in IMAGES) == [(30, 30), (40, 400), (64, 50)]
    assert {sizes[view] for view in shown} - set(IMAGES) == {(64, 64), (40, 64)}
    for view in range(len(sizes)):
        has_objects = len(samples.load(view)[1].labels) > 0
        assert has_objects or view not in shown or sizes[view] == (30, 30)
    assert sorted(samples.sampling().draw(0, 0)[0].tolist()) == shown


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 0.99])
def test_share_of_empty_tiles(root, share):
    samples, shown = tiled(root, share), always(tiled(root))
    base, empty = len(shown), len(samples) - len(shown)
    drawn = len(samples.sampling()) - base
    assert drawn == min(empty, round(base * share / (1 - share)))
    epochs = [set(samples.sampling().draw(0, epoch)[0].tolist()) for epoch in range(40)]
    assert all(set(shown) <= epoch for epoch in epochs)
    if share:
        assert len(set.union(*epochs)) == len(samples), "in the end, all empty tiles are shown"


def test_large_images_as_a_whole_leave_tiny_objects_to_tiles(root):
    samples = tiled(root)
    whole = {size: samples.load(samples.sizes.tolist().index(list(size))) for size in IMAGES}
    assert len(whole[200, 300][1].labels) == 0, "12 pixels at 64 / 200 of their size are 3.8"
    assert list(objects(*whole[40, 400])) == [50], "150 × 20 pixels at 107 / 400 of their size are 40 × 5"
    assert len(whole[64, 50][1].labels) == 1, "small images keep all"


def test_an_image_is_decoded_once_for_tiles_that_follow_each_other(root, monkeypatch):
    reads, read_image = [], dataset_module.read_image
    monkeypatch.setattr(dataset_module, "read_image", lambda path: reads.append(path) or read_image(path))
    samples = tiled(root, 0.5)
    options = LoaderOptions(8, shuffle=True, sampling=samples.sampling())
    list(build_dataloader(samples, options))
    assert len(reads) < 0.6 * len(samples.sampling())
    reads.clear()
    ordered = LoaderOptions(8, shuffle=True, total_batch_size=2, sampling=samples.sampling())
    list(build_dataloader(samples, ordered))
    assert len(reads) > 0.6 * len(samples.sampling()), "a small step shows two images"


def test_batches_do_not_depend_on_workers_and_repeat(root):
    transform = TrainTransform(RULE, DataConfig())
    samples = tiled(root, 0.3, transform=transform)

    def batches(workers, epoch):
        loader = build_dataloader(samples, LoaderOptions(4, workers, shuffle=True, sampling=samples.sampling()))
        loader.sampler.set_epoch(epoch)
        return [(images.pixels, [target.boxes for target in targets]) for images, targets in loader]

    def same(first, second):
        return all(
            a[0].shape == b[0].shape and torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1]))
            for a, b in zip(first, second, strict=True)
        )

    first = batches(0, 1)
    assert same(first, batches(2, 1))
    assert not same(first, batches(0, 2))


def test_masks_follow_their_tile(tmp_path):
    root = write_images(tmp_path, {(200, 300): [(40, 40, 40, 40)]}, masks=True)
    samples = tiled(root, masks=True)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        for view in always(samples):
            image, target = samples[view]
            if image.shape[-1] != TILE:
                continue
            # The triangle is right of the diagonal: y − 40 < x − 40. The tile's place follows from the visible square.
            [(x0, y0, x1, y1)] = objects(image, target).values()
            left = 40 - x0 if x0 > 0 else 80 - x1
            top = 40 - y0 if y0 > 0 else 80 - y1
            cells = (np.arange(112) + 0.5) / 112
            x, y = left + x0 + cells * (x1 - x0), top + y0 + cells[:, None] * (y1 - y0)
            expected, distance = x > y, np.abs(x - y)
            mask = target.masks[0].numpy() > 127
            assert (mask == expected)[distance > 1].all()
            seen.add((x1 - x0, y1 - y0))
    assert len(seen) > 5


def test_rare_classes_repeat_their_tiles(tmp_path):
    root = write_images(
        tmp_path, {(200, 300): [(20, 20, 9, 9)], (300, 300): [(x, 150, 9, 9) for x in range(0, 280, 14)]}
    )
    samples = tiled(root, 0.2)
    rare = {view for view in always(samples) if 1 in samples.load(view)[1].labels.tolist()}
    sampling = samples.sampling(0.5)
    total = samples.sampling().frequencies.sum()
    expected = (0.5 / (len(rare) / total)) ** 0.5
    np.testing.assert_allclose(sampling.frequencies[list(rare)], expected)
    others = [view for view in always(samples) if view not in rare]
    np.testing.assert_array_equal(sampling.frequencies[others], 1)


def test_record_with_another_size_than_the_file(tmp_path):
    root = write_images(tmp_path, declared={(200, 300): (300, 200), (64, 50): (500, 500)})
    samples = tiled(root)
    for view in range(len(samples)):
        image, target = samples.load(view)
        boxes = objects(image, target)
        assert boxes == {level: visible(image)[level][0] for level in boxes}


def test_size_that_no_record_has_is_read_from_the_file(root, tmp_path):
    write_images(tmp_path)
    path = tmp_path / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    path.write_text(json.dumps(content))
    assert tiled(tmp_path).sizes.tolist() == tiled(root).sizes.tolist()


def test_mosaics_are_of_shown_tiles(root):
    samples = tiled(root, 0.1)
    mosaics = MosaicDataset(samples, 1.0)
    for view in always(samples):
        image, target = mosaics[view, True]
        assert image.shape[-2:] == tuple(samples.sizes[view])
        assert len(target.labels) >= 2


def test_workers_do_not_receive_the_decoded_image(root):
    samples = tiled(root)
    samples.load(1)
    assert len(pickle.dumps(samples)) < 20_000
