"""Presets: their differences and the paper's model sizes."""

import numpy as np
import pytest

from deformable_detr import DeformableDETR, UserError, explain
from deformable_detr.config import presets

# Millions of parameters as published in the official repository, with 91 classes.
PUBLISHED = {"single-scale": 34, "single-scale-dc5": 34, "multi-scale": 40, "refine": 41, "two-stage": 41}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameter_counts_match_the_paper(name, millions):
    model = DeformableDETR(presets.PRESETS[name](backbone_weights="none"))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)


def test_presets_cover_the_published_variants_and_small_is_smaller():
    others = {"dino", "dino-5scale", "dino-swin-l", "small", "small-masks", "small-portable"}
    assert set(PUBLISHED) | others == set(presets.PRESETS)
    small = DeformableDETR(presets.small(backbone_weights="none"))
    assert sum(parameter.numel() for parameter in small.parameters()) < 10e6


def test_variants_differ_as_in_the_paper():
    assert presets.multi_scale().num_feature_levels == 4
    assert presets.single_scale() == presets.multi_scale(num_feature_levels=1)
    assert presets.single_scale_dc5() == presets.single_scale(dilation=True)
    assert presets.refine() == presets.multi_scale(refine=True)
    assert presets.two_stage() == presets.refine(two_stage=True)
    assert presets.dino_5scale() == presets.dino(num_feature_levels=5, finest_stride=4)


def test_dino_trains_with_its_published_recipe():
    train = presets.config("dino").train
    assert (train.epochs, train.total_batch_size, train.lr, train.lr * train.backbone_lr_mult) == (12, 16, 1e-4, 1e-5)
    assert (train.num_denoising, train.box_noise, train.label_noise) == (200, 1.0, 0.5)  # 100 pairs
    assert round(train.epochs * train.lr_drop) == 11


@pytest.mark.parametrize("name", presets.PRESETS)
def test_changes_override_the_preset(name):
    assert presets.PRESETS[name](num_queries=7, num_classes=3).num_queries == 7
    assert presets.config(name).model == presets.PRESETS[name]()
    assert presets.config(name).preset == name


def test_unknown_option_or_preset_is_reported():
    with pytest.raises(UserError, match=r"unknown key 'num_quries'; did you mean 'num_queries'\?"):
        presets.small(num_quries=3)
    with pytest.raises(UserError, match=r"unknown preset 'large'; choose from .*two-stage"):
        presets.config("large")


@pytest.mark.parametrize("name", ["small", "small-portable"])
def test_small_presets_resize_to_multiples_of_the_stride(name):
    model = DeformableDETR(presets.PRESETS[name](backbone_weights="none", image_size=64, num_queries=10)).eval()
    input_sizes = []
    model.register_forward_pre_hook(lambda module, inputs: input_sizes.append(tuple(inputs[0].shape[2:])))
    image = np.zeros((75, 130, 3), dtype=np.uint8)
    model.predict(image)
    explain(model, image, threshold=0.0)
    assert input_sizes == [(64, 96)] * 2, "64 × 110 without size_divisor"
