"""Parts of an export: folded batch norms, dynamic padding, gather sampling, output comparison."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from deformable_detr import ops
from deformable_detr.export.graph import EXAMPLE, DynamicSameConv2d, parse_size
from deformable_detr.export.verify import max_differences
from deformable_detr.model.layers import resize_mask
from deformable_detr.model.position_encoding import _resize_table
from deformable_detr.runtimes.fused.folding import fold_batch_norms
from deformable_detr.utils.errors import UserError
from tests.support.models import randomized


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norms_are_folded(name, frozen):
    import timm
    from timm.layers.norm_act import freeze_batch_norm_2d

    torch.manual_seed(0)
    body = randomized(timm.create_model(name, features_only=True, out_indices=(2, 3)))
    norms = sum("Batch" in type(module).__name__ for module in body.modules())
    if frozen:
        body = freeze_batch_norm_2d(body)
    pixels = torch.randn(2, 3, 65, 70)
    with torch.no_grad():
        before = body(pixels)
        assert fold_batch_norms(body, torch.zeros(1, 3, 64, 64)) == norms > 0
        after = body(pixels)
    assert not any("Batch" in type(module).__name__ for module in body.modules())
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_norm_used_twice_is_not_folded():
    class SharedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.b(self.norm(self.a(x))))

    body = randomized(SharedNorm())
    assert fold_batch_norms(body, torch.zeros(1, 3, 8, 8)) == 0
    assert isinstance(body.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (1, 2, 1), (3, 1, 2)])
def test_same_padding(kernel, stride, dilation):
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    theirs = Conv2dSame(3, 4, kernel, stride=stride, dilation=dilation)
    ours = DynamicSameConv2d(theirs)
    for size in ((7, 8), (16, 15), (9, 33)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(theirs(x), ours(x))


def test_symbolic_sizes_stay_short():
    """Nested halvings must simplify: with 500 characters per size, tracing takes twice as long and loading minutes."""
    from timm.layers import Conv2dSame

    halvings = nn.Sequential(*(DynamicSameConv2d(Conv2dSame(3, 3, kernel, stride=2)) for kernel in (3, 3, 5, 3, 5, 3)))
    shapes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    graph = torch.export.export(halvings, (torch.zeros(1, 3, *EXAMPLE[1:]),), dynamic_shapes=shapes).graph
    values = (node.meta.get("val") for node in graph.nodes)
    sizes = {str(size) for value in values if isinstance(value, torch.Tensor) for size in value.shape}
    assert any("//8" in size for size in sizes)  # height of the finest level
    assert max(map(len, sizes)) < 50  # 23; (size + stride - 1) // stride would give 87


@pytest.mark.parametrize("reference", [2, 4])
def test_gather_matches_the_reference(reference):
    torch.manual_seed(0)
    shapes = ((5, 7), (3, 4))
    B, Q, M, D, L, P = 2, 9, 3, 4, 2, 4
    value = torch.randn(B, 47, M, D, dtype=torch.float64)
    points = torch.rand(B, Q, L, reference, dtype=torch.float64)
    offsets = 6 * torch.randn(B, Q, M, L, P, 2, dtype=torch.float64)
    offsets[0, 0, 0, 0] = float("nan")
    offsets[0, 1, 0, 0] = 1e12
    inputs = value, shapes, points, offsets, torch.randn(B, Q, M, L, P, dtype=torch.float64)
    with ops.use_backend("reference"):
        expected = ops.deformable_attention(*inputs)
    with ops.use_backend("gather"):
        torch.testing.assert_close(ops.deformable_attention(*inputs), expected)


def test_export_code_paths_match_eager(monkeypatch):
    torch.manual_seed(0)
    table = torch.rand(50, 6)
    shapes = [(h, w, -(-h // s), -(-w // s)) for h, w in ((203, 331), (210, 333), (64, 65)) for s in (8, 16, 32, 64)]
    masks = [torch.rand(2, h, w) < 0.5 for h, w, _, _ in shapes]
    lengths = (1, 2, 49, 50, 51, 77, 200)

    def compute():
        small = [resize_mask(mask, (h, w)) for mask, (_, _, h, w) in zip(masks, shapes, strict=True)]
        return small, [_resize_table(table, length) for length in lengths]

    eager = compute()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    exported = compute()
    for one, other in zip(eager[0], exported[0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(eager[1], exported[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_max_differences():
    torch.manual_seed(0)
    expected = {"pred_logits": torch.randn(2, 6, 3), "pred_boxes": torch.rand(2, 6, 4)}
    order = torch.tensor([1, 0, 2, 5, 4, 3])
    swapped = {key: value[:, order] for key, value in expected.items()}
    assert max_differences(expected, swapped) == (0.0, 0.0)
    for key, index in (("pred_logits", 0), ("pred_boxes", 1)):
        changed = {name: value.clone() for name, value in swapped.items()}
        changed[key][1, 2, 0] += 0.01
        assert max_differences(expected, changed)[index] == pytest.approx(0.01, abs=1e-5)
    # Swapping the boxes but not the logits of two queries is not a permutation.
    crossed = {"pred_logits": expected["pred_logits"], "pred_boxes": expected["pred_boxes"][:, order]}
    assert max(max_differences(expected, crossed)) > 0.01
    swapped["pred_logits"][0, 0, 0] = float("nan")
    assert max_differences(expected, swapped) == (float("inf"), float("inf"))
    inf = float("inf")
    assert max_differences(expected, {**expected, "pred_boxes": expected["pred_boxes"][:, :5]}) == (inf, inf)


def test_sizes():
    assert parse_size("dynamic") is None
    assert parse_size("480,640") == (480, 640)
    for text in ("480", "480x640", "0,5", "-3,4", "a,b"):
        with pytest.raises(UserError, match="--image-size"):
            parse_size(text)
