"""Top-k selection compared with a plain implementation and with transformers."""

import numpy as np
import pytest
import torch

from deformable_detr.model.postprocess import clip_boxes_to_image, non_maximum_suppression, postprocess


def outputs(B=2, Q=7, K=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, Q, K, generator=generator)
    centers = torch.rand(B, Q, 2, generator=generator)
    sizes = torch.rand(B, Q, 2, generator=generator) * 0.8
    return {"pred_logits": logits, "pred_boxes": torch.cat([centers, sizes], dim=-1)}


def reference_detections(out, image, size, top_k):
    """Sort all (query, class) pairs of one image by score, with boxes in float64."""
    height, width = size
    pairs = []
    for query, (logits, box) in enumerate(
        zip(out["pred_logits"][image].tolist(), out["pred_boxes"][image].tolist(), strict=True)
    ):
        cx, cy, w, h = box
        corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        pairs += [(1 / (1 + np.exp(-logit)), query, label, corners) for label, logit in enumerate(logits)]
    return sorted(pairs, reverse=True)[:top_k]


@pytest.mark.parametrize("top_k", [1, 10, 21])
def test_postprocess_matches_reference(top_k):
    out, sizes = outputs(), [(480, 640), (1000, 33)]
    for image, (boxes, scores, labels, *_) in enumerate(postprocess(out, sizes, top_k)):
        expected = reference_detections(out, image, sizes[image], top_k)
        assert labels.tolist() == [label for _, _, label, _ in expected]
        assert scores.tolist() == pytest.approx([score for score, *_ in expected], abs=1e-6)
        np.testing.assert_allclose(boxes.numpy(), [corners for *_, corners in expected], atol=1e-3)


def test_top_k_is_clamped_to_the_number_of_pairs():
    out = outputs(Q=2, K=1)
    assert [len(detections.scores) for detections in postprocess(out, [(10, 10), (10, 10)], top_k=100)] == [2, 2]


def test_boxes_are_clipped_by_clip_boxes_to_image_only():
    box = torch.tensor([[[0.0, 0.5, 1.0, 3.0]]])
    (detections,) = postprocess({"pred_logits": torch.zeros(1, 1, 1), "pred_boxes": box}, [(30, 40)])
    assert detections.boxes.tolist() == [[-20.0, -30.0, 20.0, 60.0]]
    assert clip_boxes_to_image(detections.boxes[None], torch.tensor([[30, 40]])).tolist() == [[[0.0, 0.0, 20.0, 30.0]]]


def test_postprocess_matches_transformers():
    """Bit for bit: scores, labels, boxes and order, for any top_k, boxes outside the image included."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.DeformableDetrImageProcessor()
    for dtype in (torch.float32, torch.float64):
        out = {key: value.to(dtype) for key, value in outputs(B=3, Q=50, K=6).items()}
        transformers_outputs = type("Outputs", (), {"logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]})
        sizes = [(480, 640), (1000, 33), (1, 1)]
        for top_k in (1, 100, 1000):
            expected = processor.post_process_object_detection(
                transformers_outputs, 0.0, torch.tensor(sizes), top_k=top_k
            )
            for item, (boxes, scores, labels, *_) in zip(expected, postprocess(out, sizes, top_k), strict=True):
                assert torch.equal(item["boxes"], boxes)
                assert torch.equal(item["scores"], scores)
                assert torch.equal(item["labels"], labels)
            assert min(detections["boxes"].min() for detections in expected) < 0 or top_k == 1


def test_one_query_can_yield_several_classes():
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    (detections,) = postprocess({"pred_logits": torch.tensor([[[1.0, 3.0]]]), "pred_boxes": box}, [(10, 10)])
    assert detections.labels.tolist() == [1, 0]
    assert torch.equal(detections.boxes[0], detections.boxes[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_processed_in_float32(dtype):
    out = {key: value.to(dtype) for key, value in outputs().items()}
    full = {key: value.float() for key, value in out.items()}
    sizes = [(3000, 4000), (480, 640)]
    for half, exact in zip(postprocess(out, sizes), postprocess(full, sizes), strict=True):
        assert half.boxes.dtype == half.scores.dtype == torch.float32
        assert torch.equal(half.boxes, exact.boxes)
        assert torch.equal(half.scores, exact.scores)


def test_labels_are_exact_with_20000_classes():
    logits = torch.full((1, 2, 20000), -5.0)
    logits[0, 1, 19999] = 2.0
    (detections,) = postprocess({"pred_logits": logits, "pred_boxes": torch.rand(1, 2, 4)}, [(10, 10)], top_k=1)
    assert detections.labels.tolist() == [19999]
    assert detections.labels.dtype == torch.int64


@pytest.mark.parametrize("iou", [0.3, 0.7])
def test_nms_equals_torchvisions(iou):
    from torchvision.ops import batched_nms, box_convert

    torch.manual_seed(0)
    boxes = torch.rand(8, 120, 4) * torch.tensor([0.5, 0.5, 0.3, 0.3]) + 0.1
    labels = torch.randint(0, 3, (8, 120))
    kept = non_maximum_suppression(boxes, labels, iou)
    assert 0 < kept.sum() < kept.numel()
    for image, mask in enumerate(kept):
        scores = torch.arange(120, 0, -1).float()
        expected = batched_nms(box_convert(boxes[image], "cxcywh", "xyxy"), scores, labels[image], iou)
        assert mask.nonzero().flatten().tolist() == sorted(expected.tolist())


def test_nms_keeps_the_better_of_two_and_other_classes():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.21], [0.2, 0.2, 0.1, 0.1]]])
    logits = torch.tensor([[[1.0, 0.5], [2.0, -5.0], [0.0, -6.0]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    [detections] = postprocess(outputs, [(10, 10)], nms_iou=0.7)
    assert list(zip(detections.queries.tolist(), detections.labels.tolist(), strict=True)) == [
        (1, 0), (0, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [
        len(postprocess(outputs, [(10, 10)])[0].scores),
        len(postprocess(outputs, [(10, 10)], top_k=2)[0].scores),
    ] == [6, 2]
    assert postprocess(outputs, [(10, 10)], top_k=2, nms_iou=0.7)[0].queries.tolist() == [1, 0]


def test_nms_of_a_graph_equals_nms():
    class Graph(torch.nn.Module):
        def forward(self, boxes, labels):
            return non_maximum_suppression(boxes, labels, 0.5)

    torch.manual_seed(0)
    boxes = torch.rand(4, 100, 4) * torch.tensor([0.5, 0.5, 0.3, 0.3]) + 0.1
    labels = torch.randint(0, 3, (4, 100))
    graph = torch.export.export(Graph(), (boxes, labels)).module()
    assert torch.equal(graph(boxes, labels), non_maximum_suppression(boxes, labels, 0.5))
