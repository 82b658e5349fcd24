"""Optimized copies of transformers' detectors; every configuration in fp32 is in `test_detector.py`."""

import copy
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.transformers_models import CONFIGS, NAMES, write_repository

from deformable_detr import UserError
from deformable_detr.adapters.hybrid_encoder import FusedHybridEncoder
from deformable_detr.adapters.optimize import Affine, ProposalBoxes, ResidualBlock
from deformable_detr.detector import load_detector
from deformable_detr.runtimes.fused.onednn import has_bf16

pytest.importorskip("transformers", reason="needs transformers")

RT_DETR, D_FINE = CONFIGS["rt_detr"], CONFIGS["d_fine"]
TIMM = {"model_type": "timm_backbone", "out_indices": [2, 3, 4]}
OTHER = {  # a map between a convolution and its norm that others read too; nearest pixels
    "rt_detr tapped": RT_DETR
    | {"backbone_config": TIMM | {"backbone": "xception41p"}, "encoder_in_channels": [728, 1024, 2048]},
    "rt_detr_v2 discrete": CONFIGS["rt_detr_v2"] | {"decoder_method": "discrete"},
}
SPECIAL = {
    "rt_detr bottleneck": RT_DETR | {"backbone_config": RT_DETR["backbone_config"] | {"layer_type": "bottleneck"}},
    "rt_detr basic": RT_DETR | {"backbone_config": RT_DETR["backbone_config"] | {"depths": [2, 1, 2, 2]}},
    "rt_detr two attended": RT_DETR | {"encode_proj_layers": [1, 2], "encoder_layers": 1},
    "rt_detr none attended": RT_DETR | {"encoder_layers": 0},
    "rt_detr anchors": RT_DETR | {"anchor_image_size": [96, 96]},
    "rt_detr_v2 wide": CONFIGS["rt_detr_v2"] | {"hidden_expansion": 0.5},
    "d_fine affine": D_FINE | {"backbone_config": D_FINE["backbone_config"] | {"use_learnable_affine_block": True}},
}


def detector_of(name, folder):
    with mock.patch.dict(CONFIGS, SPECIAL | OTHER):
        write_repository(folder, name)
    return load_detector(folder, "cpu")


def pixels_of(detector):
    side = detector.config.image_size
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SPECIAL)
def test_special_networks_are_equal(name, tmp_path):
    detector = detector_of(name, tmp_path)
    if "affine" in name:
        for module in detector.modules():
            if type(module).__name__.endswith("LearnableAffineBlock"):
                module.scale.data.fill_(1.1)
                module.bias.data.fill_(-0.1)
    optimized = detector.optimize()
    kinds = [type(module) for module in optimized.modules()]
    assert FusedHybridEncoder in kinds
    assert ProposalBoxes in kinds
    assert (ResidualBlock in kinds) == name.startswith("rt_detr")
    assert (Affine in kinds) == ("affine" in name)
    pixels = pixels_of(detector)
    with torch.no_grad():
        expected = copy.deepcopy(detector).double()(pixels.double())  # in fp32 it is 2e-4 off itself
    for output in (optimized(pixels), optimized(pixels)):  # again, since some layers work in place
        for key in output:
            torch.testing.assert_close(output[key].double(), expected[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OTHER)
def test_other_networks_are_equal(name, tmp_path):
    detector = detector_of(name, tmp_path)
    pixels = pixels_of(detector)
    with torch.no_grad():
        expected = copy.deepcopy(detector).double()(pixels.double())
    output = detector.optimize()(pixels)
    for key in output:
        torch.testing.assert_close(output[key].double(), expected[key], atol=1e-4, rtol=0)


@pytest.mark.skipif(not has_bf16(), reason="needs a processor with bf16")
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("odd")])
def test_bf16_is_close(name, tmp_path):
    """Of most queries: rounding selects others of a random network, or in another order."""
    detector = detector_of(name, tmp_path)
    pixels = pixels_of(detector)
    with torch.no_grad():
        expected = detector(pixels)
    output = detector.optimize("bf16")(pixels)
    assert {value.dtype for value in output.values()} == {torch.float32}
    distances = torch.cdist(output["pred_boxes"], expected["pred_boxes"]).min(2)
    assert distances.values.median() < 0.01
    nearest = expected["pred_logits"].gather(1, distances.indices[..., None].expand(-1, -1, len(NAMES)))
    assert (output["pred_logits"] - nearest).abs().median() < 0.1


@pytest.mark.skipif(not has_bf16(), reason="needs a processor with bf16")
@pytest.mark.parametrize("name", ["rt_detr", "rt_detr anchors"])
def test_proposals_of_bf16_start_in_fp32(name, tmp_path):
    """Anchors in bf16 would be up to 0.004 of the image off."""
    detector = detector_of(name, tmp_path)
    optimized = detector.optimize("bf16")
    network = optimized.model.network.model
    seen = []
    network.decoder.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    optimized(pixels_of(detector))
    assert seen[0]["reference_points"].dtype == torch.float32
    anchors = network.generate_anchors(((9, 9),), device=torch.device("cpu"), dtype=torch.bfloat16)[0]
    assert anchors.dtype == (torch.float32 if name == "rt_detr" else torch.bfloat16)
    assert seen[0]["encoder_hidden_states"].dtype == (torch.bfloat16 if name == "rt_detr" else torch.float32)


def test_it_stays_where_it_is(tmp_path):
    optimized = detector_of("rt_detr", tmp_path).optimize()
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied, pickled or sent"):
            use(optimized)
    with pytest.raises(UserError, match="cannot change its device or dtype"):
        optimized.double()
    with pytest.raises(UserError, match="choose from fp32, bf16"):
        load_detector(tmp_path, "cpu").optimize("fp64")


@pytest.mark.parametrize("mode", [False, True])
def test_after_a_prediction(mode, tmp_path):
    """transformers keeps position embeddings that were made in inference mode."""
    detector = detector_of("d_fine", tmp_path)
    image = Image.fromarray(np.zeros((160, 160, 3), np.uint8))
    expected = detector.predict(image, 0.0)
    with torch.inference_mode(mode):
        optimized = load_detector(tmp_path, "cpu").optimize()
        torch.testing.assert_close(optimized.predict(image, 0.0).scores, expected.scores, atol=1e-5, rtol=0)
