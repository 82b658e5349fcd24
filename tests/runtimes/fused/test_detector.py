"""The optimized model: outputs equal those of the original model, which is not changed."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from deformable_detr import DeformableDETR, explain
from deformable_detr.config import presets
from deformable_detr.export.verify import max_differences
from deformable_detr.runtimes.fused import onednn
from deformable_detr.runtimes.fused.fusion import fuse_backbone
from deformable_detr.runtimes.fused.positional_inputs import PositionalInputCache, image_sizes_of
from deformable_detr.runtimes.fused.transformer import chunk_length, run_in_chunks
from deformable_detr.utils.errors import UserError
from tests.support.models import randomized

TINY = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 2, "decoder_layers": 3, "num_queries": 20, "num_classes": 5,
}  # fmt: skip
VARIANTS = {
    **{name: (name, {}) for name in presets.PRESETS},
    "lite backbone": ("small", {"backbone": "tf_efficientnet_lite0"}),
    "pre-norm, learned positions, gelu": (
        "multi-scale", {"pre_norm": True, "position_encoding": "learned", "activation": "gelu"},
    ),
    "pre-norm two-stage, silu": ("two-stage", {"pre_norm": True, "activation": "silu"}),
    "learned content": ("two-stage", {"query_init": "learned"}),
    "no encoder": ("refine", {"encoder_layers": 0}),
    "masks, one level": ("single-scale", {"masks": True}),
    "masks, two-stage": ("two-stage", {"masks": True, "pre_norm": True}),
    "masks from stride 4": ("dino-5scale", {"masks": True}),
}  # fmt: skip


def model(name: str = "refine", **changes) -> DeformableDETR:
    torch.manual_seed(0)
    return randomized(DeformableDETR(presets.PRESETS[name](**{**TINY, **changes}))).eval()


def batch(size: int, padded: bool):
    generator = torch.Generator().manual_seed(size)
    pixels, mask = torch.randn(size, 3, 75, 110, generator=generator), torch.zeros(size, 75, 110, dtype=torch.bool)
    for index in range(size if padded else 0):
        mask[index, 75 - 9 * index - 3 :] = True
        mask[index, :, 110 - 11 * (size - index) :] = True
    return pixels.masked_fill(mask[:, None], 0.0), mask


def test_feature_map_taken_before_its_norm_is_not_folded():
    """xception41p returns feature maps between a convolution and its norm."""
    import timm

    from deformable_detr.runtimes.fused.folding import fold_batch_norms

    torch.manual_seed(0)
    body = timm.create_model("xception41p", features_only=True, out_indices=(2, 3)).eval()
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = [x.clone() for x in body(pixels)]
        assert fold_batch_norms(body, pixels) > 0
        for one, other in zip(before, body(pixels), strict=True):
            assert float((one - other).abs().max()) < 1e-3 * float(one.abs().max())


def test_backbone_with_a_minimum_image_size():
    """Such as maxvit, whose windows have to fit, or inception_v3, which pools too much at 64 pixels."""
    from deformable_detr.config.schema import ModelConfig
    from deformable_detr.runtimes.fused.folding import example_pixels

    class WindowedBackbone(nn.Module):
        def forward(self, x):
            assert x.shape[2] % 96 == 0, "no complete windows"
            return [x]

    config = ModelConfig(image_size=200, size_divisor=96)
    assert example_pixels(WindowedBackbone(), config, torch.zeros(3), (96, 128)).shape == (1, 3, 96, 128)
    assert example_pixels(WindowedBackbone(), config, torch.zeros(3), (64, 64)).shape == (1, 3, 192, 288)
    with pytest.raises(AssertionError, match="no complete windows"):
        example_pixels(WindowedBackbone(), ModelConfig(image_size=200), torch.zeros(3), (64, 64))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_match_the_model(variant):
    name, changes = VARIANTS[variant]
    reference = model(name, **changes)
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    optimized = reference.optimize()
    for size, padded in ((1, False), (1, True), (3, False), (3, True)):
        pixels, mask = batch(size, padded)
        expected = reference(pixels, mask)
        logits, boxes = max_differences(expected, optimized(pixels, mask))[:2]
        assert logits <= 1e-4, (size, padded)
        assert boxes <= 1e-4, (size, padded)
        if not padded:
            assert max_differences(expected, optimized(pixels))[:2] == (logits, boxes)
    after = reference.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not reference.training
    assert reference.backbone.body is not optimized.backbone


MASKED = [name for name, (preset, changes) in VARIANTS.items() if presets.PRESETS[preset](**changes).masks]


@pytest.mark.parametrize("variant", MASKED)
@torch.no_grad()
def test_masks_match_the_model(variant):
    name, changes = VARIANTS[variant]
    reference = model(name, **changes)
    assert reference.mask_head is not None
    for parameter in reference.mask_head.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimized = reference.optimize()
    for size, padded in ((1, False), (3, True)):
        expected, outputs = reference(*batch(size, padded)), optimized(*batch(size, padded))
        assert outputs.keys() == expected.keys() & outputs.keys()
        difference = (expected["mask_features"] - outputs["mask_features"]).abs().max()
        assert difference <= 1e-4
        # Queries with almost equal scores may swap places; each has its own mask.
        contents = (part["mask_embeddings"][..., :-5].contiguous() for part in (expected, outputs))
        assert torch.cdist(*contents, p=torch.inf).amin(-1).max() <= 1e-4
        assert max_differences(expected, outputs)[2] >= 0.99
        assert expected["mask_embeddings"].abs().mean() > 0.1
    optimized.mask_head.pointwise.bias += 0.01
    wrong = optimized(*batch(1, False))["mask_features"]
    assert (reference(*batch(1, False))["mask_features"] - wrong).abs().max() > 1e-3


@pytest.mark.skipif(not onednn.has_bf16(), reason="the processor has no bf16 instructions")
@torch.no_grad()
def test_masks_in_bf16():
    reference = model("single-scale", masks=True)
    expected, outputs = reference(*batch(2, True)), reference.optimize("bf16")(*batch(2, True))
    for name in ("mask_features", "mask_embeddings"):
        assert outputs[name].dtype == torch.float32
        assert (outputs[name] - expected[name]).abs().max() < 0.1 * expected[name].abs().max()


@torch.no_grad()
def test_comparison_detects_other_weights():
    reference, pixels = model(), batch(1, False)[0]
    other = model()
    other.decoder.layers[1].norm2.bias += 0.05  # pyright: ignore
    assert max_differences(reference(pixels), other.optimize()(pixels))[0] > 1e-3


@torch.no_grad()
def test_chunking_does_not_change_outputs(monkeypatch):
    reference = model("two-stage")
    pixels, mask = batch(3, True)
    expected = reference(pixels, mask)
    for rows, step in ((1, 1), (7, 3), (64, 64)):
        monkeypatch.setattr("deformable_detr.runtimes.fused.detector.CHUNK_ROWS", rows)
        monkeypatch.setattr("deformable_detr.runtimes.fused.transformer.CHUNK_MULTIPLE", step)
        assert max(max_differences(expected, reference.optimize()(pixels, mask))) <= 1e-4
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.CHUNK_ROWS", None)
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.is_available", lambda _: False)  # simulates a GPU
    assert max(max_differences(expected, reference.optimize()(pixels, mask))) <= 1e-4


def test_rows_run_in_chunks():
    a, b = torch.arange(600.0).view(2, 150, 2), torch.arange(300.0).view(1, 150, 2)
    expected = (a + b, a * b)
    chunk_sizes = []

    def run(x, y, z):
        chunk_sizes.append(len(x))
        assert z is None
        return x + y, x * y

    buffer = torch.full_like(a, torch.nan)
    total, product = run_in_chunks(run, 50, (a, b, None), [a, buffer])  # overwrites its input
    assert chunk_sizes == [64] * 6  # not 64, 64, 22
    assert total is a
    assert product is buffer
    assert torch.equal(total, expected[0])
    assert torch.equal(product, expected[1])
    assert len(run_in_chunks(run, 50, (b[:, :20], b[:, :20], None), [])[0][0]) == 20


def test_image_sizes_share_few_chunk_lengths():
    sizes = range(5000, 9000)
    lengths = [chunk_length(size, 2048) for size in sizes]
    assert len(set(lengths)) <= 16
    assert min(lengths) > 1500
    assert max(lengths) < 2700
    for size, length in zip(sizes, lengths, strict=True):
        chunks = -(-size // length)
        assert 0 <= chunks * length - size < 64 * chunks  # rows that are computed twice


@pytest.mark.skipif(not onednn.has_bf16(), reason="this CPU has no bf16 instructions")
@torch.no_grad()
def test_bf16_outputs_are_close_and_have_dtype_fp32():
    reference = model()
    optimized = reference.optimize("bf16")
    pixels, mask = batch(2, True)
    out = optimized(pixels, mask)
    assert out["pred_logits"].dtype == out["pred_boxes"].dtype == torch.float32
    logits, boxes = max_differences(reference(pixels, mask), out)
    assert 1e-4 < logits < 0.3
    assert boxes < 0.05


def test_bf16_is_rejected_without_cpu_support(monkeypatch):
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.has_bf16", lambda: False)
    with pytest.raises(UserError, match="no bf16 instructions"):
        model().optimize("bf16")


def test_invalid_uses_are_rejected():
    reference = model()
    with pytest.raises(UserError, match="precision 'int4': choose from fp32, bf16"):
        reference.optimize("int4")
    optimized = reference.optimize()
    with pytest.raises(UserError, match="have no sampling points"):
        explain(optimized, torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="cannot change its device or dtype"):
        optimized.double()
    assert optimized.to("cpu") is optimized
    process = multiprocessing.get_context("spawn").Process(target=print, args=(optimized,))
    for transfer in (copy.copy, copy.deepcopy, pickle.dumps, lambda _: process.start()):
        with pytest.raises(TypeError, match=r"pickled or sent to a process; .* call optimize\(\) there"):
            transfer(optimized)
    reference = model()
    for transferred in (copy.deepcopy(reference), pickle.loads(pickle.dumps(reference))):
        assert max(max_differences(reference(batch(1, False)[0]), transferred.optimize()(batch(1, False)[0]))) <= 1e-4


@torch.no_grad()
def test_positional_inputs_are_cached_and_bounded(monkeypatch):
    computed = []
    original = PositionalInputCache._compute
    monkeypatch.setattr(PositionalInputCache, "_compute", lambda *a: computed.append(a[1]) or original(*a))
    optimized = model().optimize()
    for _ in range(3):
        optimized(*batch(2, True))
        optimized(*batch(2, False))
    assert len(computed) == 2
    monkeypatch.setattr(PositionalInputCache, "MAX_ENTRIES", 3)
    for width in range(64, 64 + 8 * 5, 8):
        optimized(torch.randn(1, 3, 64, width))
    assert len(optimized.positional_inputs._cache) == 3
    monkeypatch.setattr(PositionalInputCache, "MAX_BYTES", 1)
    optimized(torch.randn(1, 3, 72, 64))
    assert len(optimized.positional_inputs._cache) == 1


def test_image_sizes_of_masks():
    _, mask = batch(3, True)
    assert image_sizes_of(mask) == ((72, 77), (63, 88), (54, 99))
    mask[1, 5, 5] = True  # a hole
    assert image_sizes_of(mask) is None


@torch.no_grad()
def test_mask_of_any_shape():
    reference = model()
    pixels, mask = batch(1, True)
    mask[:, 30:40, 20:60] = True
    optimized = reference.optimize()
    assert max(max_differences(reference(pixels, mask), optimized(pixels, mask))) <= 1e-4
    assert not optimized.positional_inputs._cache


class _DataDependent(nn.Module):
    """A backbone whose control flow depends on values, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.convolution(x)
        return [y if y.sum() > 1e9 else -y]


@torch.no_grad()
def test_untraceable_backbone_is_not_fused():
    body = _DataDependent().eval()
    assert fuse_backbone(body, torch.randn(1, 3, 8, 8), torch.float32, packed=True) is body


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="oneDNN fusion is not available")
@torch.no_grad()
def test_additions_and_activations_are_fused_into_convolutions():
    optimized = model().optimize()
    kinds = [type(module).__name__ for module in optimized.backbone.modules()]
    assert "PackedConv2d" in kinds
    assert not {"Conv2d", "BatchNorm2d", "ReLU"} & set(kinds)
    in_place = [m for m in optimized.backbone.modules() if isinstance(m, onednn.PackedConv2d) and m.in_place]
    assert in_place
    features = optimized.backbone(torch.randn(1, 3, 64, 64))
    assert len({x.data_ptr() for x in features}) == len(features)  # no feature map was overwritten by the next


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="oneDNN fusion is not available")
@pytest.mark.parametrize("groups", [1, 8])
@torch.no_grad()
def test_weights_are_packed_once_per_layout(groups):
    torch.manual_seed(0)
    reference = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    ours = onednn.PackedConv2d(reference, None, torch.float32, packed=True)
    weights = []
    for B, height, width in ((2, 9, 14), (2, 9, 14), (1, 9, 14), (2, 9, 15), (2, 31, 8), (2, 9, 14), (3, 31, 8)):
        x = torch.randn(B, 8, height, width)
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-5)
        weights.append(id(ours.packed_weights[ours.layouts[x.shape[1:]]]))
    assert len(ours.layouts) == 3
    assert len(set(weights)) == len(ours.packed_weights)  # one per layout, none repacked


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="oneDNN fusion is not available")
@torch.no_grad()
def test_packed_weights_and_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(onednn, "MAX_INPUT_SIZES", 4)
    serialize = torch.ops.mkldnn._get_mkldnn_serialized_md
    names = iter([0, 1, 0, 2, 3, 0, 1, 1, 1])  # simulated layouts
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_get_mkldnn_serialized_md",
        lambda weight: torch.full_like(serialize(weight), next(names)),
        raising=False,
    )
    reference = nn.Conv2d(4, 4, 3)
    ours = onednn.PackedConv2d(reference, None, torch.float32, packed=True)
    cached_layouts = []
    for width in (5, 6, 7, 8, 9, 7, 6, 9, 5):
        x = torch.randn(1, 4, 5, width)
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-5)
        cached_layouts.append([layout[0] for layout in ours.packed_weights])
        assert len(ours.layouts) <= 4
    assert cached_layouts == [[0], [0, 1], [1, 0], [1, 0, 2], [0, 2, 3], [0, 2, 3], [2, 3, 0], [2, 3, 0], [3, 0, 1]]


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="oneDNN fusion is not available")
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), (2, 2)), ((5, 5), (2, 2)), ((2, 2), (2, 2)), ((3, 4), (2, 3)), ((5, 5), (4, 3))]
)
@torch.no_grad()
def test_same_padded_depthwise_convolutions_copy_no_feature_map(kernel, stride, monkeypatch):
    from timm.layers import padding
    from timm.layers.conv2d_same import Conv2dSame

    torch.manual_seed(0)
    reference = Conv2dSame(16, 16, kernel, stride=stride, groups=16)
    ours = onednn.PackedConv2d(reference, None, torch.float32, packed=True)
    sizes = [(height, width) for height in range(4, 12) for width in (5, 6, 7, 8)]
    images = [torch.randn(2, 16, *size) for size in sizes]
    expected = [reference(x) for x in images]
    monkeypatch.delattr(padding, "pad_same")
    for x, y in zip(images, expected, strict=True):
        for _ in range(2):  # the second time with the cached weight
            torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="oneDNN fusion is not available")
@pytest.mark.parametrize("settings", [{"groups": 1}, {"groups": 8}, {"kernel_size": 1}, {"dilation": 2}, {"stride": 1}])
@torch.no_grad()
def test_other_same_padded_convolutions(settings):
    from timm.layers.conv2d_same import Conv2dSame

    torch.manual_seed(0)
    reference = Conv2dSame(16, 16, **{"kernel_size": 3, "stride": 2, "groups": 16, **settings})
    ours = onednn.PackedConv2d(reference, None, torch.float32, packed=True)
    for size in ((9, 9), (8, 9), (9, 8), (8, 8)):
        x = torch.randn(1, 16, *size)
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    reference = model()
    optimized = reference.optimize(compile=True)
    for size, padded in ((1, False), (3, True)):
        pixels, mask = batch(size, padded)
        assert max(max_differences(reference(pixels, mask), optimized(pixels, mask))) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_in_other_dtypes(dtype):
    """float64 weights are loaded as such, and predict and serve optimize the loaded model."""
    computed = model("refine").to(dtype)
    optimized = computed.optimize()
    assert optimized.pixel_mean.dtype == torch.float32
    pixels = torch.randn(1, 3, 64, 96)
    expected = computed.float()(pixels)
    torch.testing.assert_close(optimized(pixels)["pred_boxes"], expected["pred_boxes"], atol=1e-4, rtol=0)
