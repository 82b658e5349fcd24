"""Batches of several sizes: which sizes, drawn from the step alone, and where objects end up."""

import json
import subprocess
import sys

import pytest
import torch

from deformable_detr.config.detector import DetectorConfig
from deformable_detr.data.multi_scale import MultiScaleBatches
from deformable_detr.structures import ImageBatch

CODE = """
import json
from deformable_detr.config.detector import DetectorConfig
from deformable_detr.data.multi_scale import MultiScaleBatches
scales = MultiScaleBatches.from_config(DetectorConfig(resize="fixed", image_size=640, size_divisor=32), (0.75, 1.25), 3)
print(json.dumps([scales.size(step) for step in range(20)]))
"""


def batches(size=640, divisor=32, scales=(0.75, 1.25), seed=3, **model):
    config = DetectorConfig(resize="fixed", image_size=size, size_divisor=divisor, **model)
    multi_scale = MultiScaleBatches.from_config(config, scales, seed)
    assert multi_scale is not None
    return multi_scale


def sides(multi_scale):
    assert all(height == width for height, width in multi_scale.sizes)
    return [height for height, _ in multi_scale.sizes]


def test_published_sizes():
    assert sides(batches()) == list(range(480, 801, 32))  # RT-DETR, D-FINE
    assert sides(batches(divisor=64, scales=(0.7, 1.4))) == list(range(448, 897, 64))  # LW-DETR


def test_both_sides_are_multiples():
    sizes = batches(size=256, divisor=32, image_width=384, num_queries=10).sizes
    assert len(sizes) > 3
    assert all(height % 32 == width % 32 == 0 for height, width in sizes)
    assert (256, 384) in sizes


def test_sizes_have_a_token_per_query():
    assert sides(batches(size=384, scales=(7 / 12, 17 / 12), num_queries=300))[0] == 288  # 18² ≥ 300
    assert sides(batches(size=160, scales=(0.5, 1.0), num_queries=300)) == [160]  # never without the model's size


def test_one_size_leaves_batches_as_they_are():
    images = ImageBatch(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    assert sides(batches(size=64, scales=(1.0, 1.0))) == [64]
    assert batches(size=64, scales=(1.0, 1.0))(images, 5) is images
    assert sides(batches(size=32, scales=(0.8, 1.2))) == [32], "no other multiple of 32 is near"


def test_other_resize_rules_have_no_sizes():
    assert MultiScaleBatches.from_config(DetectorConfig(), (0.6, 1.0), 0) is None


def test_size_depends_on_seed_and_step_alone():
    drawn = [batches().size(step) for step in range(20)]
    assert len(set(drawn)) > 5
    torch.manual_seed(7)
    assert [batches().size(step) for step in range(10, 20)] == drawn[10:], "a resumed run"
    assert [batches(seed=4).size(step) for step in range(20)] != drawn, "control: another seed"
    other = json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True).stdout)
    assert [tuple(size) for size in other] == drawn, "another process"


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    batches().size(1)
    assert torch.rand(()) == expected


@pytest.mark.parametrize("step", range(4))
def test_objects_and_padding_stay_in_place(step):
    pixels, mask = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    pixels[..., 16:32, 24:48] = 1.0
    mask[..., 48:] = True
    multi_scale = MultiScaleBatches(((32, 48), (64, 64), (96, 128), (80, 96)), 0)
    seen = {multi_scale.size(number) for number in range(40)}
    assert len(seen) == 4
    resized = multi_scale(ImageBatch(pixels, mask), step)
    height, width = multi_scale.size(step)
    assert resized.pixels.shape == (1, 3, height, width)
    assert resized.padding_mask.dtype == torch.bool
    rows, columns = resized.pixels[0, 0].sum(1), resized.pixels[0, 0].sum(0)
    for profile, side, center in ((rows, height, 24 / 64), (columns, width, 36 / 64)):
        centers = (torch.arange(side) + 0.5) / side
        assert float((profile * centers).sum() / profile.sum()) == pytest.approx(center, abs=0.01)
    share = resized.padding_mask[0, 0].float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.02)
