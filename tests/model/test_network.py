"""The complete detector: shapes, gradients, padding and variants."""

import pytest
import torch

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.model.decoder import DenoisingQueries

TINY = {
    "backbone": "resnet10t", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 2, "num_queries": 12, "num_classes": 5, "dropout": 0.0,
}  # fmt: skip


def tiny(variant=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(0)
    return DeformableDETR(variant(**{**TINY, **changes}))


def perturbed(model: DeformableDETR) -> DeformableDETR:
    """Add noise to all parameters, so that zero-initialized outputs cannot compare equal by accident."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def batch(sizes=((96, 128), (64, 80)), canvas=(96, 128), seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(len(sizes), 3, *canvas)
    mask = torch.ones(len(sizes), *canvas, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return pixels, mask


VARIANTS = list(presets.PRESETS.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=presets.PRESETS)
def test_output_shapes_and_finite_gradients_for_every_parameter(variant):
    model = perturbed(tiny(variant)).train()
    pixels, mask = batch()
    out = model(pixels, mask)
    assert out["pred_logits"].shape == (2, 12, 5)
    assert out["pred_boxes"].shape == (2, 12, 4)
    assert out["layer_logits"].shape == (2 + bool(model.config.roi_grid), 2, 12, 5)
    assert torch.equal(out["layer_boxes"][-1], out["pred_boxes"])
    assert ((out["pred_boxes"] >= 0) & (out["pred_boxes"] <= 1)).all()
    differentiable = [out["layer_logits"], out["layer_boxes"]]
    if model.config.two_stage:
        differentiable += [out["encoder_logits"], out["encoder_boxes"]]
    if model.config.masks:
        differentiable += [out["mask_features"], out["layer_mask_embeddings"]]
    sum((x * torch.randn_like(x)).sum() for x in differentiable).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_network_options_produce_gradients(norm, position, levels):
    model = tiny(presets.refine, pre_norm=norm, position_encoding=position, num_feature_levels=levels).train()
    out = model(*batch())
    (out["layer_logits"].square().mean() + out["layer_boxes"].mean()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", [presets.single_scale, presets.two_stage], ids=["one-stage", "two-stage"])
def test_batching_does_not_change_outputs(variant):
    model = perturbed(tiny(variant)).eval()
    pixels, mask = batch(((96, 128), (64, 80), (96, 100), (50, 128)))
    with torch.no_grad():
        together = model(pixels, mask)
        for i in range(4):
            alone = model(pixels[i : i + 1], mask[i : i + 1])
            for name in ("pred_logits", "pred_boxes"):
                assert torch.allclose(alone[name][0], together[name][i], atol=1e-5, rtol=0), name


def test_padding_content_does_not_change_outputs():
    model = perturbed(tiny()).eval()
    pixels, mask = batch()
    dirty = torch.where(mask[:, None], torch.full_like(pixels, 1e4), pixels)
    dirty[1, 0, -1, -1] = torch.nan
    with torch.no_grad():
        clean, other, unmasked = model(pixels, mask), model(dirty, mask), model(dirty.nan_to_num(), None)
    assert torch.equal(clean["pred_logits"], other["pred_logits"])
    assert torch.equal(clean["pred_boxes"], other["pred_boxes"])
    assert not torch.allclose(clean["pred_logits"], unmasked["pred_logits"], atol=1e-3)  # without the mask it does


def test_omitted_mask_means_no_padding():
    model = perturbed(tiny()).eval()
    pixels, _ = batch(((96, 128), (96, 128)))
    with torch.no_grad():
        assert torch.equal(
            model(pixels)["pred_boxes"], model(pixels, torch.zeros(2, 96, 128, dtype=torch.bool))["pred_boxes"]
        )


def test_inputs_are_not_modified():
    model = tiny().train()
    pixels, mask = batch()
    dirty = pixels + mask[:, None]
    before, mask_before = dirty.clone(), mask.clone()
    model(dirty, mask)
    assert torch.equal(dirty, before)
    assert torch.equal(mask, mask_before)


def test_attention_is_returned_only_on_request():
    model = perturbed(tiny()).eval()
    pixels, mask = batch()
    with torch.no_grad():
        plain, seen = model(pixels, mask), model(pixels, mask, return_attention=True)
    assert torch.equal(plain["pred_boxes"], seen["pred_boxes"])
    assert "decoder_attention" not in plain
    S = sum(h * w for h, w in seen["spatial_shapes"])
    assert len(seen["encoder_attention"]) == len(seen["decoder_attention"]) == 2
    assert seen["encoder_attention"][0].locations.shape == (2, S, 4, 4, 4, 2)
    assert seen["decoder_attention"][0].weights.shape == (2, 12, 4, 4, 4)
    assert torch.allclose(seen["decoder_attention"][1].weights.sum((-1, -2)), torch.ones(2, 12, 4))
    # Refinement: each layer starts from the boxes of the previous one.
    assert torch.equal(seen["decoder_reference_points"][1], seen["layer_boxes"][0])


def test_gradient_checkpointing_keeps_gradients():
    pixels, mask = batch()
    grads = []
    for flag in (False, True):
        model = perturbed(tiny(gradient_checkpointing=flag)).train()
        out = model(pixels, mask)
        (out["layer_logits"].square().sum() + out["layer_boxes"].square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5), name


def test_fewer_tokens_than_queries():
    out = tiny(num_queries=300).eval()(torch.randn(1, 3, 64, 64))
    assert out["pred_logits"].shape[1] == 64 + 16 + 4 + 1


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (65, 31)])
def test_odd_and_tiny_images(size):
    out = tiny(presets.refine).eval()(torch.randn(2, 3, *size))
    assert out["pred_boxes"].isfinite().all()


def test_bf16_autocast_keeps_boxes_in_fp32():
    model = perturbed(tiny()).eval()
    pixels, mask = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(pixels, mask)
    assert out["pred_boxes"].dtype == out["pred_logits"].dtype == torch.float32


def test_initial_outputs_have_the_focal_prior_and_small_boxes():
    out = tiny(presets.multi_scale).eval()(*batch())
    assert out["pred_logits"].sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    assert torch.allclose(out["pred_boxes"][..., 2:], torch.full((2, 12, 2), 0.1192), atol=1e-3)


def test_heads_are_shared_without_refinement_and_per_layer_with_it():
    assert len(tiny(presets.multi_scale).decoder.heads.classes) == 1
    assert len(tiny(presets.refine).decoder.heads.classes) == 2
    assert len(tiny(presets.two_stage).decoder.heads.classes) == 3


def test_native_folder_round_trip(tmp_path):
    model = perturbed(tiny(class_names=("a", "b", "ç", "d", "e"), category_ids=(1, 3, 5, 90, 0))).eval()
    model.save_pretrained(tmp_path / "model")
    reloaded = DeformableDETR.from_pretrained(tmp_path / "model")
    assert reloaded.config.class_names == model.config.class_names
    assert reloaded.config.category_ids == (1, 3, 5, 90, 0)
    with torch.no_grad():
        assert torch.equal(model(*batch())["pred_boxes"], reloaded(*batch())["pred_boxes"])


def test_model_folder_errors(tmp_path):
    with pytest.raises(UserError, match="missing"):
        DeformableDETR.from_pretrained(tmp_path / "missing")
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content_bytes = weights.read_bytes()
    weights.write_bytes(content_bytes[: len(content_bytes) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        DeformableDETR.from_pretrained(tmp_path)
    weights.write_bytes(content_bytes)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        DeformableDETR.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["box", "learned", "encoder"])
@pytest.mark.parametrize("positions", [False, True], ids=["fixed-positions", "box-positions"])
def test_query_options_train_every_parameter(content, positions):
    options = {
        "query_init": content,
        "iterative_query_pos": positions,
        "class_aware_proposals": True,
        "look_forward_twice": True,
    }
    model = perturbed(tiny(**options)).train()
    out = model(*batch())
    differentiable = (out["layer_logits"], out["layer_boxes"], out["encoder_logits"], out["encoder_boxes"])
    sum((x * torch.randn_like(x)).sum() for x in differentiable).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_look_forward_twice_changes_gradients_only():
    """The second layer's boxes train the first layer's box head; outputs stay equal."""
    outs, grads = [], []
    for flag in (False, True):
        model = perturbed(tiny(look_forward_twice=flag)).train()
        out = model(*batch())
        out["layer_boxes"][1].sum().backward()
        outs.append(out["pred_boxes"].detach())
        grads.append(model.decoder.heads.boxes[0].layers[-1].weight.grad)
    assert torch.equal(outs[0], outs[1])
    assert grads[0] is None or not grads[0].any()
    assert grads[1].any()


def test_masked_denoising_queries_do_not_change_outputs():
    model = perturbed(tiny(iterative_query_pos=True)).eval()
    pixels, mask = batch()
    extra, Q = 3, 12
    attn_mask = torch.zeros(extra + Q, extra + Q, dtype=torch.bool)
    attn_mask[extra:, :extra] = True
    boxes = torch.rand(2, extra, 4)
    with torch.no_grad():
        plain = model(pixels, mask)
        hidden = model(pixels, mask, denoising_queries=DenoisingQueries(torch.randn(2, extra, 64), boxes, attn_mask))
        seen = model(
            pixels,
            mask,
            denoising_queries=DenoisingQueries(torch.randn(2, extra, 64), boxes, torch.zeros_like(attn_mask)),
        )
    assert hidden["denoising_boxes"].shape == (2, 2, extra, 4)
    assert torch.allclose(plain["pred_logits"], hidden["pred_logits"], atol=1e-5)
    assert not torch.allclose(plain["pred_logits"], seen["pred_logits"], atol=1e-3)


DINO = {"iterative_query_pos": "dino", "decoder_norm": True, "query_init": "learned", "class_aware_proposals": True}
DINO |= {"box_eps": (1e-3, 1e-3), "position_encoding": "dino", "look_forward_twice": True}
DINO_LIKE = {
    "dino": (presets.two_stage, DINO),
    "5 scales": (presets.two_stage, {**DINO, "num_feature_levels": 5, "finest_stride": 4}),
    "DAB two-stage": (presets.two_stage, {**DINO, "iterative_query_pos": "dab", "query_init": "encoder"}),
    "DAB": (presets.refine, {"iterative_query_pos": "dab", "box_eps": (1e-3, 1e-3)}),
    "learned boxes": (presets.refine, {"iterative_query_pos": True}),
}


def perturbed_tiny(variant, **changes) -> DeformableDETR:
    return perturbed(tiny(variant, **changes)).eval()


@pytest.mark.parametrize("name", DINO_LIKE)
def test_dino_and_dab_use_all_their_parameters_in_any_runtime(name):
    preset, changes = DINO_LIKE[name]
    model = perturbed_tiny(preset, **changes)
    pixels, mask = batch()
    outputs = model(pixels, mask)
    optimized = model.optimize()(pixels, mask)
    assert (outputs["pred_boxes"] - optimized["pred_boxes"]).abs().max() < 1e-5
    assert (outputs["pred_logits"] - optimized["pred_logits"]).abs().max() < 1e-5
    names = ("layer_logits", "layer_boxes", *(("encoder_logits", "encoder_boxes") if model.config.two_stage else ()))
    sum(outputs[key].nan_to_num().sum() for key in names).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_norm": True}, {"box_eps": (0.2, 1e-5)}, {"box_eps": (1e-5, 0.2)}, {"position_encoding": "dino"},
        {"iterative_query_pos": "dino"},
    ],
)  # fmt: skip
def test_each_detail_of_dino_changes_the_outputs(changes):
    base = {"iterative_query_pos": True, "query_init": "encoder"}
    pixels, mask = batch()
    model, changed = perturbed_tiny(presets.two_stage, **base), perturbed_tiny(presets.two_stage, **{**base, **changes})
    with torch.no_grad():
        for heads in (model.decoder.heads, changed.decoder.heads):
            for box_head in heads.boxes:
                box_head.layers[-1].bias.fill_(-4.0)  # coordinates close to 0
        changed.load_state_dict({**changed.state_dict(), **model.state_dict()})
        assert not torch.equal(model(pixels, mask)["pred_boxes"], changed(pixels, mask)["pred_boxes"])
