"""`accelerate` on transformers models: same outputs and gradients, fully restored by `restore`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deformable_detr import ops
from deformable_detr.utils.errors import UserError
from tests.support.transformers_models import SIZES, random_network

transformers = pytest.importorskip("transformers")

RESNET: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def resnet(**changes):
    return transformers.ResNetConfig(**{**RESNET, **changes})


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=resnet(), backbone=None, use_pretrained_backbone=False, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=7,
        encoder_ffn_dim=32, decoder_ffn_dim=32, two_stage=True, two_stage_num_proposals=7, with_box_refine=True,
    )  # fmt: skip
    return transformers.DeformableDetrForObjectDetection(config), lambda m: m(PIXELS).pred_boxes


def _rt_detr(name: str, **changes):
    common: dict[str, Any] = {
        "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 16],
        "decoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2,
        "num_queries": 7, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_denoising": 0,
        "hidden_expansion": 0.5,
    }  # fmt: skip
    backbone = transformers.RTDetrResNetConfig(**RESNET)
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **{**common, **changes})
    return getattr(transformers, f"{name}ForObjectDetection")(config), lambda m: m(PIXELS).pred_boxes


def d_fine():
    model, call = _rt_detr("DFine", decoder_n_points=[3, 6, 3], depth_mult=0.34)
    return model, call


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=2,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config), lambda m: m(PIXELS).masks_queries_logits


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=2, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=32, num_queries=5, text_encoder_width=32, text_encoder_num_layers=1,
        text_encoder_vocab_size=50, text_encoder_n_ctx=4, task_seq_len=9, num_labels=3,
    )  # fmt: skip
    tasks = torch.ones(2, 9)
    return transformers.OneFormerModel(config), lambda m: m(PIXELS, tasks).transformer_decoder_mask_predictions


def grounding_dino(kind: str = "GroundingDino"):
    text = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=swin, text_config=text, d_model=32, encoder_layers=2, decoder_layers=2, num_queries=7,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_text_len=8,
    )  # fmt: skip
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 5, 3]])
    call = lambda m: m(pixel_values=PIXELS, input_ids=ids, attention_mask=torch.ones_like(ids)).pred_boxes  # noqa: E731
    return getattr(transformers, f"{kind}ForObjectDetection")(config), call


def omdet_turbo():
    text = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        projection_dim=16, max_position_embeddings=8,
    )  # fmt: skip
    config = transformers.OmDetTurboConfig(
        backbone_config=resnet(), text_config=text, apply_layernorm_after_vision_backbone=False, num_queries=7,
        text_projection_in_dim=16, text_projection_out_dim=16, class_embed_dim=16, task_encoder_hidden_dim=16,
        encoder_hidden_dim=32, vision_features_channels=[32, 32, 32], encoder_in_channels=[16, 16, 16],
        encoder_attention_heads=2, encoder_dim_feedforward=16, decoder_hidden_dim=32, decoder_num_heads=2,
        decoder_num_layers=2, decoder_dim_feedforward=16,
    )  # fmt: skip
    ids = torch.tensor([[2, 7, 8, 49], [2, 9, 5, 49]])
    text_inputs = dict.fromkeys(("classes_input_ids", "tasks_input_ids"), ids)
    masks = dict.fromkeys(("classes_attention_mask", "tasks_attention_mask"), torch.ones_like(ids))
    structure = torch.tensor([1, 1])

    def call(model):
        outputs = model(PIXELS, **text_inputs, **masks, classes_structure=structure)
        for cache in (model.language_cache_class, model.language_cache_prompt):  # of the text's features
            cache.cache.clear()
        return outputs.decoder_coord_logits

    return transformers.OmDetTurboForObjectDetection(config), call


def adapted(name: str):
    """A model of the adapters' tests."""
    side = SIZES.get(name, 96)
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return random_network(name), lambda m: m(pixels).pred_boxes


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "deformable_detr": deformable_detr,
    "rt_detr": lambda: _rt_detr("RTDetr"),
    "rt_detr_v2": lambda: _rt_detr("RTDetrV2"),
    "d_fine": d_fine,
    "deimv2": lambda: adapted("deimv2"),
    "lw_detr": lambda: adapted("lw_detr"),
    "rf_detr": lambda: adapted("rf_detr"),
    "grounding_dino": grounding_dino,
    "mm_grounding_dino": lambda: grounding_dino("MMGroundingDino"),
    "omdet_turbo": omdet_turbo,
    "mask2former": mask2former,
    "oneformer": oneformer,
}


def _scatter_offsets(model: nn.Module) -> None:
    """Randomize offsets and zero-initialized parameters, so that outputs depend on every parameter."""
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name or not parameter.any():
            nn.init.normal_(parameter, std=0.2)


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ("sampling_offsets" in name or "attention_weights" in name)
    }


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay_within_1e_5(name, monkeypatch):
    torch.manual_seed(0)
    model, call = MODELS[name]()
    _scatter_offsets(model)
    model.eval()
    keys = list(model.state_dict())
    expected = call(model)
    expected_gradients = _gradients(model, expected)
    calls = []
    original = ops.accelerate.__globals__["sample_and_sum"]
    monkeypatch.setitem(ops.accelerate.__globals__, "sample_and_sum", lambda *args: calls.append(1) or original(*args))

    changed = ops.accelerate(model)
    assert changed
    assert ops.accelerate(model) == ()
    assert list(model.state_dict()) == keys
    accelerated = call(model)
    assert len(calls) == len(changed)  # every replaced layer was called
    assert (accelerated - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())
    assert torch.equal(call(copy.deepcopy(model)), accelerated)
    gradients = _gradients(model, accelerated)
    assert gradients.keys() == expected_gradients.keys()
    assert any(gradient.any() for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[key], rtol=1e-3, atol=1e-3 * gradient.abs().max().item())

    calls.clear()
    assert set(ops.restore(model)) == set(changed)
    assert torch.equal(call(model), expected)
    assert not calls
    assert ops.restore(model) == ()


def pickled(model: nn.Module) -> nn.Module:
    """Pickle a model without transformers' own hooks, which cannot be pickled; it installs them again."""
    for module in model.modules():
        module._forward_hooks.clear()
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(pickled(model), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_keep_the_op(name, monkeypatch):
    model, call = MODELS[name]()
    _scatter_offsets(model)
    model.eval()
    calls = []
    original = ops.accelerate.__globals__["sample_and_sum"]
    monkeypatch.setitem(ops.accelerate.__globals__, "sample_and_sum", lambda *args: calls.append(1) or original(*args))
    changed = ops.accelerate(model)
    copies = [copied(model) for copied in (copy.deepcopy, pickled, saved)]
    expected = call(model)
    for again in copies:
        calls.clear()
        assert torch.equal(call(again), expected)
        assert len(calls) == len(changed)
        assert ops.accelerate(again) == ()
        for parameter in again.parameters():  # the copy reads its own weights
            parameter.mul_(1.5)
        assert not torch.equal(call(again), expected)
        assert torch.equal(call(model), expected)
        assert set(ops.restore(again)) == set(changed)
        calls.clear()
        call(again)
        assert not calls, "control: without the op, it is not called"
    assert ops.restore(model)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_types_under_autocast_stay(name, monkeypatch):
    """Of the outputs of every layer; the op itself returns the type of the values."""
    model, call = MODELS[name]()
    model.eval()
    returned, types, own = [], [], []
    original = ops.accelerate.__globals__["sample_and_sum"]

    def spy(*arguments):
        output = original(*arguments)
        own.append(output.dtype)
        return output

    monkeypatch.setitem(ops.accelerate.__globals__, "sample_and_sum", spy)
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=module_name: types.append((name, types_of(output))))
    for accelerated in (False, True):
        types.clear()
        if accelerated:
            ops.accelerate(model)
        with torch.autocast("cpu", torch.bfloat16):
            call(model)
        returned.append(list(types))
    assert len(returned[0]) == len(returned[1])
    assert [pair for pair in zip(*returned, strict=True) if pair[0] != pair[1]] == []
    assert torch.bfloat16 in own, "control: not what transformers' code returns"


def types_of(output: Any) -> list[torch.dtype]:
    if isinstance(output, Tensor):
        return [output.dtype]
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    return [dtype for part in parts for dtype in types_of(part)]


def test_nearest_neighbor_sampling_is_not_accelerated():
    model, _ = _rt_detr("RTDetrV2", decoder_method="discrete")
    with pytest.raises(UserError, match="bilinear"):
        ops.accelerate(model)


def test_unsupported_model_error_lists_supported_models():
    with pytest.raises(UserError, match=r"Linear has no .* Deformable DETR, RT-DETR, .*Mask2Former"):
        ops.accelerate(nn.Linear(2, 2))
