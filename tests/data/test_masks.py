"""Masks of targets: drawn once after the augmentation, they equal full-size masks that are augmented as pixels."""

import json
from dataclasses import replace

import hotcoco
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from deformable_detr.config.image_size import FixedSize, ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data import masks
from deformable_detr.data.dataloader import LoaderOptions, build_dataloader
from deformable_detr.data.dataset import open_dataset
from deformable_detr.data.masks import MaskTable, OutlinedTarget
from deformable_detr.data.mosaic import MosaicDataset
from deformable_detr.data.segmentation import read_segmentation, run_lengths
from deformable_detr.data.source import AnnotationCache
from deformable_detr.data.transforms import EvalTransform, FixedSizeTrainTransform, TrainTransform

HEIGHT, WIDTH = 150, 200
NO_JITTER = {"color_jitter_prob": 0.0}


def star(random, center, radius, points=14):
    """Return a polygon [x, y, …] with corners at random distances from its center."""
    angles = np.sort(random.uniform(0, 2 * np.pi, points))
    radii = random.uniform(0.5, 1, points) * radius
    return np.column_stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)]).reshape(-1)


def segmentations(random):
    """Return a polygon, two polygons, and a ring as run lengths."""
    one = [star(random, (60, 50), 35).tolist()]
    two = [star(random, (150, 40), 28).tolist(), star(random, (130, 110), 24).tolist()]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(x - 90, y - 95)
    ring = np.asfortranarray((distance < 45) & (distance > 20), dtype=np.uint8)
    return [one, two, {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(ring)["counts"].decode()}]


def decode(segmentation):
    """Return the mask that pycocotools draws, (H, W) bool."""
    rle = coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH) if isinstance(segmentation, list) else segmentation
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Write a dataset whose images show the mask of their objects 1, 2 and 3 in red, green and blue."""
    root = tmp_path_factory.mktemp("masked") / "train"
    root.mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 5):
        shapes = segmentations(random)
        Image.fromarray(np.stack([decode(shape) for shape in shapes], axis=2).astype(np.uint8) * 255).save(
            root / f"{number}.png"
        )
        images.append({"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
        for label, shape in enumerate(shapes, start=1):
            record = {"image_id": number, "category_id": label, "bbox": box_of(decode(shape)), "segmentation": shape}
            annotations.append(record | {"id": len(annotations) + 1, "iscrowd": 0, "area": int(decode(shape).sum())})
    categories = [{"id": number, "name": color} for number, color in enumerate(("red", "green", "blue"), start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "_annotations.coco.json").write_text(json.dumps(content))
    return root.parent


def paste(target, index, size):
    """Return the mask of an object in an image of `size`: the grid, resampled to the box."""
    height, width = size
    cx, cy, w, h = target.boxes[index].tolist()
    x = ((torch.arange(width) + 0.5) / width - cx) / w * 2
    y = ((torch.arange(height) + 0.5) / height - cy) / h * 2
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    coverage = target.masks[index][None, None].float() / 255
    values = F.grid_sample(coverage, grid[None], padding_mode="border", align_corners=False)[0, 0]
    return (values >= 0.5) & (x.abs() <= 1) & (y[:, None].abs() <= 1)


def ious(image, target):
    """Return the IoU of each object with the pixels of its color inside its box."""
    found = []
    height, width = image.shape[-2:]
    for index, label in enumerate(target.labels.tolist()):
        mask = paste(target, index, (height, width))
        x0, y0, x1, y1 = (
            round(value * side)
            for value, side in zip(
                torch.cat([target.boxes[index, :2] - target.boxes[index, 2:] / 2,
                           target.boxes[index, :2] + target.boxes[index, 2:] / 2]).tolist(),
                (width, height) * 2, strict=True,
            )
        )  # fmt: skip
        pixels = torch.zeros(height, width, dtype=torch.bool)
        pixels[y0:y1, x0:x1] = image[label, y0:y1, x0:x1] > 127
        if pixels.sum() > 150:
            found.append(float((mask & pixels).sum() / (mask | pixels).sum()))
    return found


SHORTEST, FIXED = ShortestEdge(180, 300), FixedSize(170, 190)
TRANSFORMS = {
    "none": None,
    "flip": TrainTransform(SHORTEST, DataConfig(hflip_prob=1, crop_prob=0, **NO_JITTER)),
    "crop": TrainTransform(SHORTEST, DataConfig(hflip_prob=0.5, crop_prob=1, **NO_JITTER)),
    "zoom_out": FixedSizeTrainTransform(
        FIXED, DataConfig(zoom_out_prob=1, crop_prob=0, hflip_prob=0.5, **NO_JITTER)
    ),
    "iou_crop": FixedSizeTrainTransform(FIXED, DataConfig(zoom_out_prob=0.5, crop_prob=1, **NO_JITTER)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TRANSFORMS, "mosaic"])
def test_masks_equal_augmented_pixels(masked, name):
    dataset = open_dataset(masked, transform=TRANSFORMS.get(name, TRANSFORMS["iou_crop"]), masks=True)
    samples = MosaicDataset(dataset, 1.0) if name == "mosaic" else dataset
    found, mirrored = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = samples[(seed % 4, True) if name == "mosaic" else seed % 4]
        assert target.has_mask.all()
        found += ious(image, target)
        mirrored += ious(image, replace(target, masks=target.masks.flip(-1)))
    assert len(found) > 15
    assert np.mean(found) > 0.97, (np.mean(found), min(found))
    assert min(found) > 0.9
    assert np.mean(mirrored) < 0.85, "control: mirrored masks"


@pytest.mark.parametrize("name", [*TRANSFORMS, "mosaic"])
def test_masks_change_no_image_and_no_box(masked, name):
    transform = TRANSFORMS.get(name, TRANSFORMS["crop"])
    pair = [open_dataset(masked, transform=transform, masks=masks) for masks in (False, True)]
    if name == "mosaic":
        pair = [MosaicDataset(dataset, 1.0) for dataset in pair]
    for seed in range(6):
        samples = []
        for dataset in pair:
            torch.manual_seed(seed)
            samples.append(dataset[(seed % 4, True) if name == "mosaic" else seed % 4])
        (plain_image, plain), (image, target) = samples
        assert torch.equal(plain_image, image)
        assert torch.equal(plain.boxes, target.boxes)
        assert torch.equal(plain.labels, target.labels)
        assert plain.masks is None
        assert plain.has_mask is None
        assert type(target) is type(plain)
        assert target.masks.shape == (len(target.labels), masks.MASK_SIZE, masks.MASK_SIZE)
        assert target.masks.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_masks(masked, workers):
    dataset = open_dataset(masked, transform=TRANSFORMS["crop"], masks=True)
    loader = build_dataloader(dataset, LoaderOptions(3, num_workers=workers))
    targets = [target for _, batch in loader for target in batch]
    assert [target.masks.shape[:1] for target in targets] == [target.boxes.shape[:1] for target in targets]
    assert all(target.has_mask.dtype == torch.bool for target in targets)
    loader.sampler.set_epoch(0)
    again = [target for _, batch in build_dataloader(dataset, LoaderOptions(3)) for target in batch]
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(targets, again, strict=True))


def test_evaluation_draws_no_masks(masked, monkeypatch):
    monkeypatch.setattr(OutlinedTarget, "rasterize", lambda *_: pytest.fail("drawn"))
    _, target = open_dataset(masked, transform=EvalTransform(SHORTEST), masks=True)[0]
    assert target.masks is None
    with pytest.raises(pytest.fail.Exception):
        open_dataset(masked, masks=True)[0]


def test_ground_truth_has_segmentations_as_in_the_file(masked):
    raw = json.loads((masked / "train/_annotations.coco.json").read_text())
    truth = open_dataset(masked, masks=True).ground_truth
    for record, annotation in zip(raw["annotations"], truth["annotations"], strict=True):
        if isinstance(record["segmentation"], dict):
            assert annotation["segmentation"] == record["segmentation"]
        else:
            assert [part.tolist() for part in annotation["segmentation"]] == record["segmentation"]
            assert all(part.dtype == np.float64 for part in annotation["segmentation"])
    assert not any("segmentation" in record for record in open_dataset(masked).ground_truth["annotations"])
    with pytest.raises(ValueError, match="masks=True"):
        open_dataset(masked, cache=AnnotationCache(), masks=True)


def test_boxes_without_a_mask_and_crowds(masked, tmp_path):
    content = json.loads((masked / "train/_annotations.coco.json").read_text())
    first, second, third = content["annotations"][:3]
    del first["segmentation"]
    second["segmentation"] = []
    counts = run_lengths(third["segmentation"]["counts"]).tolist()
    third |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
    content["annotations"][3]["segmentation"][0] = [1, 2, 3, 4]  # one polygon of two points
    del content["annotations"][4]["bbox"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    for path in (masked / "train").glob("*.png"):
        (tmp_path / path.name).hardlink_to(path)
    dataset = open_dataset(tmp_path / "train.json", masks=True)
    target, other = dataset[0][1], dataset[1][1]
    assert target.labels.tolist() == [0, 1], "no crowd"
    assert target.has_mask.tolist() == [False, False]
    assert not target.masks.any()
    assert other.has_mask.tolist() == [False, True, True]
    wanted = other.boxes[1] * torch.tensor([WIDTH, HEIGHT] * 2)
    x, y, w, h = box_of(decode(content["annotations"][4]["segmentation"]))
    assert wanted.tolist() == pytest.approx([x + w / 2, y + h / 2, w, h], abs=1), "the box of the mask"
    crowd = dataset.ground_truth["annotations"][2]["segmentation"]
    assert (
        crowd["counts"]
        == json.loads((masked / "train/_annotations.coco.json").read_text())["annotations"][2]["segmentation"]["counts"]
    ), "compressed"


def test_run_lengths():
    random = np.random.default_rng(1)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray(random.random((37, 300)) < share, dtype=np.uint8)
        mask[:, 100:200] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        lengths = run_lengths(counts)
        assert np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(300, 37).T.tolist() == mask.tolist()
        rle, reason = read_segmentation({"size": [37, 300], "counts": lengths.tolist()})
        assert (rle["counts"], reason) == (counts, "")
        assert hotcoco.mask.area({"size": [37, 300], "counts": counts.encode()}) == mask.sum()


@pytest.mark.parametrize(
    ("value", "usable", "word"),
    [
        (None, 0, ""), ([], 0, ""),
        ([[0, 0, 9, 0, 9, 9]], 1, ""),
        ([[0, 0, 9, 0, 9, 9], [1, 2]], 1, "1 of 2"),
        ([[0, 0, 9, 0, 9]], 0, "1 of 1"),
        ([[0, 0, 9, 0, "9", 9]], 0, "1 of 1"),
        ([[0, 0, 9, 0, float("nan"), 9]], 0, "1 of 1"),
        ([0, 0, 9, 0, 9, 9], 0, "6 of 6"),
        ("polygon", 0, "neither"),
        ({"size": [3, 4], "counts": [12]}, 1, ""),
        ({"size": [3, 4], "counts": [11]}, 0, "run-length"),
        ({"size": [3, 4], "counts": [-1, 13]}, 0, "run-length"),
        ({"size": [3, 4], "counts": "zzz"}, 0, "run-length"),
        ({"size": [3, 4], "counts": "größe"}, 0, "run-length"),
        ({"size": [3], "counts": [3]}, 0, "run-length"),
        ({"counts": [3]}, 0, "run-length"),
        ({"size": [10**12, 10**12], "counts": [10**24]}, 0, "run-length"),
    ],
)  # fmt: skip
def test_read_segmentation(value, usable, word):
    segmentation, reason = read_segmentation(value)
    assert (segmentation is not None) == bool(usable)
    assert (word in reason) if word else not reason


def test_table_returns_what_it_was_given():
    polygons = [np.array([0.0, 0, 9, 0, 9, 9.5]), np.array([1.0, 1, 2, 2, 3, 1, 0, 0])]
    rle = read_segmentation({"size": [3, 4], "counts": [5, 7]})[0]
    given = [polygons, None, rle, polygons[:1], None, rle]
    table = MaskTable(given)
    assert len(table) == 6
    for index, segmentation in enumerate(given):
        found = table[index]
        if isinstance(segmentation, list):
            assert [part.tolist() for part in found] == [part.tolist() for part in segmentation]
            assert found[0].dtype == np.float32
        else:
            assert found == segmentation
    assert len(MaskTable([])) == 0
