"""Transforms: every box is compared with the pixels of a rectangle drawn into the image."""

import pytest
import torch

from deformable_detr.config.image_size import FixedSize, ShortestEdge
from deformable_detr.config.schema import DataConfig
from deformable_detr.data import transforms
from deformable_detr.structures import Target
from tests.support.plain_images import target

SIZES = [(100, 160), (160, 100), (97, 97), (61, 203)]


def scene(height, width, left=30, top=20, right=55, bottom=48):
    """Return a black image with a bright rectangle, and its target."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 255
    box = torch.tensor([[(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]])
    boxes = box / torch.tensor([width, height, width, height])
    return image, Target(torch.tensor([3]), boxes, image_id=5, original_size=(height, width))


def bright_bounds(image):
    """Return (left, top, right, bottom) of the bright pixels."""
    rows, columns = (image.float().mean(0) > 127).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def corners(image, target):
    height, width = image.shape[-2:]
    cx, cy, w, h = (target.boxes[0] * torch.tensor([width, height, width, height])).tolist()
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def matches_pixels(image, target, within):
    return max(abs(a - b) for a, b in zip(bright_bounds(image), corners(image, target), strict=True)) <= within


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_flip(height, width):
    image, target = scene(height, width)
    flipped, new_target = transforms.hflip(image, target)
    assert matches_pixels(flipped, new_target, 1e-3)
    assert not matches_pixels(flipped, target, 1), "control: the original box does not match"
    back, restored = transforms.hflip(flipped, new_target)
    assert torch.equal(back, image)
    torch.testing.assert_close(restored.boxes, target.boxes)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    "window", [(0, 0, 60, 60), (10, 20, 50, 40), (30, 40, 20, 40), (0, 0, 30, 40)], ids=["all", "in", "part", "corner"]
)
def test_crop(height, width, window):
    image, target = scene(height, width)
    cropped, new_target = transforms.crop(image, target, *window)
    assert cropped.shape == (3, window[2], window[3])
    assert matches_pixels(cropped, new_target, 1e-3)
    assert new_target.labels.tolist() == [3]
    assert (new_target.boxes >= 0).all()
    assert (new_target.boxes <= 1).all()


def test_crop_drops_objects_outside():
    image, target = scene(100, 160)
    for window in [(48, 0, 52, 160), (0, 55, 100, 50), (60, 80, 20, 20)]:
        cropped, new_target = transforms.crop(image, target, *window)
        assert not cropped.any()
        assert new_target.boxes.shape == (0, 4)
        assert new_target.labels.shape == (0,)
    # Kept if one more row or column is inside.
    for window in [(47, 0, 52, 160), (0, 54, 100, 50)]:
        cropped, new_target = transforms.crop(image, target, *window)
        assert matches_pixels(cropped, new_target, 1e-3)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("image_size", [50, 128, 200])
def test_resize_keeps_relative_boxes(height, width, image_size):
    image, target = transforms.EvalTransform(ShortestEdge(image_size, 400))(*scene(height, width))
    assert image.dtype == torch.uint8
    assert matches_pixels(image, target, 1.0)
    assert matches_pixels(*transforms.hflip(image, target), 1.0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # rounded down, as in the published evaluation
        ((640, 480), (1066, 800)),
        ((426, 640), (800, 1201)),
        ((300, 640), (625, 1333)),
        ((1333, 800), (1333, 800)),
        ((800, 1334), (799, 1332)),
        ((500, 500), (800, 800)),
        ((1, 9000), (1, 1333)),
        ((9000, 1), (1333, 1)),
        ((1, 1), (800, 800)),
    ],
)
def test_resized_size(size, expected):
    assert ShortestEdge(800, 1333)(*size) == expected
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert transforms.resize(image, ShortestEdge(800, 1333)).shape == (3, *expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((336, 448), (256, 352)), ((448, 252), (416, 256)), ((100, 9000), (32, 416)), ((3, 3), (256, 256))],
)
def test_size_divisor(size, expected):
    assert ShortestEdge(256, 427, 32)(*size) == expected
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert transforms.resize(image, ShortestEdge(256, 427, 32)).shape == (3, *expected)
    target = scene(100, 160)[1]
    assert transforms.EvalTransform(ShortestEdge(256, 427, 32))(image, target)[0].shape == (3, *expected)
    assert transforms.EvalTransform(ShortestEdge(256, 427))(image, target)[0].shape != (3, *expected) or size == (3, 3)


def test_size_divisor_in_training():
    transform = transforms.TrainTransform(ShortestEdge(200, 333, 32))
    for seed in range(40):
        torch.manual_seed(seed)
        image, _ = transform(*scene(*SIZES[seed % len(SIZES)]))
        assert image.shape[1] % 32 == 0
        assert image.shape[2] % 32 == 0
        torch.manual_seed(seed)
        assert transform.final_size(*SIZES[seed % len(SIZES)]) == tuple(image.shape[1:])


def test_resize_is_antialiased():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::4] = 255  # a quarter of the columns
    small = transforms.resize(stripes, ShortestEdge(16, 16)).float()
    assert ((small - 255 / 4).abs() < 24).all(), "thin stripes must turn gray"
    plain = torch.nn.functional.interpolate(stripes[None].float(), scale_factor=0.25, mode="bilinear")
    assert not plain.any(), "control: lost without antialiasing"


def test_training_boxes_match_the_pixels():
    transform = transforms.TrainTransform(ShortestEdge(200, 333))
    torch.manual_seed(0)
    seen, dropped, sizes = 0, 0, set()
    for number in range(300):
        height, width = SIZES[number % len(SIZES)]
        image, target = transform(*scene(height, width))
        short, long = sorted(image.shape[-2:])
        assert long <= 333
        assert short <= 200
        sizes.add(short)
        if len(target.boxes):
            seen += 1
            size = torch.tensor(image.shape[-2:][::-1])
            if (target.boxes[0, 2:] * size).min() > 4:  # thinner ones fade when resized
                assert matches_pixels(image, target, 3.0)
        else:
            dropped += 1
            assert image.float().mean(0).max() < 250
        assert target.image_id == 5
        assert target.original_size == (height, width)
    assert seen > 200
    assert dropped > 5
    assert set(range(120, 201, 8)) <= sizes, "all 11 short sides"


def test_training_without_augmentation_is_a_resize():
    data = DataConfig(train_scales=(1.0, 1.0), hflip_prob=0.0, crop_prob=0.0)
    image, target = scene(100, 160)
    trained, same = transforms.TrainTransform(ShortestEdge(80, 200), data=data)(image, target)
    assert torch.equal(trained, transforms.resize(image, ShortestEdge(80, 200)))
    assert torch.equal(same.boxes, target.boxes)
    certain = transforms.TrainTransform(ShortestEdge(80, 200), data=data.replace(hflip_prob=1.0))(image, target)
    assert torch.equal(certain[0], transforms.resize(image.flip(2), ShortestEdge(80, 200)))


def test_crop_sizes_match_the_paper():
    data = DataConfig(train_scales=(1.0, 1.0), hflip_prob=0.0, crop_prob=1.0)
    transform = transforms.TrainTransform(ShortestEdge(800, 10_000), data=data)
    torch.manual_seed(1)
    ratios = []
    for _ in range(40):
        image, _ = transform(*scene(61, 203))
        ratios.append(image.shape[2] / image.shape[1])
    # Sides from 384 to 600 limit the aspect ratio to 600 : 384, while the image has 3.3 : 1.
    assert max(ratios) <= 600 / 384 + 0.01
    assert min(ratios) >= 384 / 600 - 0.01


def test_transforms_are_seeded_and_not_in_place():
    image, target = scene(100, 160)
    before, boxes = image.clone(), target.boxes.clone()
    transform = transforms.TrainTransform(ShortestEdge(96, 160))
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append([transform(image, target) for _ in range(5)])
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1].boxes, b[1].boxes) for a, b in zip(*results[:2], strict=True)
    )
    assert any(a[0].shape != b[0].shape for a, b in zip(results[0], results[2], strict=True))
    assert torch.equal(image, before)
    assert torch.equal(target.boxes, boxes)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_images_of_one_pixel(size):
    transform = transforms.TrainTransform(ShortestEdge(64, 100), data=DataConfig(crop_prob=1.0))
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = transform(
            torch.zeros(3, *size, dtype=torch.uint8),
            Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 1.0, 1.0]]), 1, size),
        )
        assert max(image.shape[-2:]) <= 100
        assert torch.allclose(target.boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


def test_min_visibility_of_crops():
    centered = target([0.5, 0.5, 0.2, 0.2])  # 40..60 of 100
    corner = target([0.25, 0.25, 0.3, 0.3])
    assert transforms.lowest_visibility(centered, (40, 40, 20, 20), 100, 100) == pytest.approx(1.0)
    assert transforms.lowest_visibility(centered, (50, 40, 50, 50), 100, 100) == pytest.approx(0.5)
    assert transforms.lowest_visibility(centered, (70, 70, 20, 20), 100, 100) == 1.0
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    areas = {}
    for min_visibility in (0.0, 0.7):
        torch.manual_seed(0)
        data = DataConfig(crop_prob=1.0, hflip_prob=0.0, min_visibility=min_visibility)
        crops = transforms.TrainTransform(ShortestEdge(100, 200), data=data)
        cut = []
        for _ in range(60):
            sampled = crops.sample(100, 100)
            part = crops._visible_window(sampled.crop_window, corner, sampled.crop_short_side, sampled.crop_short_side)
            cut.append(
                transforms.lowest_visibility(corner, part, sampled.crop_short_side, sampled.crop_short_side) < 0.7
            )
        areas[min_visibility] = sum(cut)
        assert crops(image, corner)[0].shape[0] == 3
    assert areas[0.7] < areas[0.0] / 4


@pytest.mark.parametrize("name", ["zoom_out", "iou_crop"])
def test_ssd_augmentations(name):
    shapes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = scene(97, 160)
        image, target = getattr(transforms, name)(image, target)
        shapes.add(image.shape)
        assert image.dtype == torch.uint8
        if len(target.labels):
            assert target.labels.tolist() == [3]
            assert matches_pixels(image, target, 1.0)
    assert len(shapes) > 10, "control: images do change"
    assert all((height >= 97) == (name == "zoom_out") or height == 97 for _, height, _ in shapes)
    empty = target.empty(5, (97, 160))
    assert len(getattr(transforms, name)(scene(97, 160)[0], empty)[1].labels) == 0


def test_fixed_size_training():
    data = DataConfig(zoom_out_prob=0.5, crop_prob=0.5, color_jitter_prob=0.5)
    transform = transforms.train_transform(FixedSize(96, 128), data)
    flips = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = transform(*scene(61, 203, 20, 10, 90, 50))
        assert image.shape == (3, 96, 128) == (3, *transform.final_size(61, 203))
        if len(target.labels):
            assert matches_pixels(image, target, 3.0)
            flips.add(bool(target.boxes[0, 0] > 0.5))
    assert flips == {True, False}
    plain = DataConfig(crop_prob=0.0, hflip_prob=0.0)
    image, target = scene(61, 203)
    same = transforms.train_transform(FixedSize(96, 128), plain)(image, target)
    assert torch.equal(same[0], transforms.EvalTransform(FixedSize(96, 128))(image, target)[0])
    assert isinstance(transforms.train_transform(ShortestEdge(96, 128), plain), transforms.TrainTransform)
