"""The optimized model: the outputs of the model it was made of, which stays as it was."""

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


def test_a_map_taken_before_its_norm_stays_as_it_is():
    """xception41p gives its maps between a convolution and the norm after it."""
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


def test_a_backbone_that_takes_no_small_images():
    """As maxvit, whose windows have to fit, or inception_v3, which pools what is too small at 64 pixels."""
    from deformable_detr.config.schema import ModelConfig
    from deformable_detr.runtimes.fused.folding import example_pixels

    class Wide(nn.Module):
        def forward(self, x):
            assert x.shape[2] % 96 == 0, "no whole windows"
            return [x]

    config = ModelConfig(image_size=200, size_divisor=96)
    assert example_pixels(Wide(), config, torch.zeros(3), (96, 128)).shape == (1, 3, 96, 128)
    assert example_pixels(Wide(), config, torch.zeros(3), (64, 64)).shape == (1, 3, 192, 288)
    with pytest.raises(AssertionError, match="no whole windows"):
        example_pixels(Wide(), ModelConfig(image_size=200), torch.zeros(3), (64, 64))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_are_the_models(variant):
    name, changes = VARIANTS[variant]
    plain = model(name, **changes)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    fast = plain.optimize()
    for size, padded in ((1, False), (1, True), (3, False), (3, True)):
        pixels, mask = batch(size, padded)
        wanted = plain(pixels, mask)
        logits, boxes = max_differences(wanted, fast(pixels, mask))
        assert logits <= 1e-4, (size, padded)
        assert boxes <= 1e-4, (size, padded)
        if not padded:
            assert max_differences(wanted, fast(pixels)) == (logits, boxes)
    after = plain.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not plain.training
    assert plain.backbone.body is not fast.backbone


@torch.no_grad()
def test_other_weights_are_noticed():
    """What the comparison would say of a model that is not the same."""
    plain, pixels = model(), batch(1, False)[0]
    other = model()
    other.decoder.layers[1].norm2.bias += 0.05  # pyright: ignore
    assert max_differences(plain(pixels), other.optimize()(pixels))[0] > 1e-3


@torch.no_grad()
def test_parts_make_no_max_differences(monkeypatch):
    plain = model("two-stage")
    pixels, mask = batch(3, True)
    wanted = plain(pixels, mask)
    for rows, step in ((1, 1), (7, 3), (64, 64)):
        monkeypatch.setattr("deformable_detr.runtimes.fused.detector.CHUNK_ROWS", rows)
        monkeypatch.setattr("deformable_detr.runtimes.fused.transformer.CHUNK_MULTIPLE", step)
        assert max(max_differences(wanted, plain.optimize()(pixels, mask))) <= 1e-4
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.CHUNK_ROWS", None)
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.is_available", lambda _: False)  # as on a GPU
    assert max(max_differences(wanted, plain.optimize()(pixels, mask))) <= 1e-4


def test_rows_run_in_chunks():
    a, b = torch.arange(600.0).view(2, 150, 2), torch.arange(300.0).view(1, 150, 2)
    wanted = (a + b, a * b)
    seen = []

    def run(x, y, nothing):
        seen.append(len(x))
        assert nothing is None
        return x + y, x * y

    other = torch.full_like(a, torch.nan)
    total, product = run_in_chunks(run, 50, (a, b, None), [a, other])  # what is read is written over
    assert seen == [64] * 6  # and not 64, 64, 22
    assert total is a
    assert product is other
    assert torch.equal(total, wanted[0])
    assert torch.equal(product, wanted[1])
    assert len(run_in_chunks(run, 50, (b[:, :20], b[:, :20], None), [])[0][0]) == 20


def test_images_of_many_sizes_share_few_lengths_of_parts():
    sizes = range(5000, 9000)
    lengths = [chunk_length(size, 2048) for size in sizes]
    assert len(set(lengths)) <= 16
    assert min(lengths) > 1500
    assert max(lengths) < 2700
    for size, length in zip(sizes, lengths, strict=True):
        parts = -(-size // length)
        assert 0 <= parts * length - size < 64 * parts  # rows that are computed twice


@pytest.mark.skipif(not onednn.has_bf16(), reason="this processor has no bf16 products")
@torch.no_grad()
def test_bf16_is_near_and_says_fp32():
    plain = model()
    fast = plain.optimize("bf16")
    pixels, mask = batch(2, True)
    out = fast(pixels, mask)
    assert out["pred_logits"].dtype == out["pred_boxes"].dtype == torch.float32
    logits, boxes = max_differences(plain(pixels, mask), out)
    assert 1e-4 < logits < 0.3
    assert boxes < 0.05


def test_bf16_is_refused_where_the_processor_lacks_it(monkeypatch):
    monkeypatch.setattr("deformable_detr.runtimes.fused.detector.has_bf16", lambda: False)
    with pytest.raises(UserError, match="no bf16 instructions"):
        model().optimize("bf16")


def test_mistakes_are_named():
    plain = model()
    with pytest.raises(UserError, match="precision 'int4': choose from fp32, bf16"):
        plain.optimize("int4")
    fast = plain.optimize()
    with pytest.raises(UserError, match="have no sampling points"):
        explain(fast, torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="cannot change its device or dtype"):
        fast.double()
    assert fast.to("cpu") is fast


@torch.no_grad()
def test_layouts_are_kept_and_bounded(monkeypatch):
    made = []
    original = PositionalInputCache._compute
    monkeypatch.setattr(PositionalInputCache, "_compute", lambda *a: made.append(a[1]) or original(*a))
    fast = model().optimize()
    for _ in range(3):
        fast(*batch(2, True))
        fast(*batch(2, False))
    assert len(made) == 2
    monkeypatch.setattr(PositionalInputCache, "MAX_ENTRIES", 3)
    for width in range(64, 64 + 8 * 5, 8):
        fast(torch.randn(1, 3, 64, width))
    assert len(fast.positional_inputs._cache) == 3
    monkeypatch.setattr(PositionalInputCache, "MAX_BYTES", 1)
    fast(torch.randn(1, 3, 72, 64))
    assert len(fast.positional_inputs._cache) == 1


def test_sizes_of_masks():
    _, mask = batch(3, True)
    assert image_sizes_of(mask) == ((72, 77), (63, 88), (54, 99))
    mask[1, 5, 5] = True  # a hole
    assert image_sizes_of(mask) is None


@torch.no_grad()
def test_a_mask_of_any_shape():
    plain = model()
    pixels, mask = batch(1, True)
    mask[:, 30:40, 20:60] = True
    fast = plain.optimize()
    assert max(max_differences(plain(pixels, mask), fast(pixels, mask))) <= 1e-4
    assert not fast.positional_inputs._cache


class _Strange(nn.Module):
    """A body that depends on values, of which there is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.convolution(x)
        return [y if y.sum() > 1e9 else -y]


@torch.no_grad()
def test_a_backbone_without_a_graph_stays_as_it_is():
    body = _Strange().eval()
    assert fuse_backbone(body, torch.randn(1, 3, 8, 8), torch.float32, packed=True) is body


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no fused products here")
@torch.no_grad()
def test_sums_and_activations_become_part_of_convolutions():
    fast = model().optimize()
    kinds = [type(module).__name__ for module in fast.backbone.modules()]
    assert "PackedConv2d" in kinds
    assert not {"Conv2d", "BatchNorm2d", "ReLU"} & set(kinds)
    in_place = [m for m in fast.backbone.modules() if isinstance(m, onednn.PackedConv2d) and m.in_place]
    assert in_place
    features = fast.backbone(torch.randn(1, 3, 64, 64))
    assert len({x.data_ptr() for x in features}) == len(features)  # no map was overwritten by the next


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no fused products here")
@pytest.mark.parametrize("groups", [1, 8])
@torch.no_grad()
def test_weights_are_laid_out_once_for_all_sizes_of_a_layout(groups):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    ours = onednn.PackedConv2d(plain, None, torch.float32, packed=True)
    weights = []
    for B, height, width in ((2, 9, 14), (2, 9, 14), (1, 9, 14), (2, 9, 15), (2, 31, 8), (2, 9, 14), (3, 31, 8)):
        x = torch.randn(B, 8, height, width)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        weights.append(id(ours.packed_weights[ours.layouts[x.shape[1:]]]))
    assert len(ours.layouts) == 3
    assert len(set(weights)) == len(ours.packed_weights)  # one of each layout, and none made anew


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no fused products here")
@torch.no_grad()
def test_layouts_of_weights_and_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(onednn, "MAX_INPUT_SIZES", 4)
    laid_out = torch.ops.mkldnn._get_mkldnn_serialized_md
    names = iter([0, 1, 0, 2, 3, 0, 1, 1, 1])  # layouts, as if oneDNN wanted these
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_get_mkldnn_serialized_md",
        lambda weight: torch.full_like(laid_out(weight), next(names)),
        raising=False,
    )
    plain = nn.Conv2d(4, 4, 3)
    ours = onednn.PackedConv2d(plain, None, torch.float32, packed=True)
    kept = []
    for width in (5, 6, 7, 8, 9, 7, 6, 9, 5):
        x = torch.randn(1, 4, 5, width)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        kept.append([layout[0] for layout in ours.packed_weights])
        assert len(ours.layouts) <= 4
    assert kept == [[0], [0, 1], [1, 0], [1, 0, 2], [0, 2, 3], [0, 2, 3], [2, 3, 0], [2, 3, 0], [3, 0, 1]]


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no fused products here")
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), (2, 2)), ((5, 5), (2, 2)), ((2, 2), (2, 2)), ((3, 4), (2, 3)), ((5, 5), (4, 3))]
)
@torch.no_grad()
def test_depthwise_convolutions_with_same_padding_copy_no_map(kernel, stride, monkeypatch):
    from timm.layers import padding
    from timm.layers.conv2d_same import Conv2dSame

    torch.manual_seed(0)
    plain = Conv2dSame(16, 16, kernel, stride=stride, groups=16)
    ours = onednn.PackedConv2d(plain, None, torch.float32, packed=True)
    sizes = [(height, width) for height in range(4, 12) for width in (5, 6, 7, 8)]
    images = [torch.randn(2, 16, *size) for size in sizes]
    wanted = [plain(x) for x in images]
    monkeypatch.delattr(padding, "pad_same")
    for x, y in zip(images, wanted, strict=True):
        for _ in range(2):  # the second time, with the weight that was kept
            torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no fused products here")
@pytest.mark.parametrize("settings", [{"groups": 1}, {"groups": 8}, {"kernel_size": 1}, {"dilation": 2}, {"stride": 1}])
@torch.no_grad()
def test_other_convolutions_with_same_padding(settings):
    from timm.layers.conv2d_same import Conv2dSame

    torch.manual_seed(0)
    plain = Conv2dSame(16, 16, **{"kernel_size": 3, "stride": 2, "groups": 16, **settings})
    ours = onednn.PackedConv2d(plain, None, torch.float32, packed=True)
    for size in ((9, 9), (8, 9), (9, 8), (8, 8)):
        x = torch.randn(1, 16, *size)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    plain = model()
    fast = plain.optimize(compile=True)
    for size, padded in ((1, False), (3, True)):
        pixels, mask = batch(size, padded)
        assert max(max_differences(plain(pixels, mask), fast(pixels, mask))) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_precisions(dtype):
    """Weights in float64 are loaded so, and predict and serve optimize what they load."""
    made = model("refine").to(dtype)
    optimized = made.optimize()
    assert optimized.pixel_mean.dtype == torch.float32
    pixels = torch.randn(1, 3, 64, 96)
    expected = made.float()(pixels)
    torch.testing.assert_close(optimized(pixels)["pred_boxes"], expected["pred_boxes"], atol=1e-4, rtol=0)
