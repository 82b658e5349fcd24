"""Masks from logits: resized to the image, selected, encoded."""

import pytest
import torch
from torch.nn import functional as F

from deformable_detr.model.mask_ops import MaskLogits, content_ratios, select_masks
from deformable_detr.model.postprocess import postprocess, to_detections, topk_boxes
from deformable_detr.structures import Category
from deformable_detr.utils.rle import decode_masks, encode_masks


@pytest.mark.parametrize("size", [(37, 53), (160, 160), (11, 300), (3, 2)])
def test_masks_are_the_positive_part_of_the_interpolated_logits(size):
    logits = F.avg_pool2d(torch.randn(5, 24, 24, generator=torch.Generator().manual_seed(0)), 5, 1, 2) - 0.05
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0] > 0
    masks = decode_masks(MaskLogits(logits, (1.0, 1.0)).to_rle(size), size)
    assert (masks != expected).float().mean() < 1e-3  # rounding where a value is nearly 0
    assert masks.any()


def test_small_masks_at_the_border_and_empty_masks():
    logits = torch.full((3, 10, 10), -1.0)
    logits[0, 0, 0] = logits[1, 9, 9] = 5.0
    expected = F.interpolate(logits[None], (95, 61), mode="bilinear", align_corners=False)[0] > 0
    masks = decode_masks(MaskLogits(logits, (1.0, 1.0)).to_rle((95, 61)), (95, 61))
    assert torch.equal(masks, expected)
    assert masks.flatten(1).any(1).tolist() == [True, True, False]


def test_padding_is_left_out():
    whole = F.avg_pool2d(torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(1)), 3, 1, 1)
    padded = F.pad(whole, (0, 12, 0, 4), value=9.0)
    plain = MaskLogits(whole, (1.0, 1.0)).to_rle((120, 200))
    cut = MaskLogits(padded, (12 / 16, 20 / 32)).to_rle((120, 200))
    inner = [
        decode_masks(rle, (120, 200))[:, :114, :194] for rle in (plain, cut)
    ]  # the last half cell sees the padding
    assert torch.equal(*inner)


def test_embeddings_and_dense_logits_give_the_same_masks():
    embeddings, features = torch.randn(2, 7, 4), torch.randn(2, 4, 6, 5)
    dense = torch.einsum("bqd,bdhw->bqhw", embeddings, features)
    queries = torch.tensor([[3, 0, 3], [6, 1, 2]])
    factored = select_masks({"mask_embeddings": embeddings, "mask_features": features}, queries)
    assert torch.allclose(factored, select_masks({"pred_masks": dense}, queries), atol=1e-5)
    assert torch.equal(select_masks({"pred_masks": dense}, queries)[1, 2], dense[1, 2])


def test_detections_have_the_masks_of_their_queries():
    logits = torch.tensor([[[-5.0, 3.0], [4.0, -5.0], [-5.0, -5.0]]])
    masks = torch.full((1, 3, 4, 4), -1.0)
    masks[0, 0, :2], masks[0, 1, 2:] = 1.0, 1.0
    outputs = {"pred_logits": logits, "pred_boxes": torch.full((1, 3, 4), 0.5), "pred_masks": masks}
    outputs["content_ratios"] = torch.ones(1, 2)
    [scored] = postprocess(outputs, [(8, 6)])
    detections = to_detections(scored, (8, 6), 0.5, [Category(1, "a"), Category(2, "b")])
    assert detections.names == ("a", "b")
    assert detections.masks is not None
    assert detections.masks.shape == (2, 8, 6)
    assert detections.masks[0, 5:].all()
    assert not detections.masks[0, :3].any()
    assert detections.masks[1, :3].all()
    assert not detections.masks[1, 5:].any()


def test_rle_is_the_same_after_a_round_trip():
    masks = torch.rand(3, 13, 9) > 0.5
    assert torch.equal(decode_masks(encode_masks(masks), (13, 9)), masks)
    assert decode_masks((), (4, 5)).shape == (0, 4, 5)


def test_content_ratios():
    padding = torch.ones(2, 10, 20, dtype=torch.bool)
    padding[0, :5, :15] = padding[1] = False
    assert content_ratios(padding).tolist() == [[0.5, 0.75], [1.0, 1.0]]


@pytest.mark.parametrize("factored", [False, True])
def test_only_masks_over_the_threshold_are_computed(monkeypatch, factored):
    """The detections are the same, in a batch of images that differ in their number."""
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "pred_logits": torch.randn(2, 9, 3, generator=generator) + torch.tensor([0.0, -1.0])[:, None, None],
        "pred_boxes": torch.rand(2, 9, 4, generator=generator),
        "content_ratios": torch.tensor([[1.0, 0.5], [0.75, 1.0]]),
    }
    if factored:
        outputs["mask_embeddings"] = torch.randn(2, 9, 4, generator=generator)
        outputs["mask_features"] = torch.randn(2, 4, 6, 5, generator=generator)
    else:
        outputs["pred_masks"] = torch.randn(2, 9, 6, 5, generator=generator)
    sizes, categories = [(30, 20), (40, 50)], [Category(label, f"{label}") for label in range(3)]
    everything, selected = postprocess(outputs, sizes), postprocess(outputs, sizes, threshold=0.4)
    counts = [len(scored.masks.logits) for scored in selected]
    assert counts == [int((scored.scores >= 0.4).sum()) for scored in everything]
    assert counts[0] > counts[1] > 0
    queries = topk_boxes(outputs["pred_logits"], outputs["pred_boxes"], torch.tensor(sizes), 100)[3]
    expected = select_masks(outputs, queries)
    assert all(torch.allclose(scored.masks.logits, masks) for scored, masks in zip(everything, expected, strict=True))
    assert not torch.allclose(*expected)
    for a, b, size in zip(everything, selected, sizes, strict=True):
        assert to_detections(a, size, 0.4, categories).to_dict() == to_detections(b, size, 0.4, categories).to_dict()
    boxes = {key: outputs[key] for key in ("pred_logits", "pred_boxes")}
    assert [len(scored.scores) for scored in postprocess(boxes, sizes, threshold=0.4)] == [27, 27]
