"""Mosaic augmentation: image, boxes and probability."""

import torch

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.data.dataloader import LoaderOptions, build_dataloader
from deformable_detr.data.mosaic import MosaicDataset, mosaic
from deformable_detr.data.transforms import TrainTransform
from tests.support.plain_images import PlainImages, target


def test_mosaic_contains_four_images_and_their_objects():
    tiles = [torch.full((3, 40 + 10 * n, 60), 50 * n, dtype=torch.uint8) for n in range(4)]
    samples = [(image, target([0.5, 0.5, 1.0, 1.0])) for image in tiles]
    image, merged = mosaic(samples, (100, 120), [0.5, 0.5])
    assert image.shape == (3, 100, 120)
    assert len(merged.labels) == 4
    for number, (cx, cy, w, h) in enumerate(merged.boxes.tolist()):
        x, y = round((cx - w / 2) * 120), round((cy - h / 2) * 100)
        part = image[:, y : y + round(h * 100), x : x + round(w * 120)]
        assert (part == 50 * number).all(), "each box covers its tile"
        below, right = divmod(number, 2)
        assert (y >= 50) == bool(below)
        assert (x >= 60) == bool(right)
    assert ((merged.boxes[:, :2] - merged.boxes[:, 2:] / 2) >= -1e-6).all()


def test_mosaic_probability():
    data = PlainImages(20)
    mosaic_dataset = MosaicDataset(data, 1.0)
    torch.manual_seed(1)
    plain, mixed = mosaic_dataset[3], mosaic_dataset[3, True]
    assert torch.equal(plain[0], data[3][0])
    assert mixed[0].shape == plain[0].shape
    assert len(mixed[1].labels) == 4
    assert mixed[1].image_id == plain[1].image_id
    assert torch.equal(mosaic_dataset[3, True][0], mixed[0]), "reproducible from the seed"
    torch.manual_seed(2)
    assert not torch.equal(mosaic_dataset[3, True][0], mixed[0])
    assert len(MosaicDataset(data, 0.0)[3, True][1].labels) == 1


def test_mosaic_keeps_sample_sizes():
    data = PlainImages(24, transform=TrainTransform(ShortestEdge(64, 128)))
    for mosaics in (False, True):
        batches = build_dataloader(MosaicDataset(data, 0.5), LoaderOptions(1, shuffle=True, aspect_ratio_grouping=True))
        batches.sampler.set_epoch(1, mosaic=mosaics)
        sizes = [batches.sampler.sample_size(keys[0]) for keys in batches.sampler]
        assert [images.pixels.shape[-2:] for images, _ in batches] == sizes
