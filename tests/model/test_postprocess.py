"""Selection of the best pairs against the plain definition, and its borders."""

import numpy as np
import pytest
import torch

from deformable_detr.model.postprocess import clip_boxes_to_image, postprocess


def outputs(B=2, Q=7, K=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, Q, K, generator=generator)
    centers = torch.rand(B, Q, 2, generator=generator)
    sizes = torch.rand(B, Q, 2, generator=generator) * 0.8
    return {"pred_logits": logits, "pred_boxes": torch.cat([centers, sizes], dim=-1)}


def by_definition(out, image, size, top_k):
    """All pairs of one image sorted by score, boxes by hand in float64."""
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
def test_equals_the_definition(top_k):
    out, sizes = outputs(), [(480, 640), (1000, 33)]
    for image, (boxes, scores, labels) in enumerate(postprocess(out, sizes, top_k)):
        expected = by_definition(out, image, sizes[image], top_k)
        assert labels.tolist() == [label for _, _, label, _ in expected]
        assert scores.tolist() == pytest.approx([score for score, *_ in expected], abs=1e-6)
        np.testing.assert_allclose(boxes.numpy(), [corners for *_, corners in expected], atol=1e-3)


def test_fewer_pairs_than_asked_for():
    out = outputs(Q=2, K=1)
    assert [len(found.scores) for found in postprocess(out, [(10, 10), (10, 10)], top_k=100)] == [2, 2]


def test_boxes_may_cross_the_border_and_are_cut_there_for_people():
    box = torch.tensor([[[0.0, 0.5, 1.0, 3.0]]])
    (found,) = postprocess({"pred_logits": torch.zeros(1, 1, 1), "pred_boxes": box}, [(30, 40)])
    assert found.boxes.tolist() == [[-20.0, -30.0, 20.0, 60.0]]
    assert clip_boxes_to_image(found.boxes[None], torch.tensor([[30, 40]])).tolist() == [[[0.0, 0.0, 20.0, 30.0]]]


def test_equals_what_transformers_makes_of_the_same_outputs():
    """To the bit: scores, labels, boxes and their order, for every number of them, also of those outside the image."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.DeformableDetrImageProcessor()
    for dtype in (torch.float32, torch.float64):
        out = {key: value.to(dtype) for key, value in outputs(B=3, Q=50, K=6).items()}
        there = type("Outputs", (), {"logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]})
        sizes = [(480, 640), (1000, 33), (1, 1)]
        for top_k in (1, 100, 1000):
            expected = processor.post_process_object_detection(there, 0.0, torch.tensor(sizes), top_k=top_k)
            for one, (boxes, scores, labels) in zip(expected, postprocess(out, sizes, top_k), strict=True):
                assert torch.equal(one["boxes"], boxes)
                assert torch.equal(one["scores"], scores)
                assert torch.equal(one["labels"], labels)
            assert min(found["boxes"].min() for found in expected) < 0 or top_k == 1


def test_one_query_may_give_several_classes():
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    (found,) = postprocess({"pred_logits": torch.tensor([[[1.0, 3.0]]]), "pred_boxes": box}, [(10, 10)])
    assert found.labels.tolist() == [1, 0]
    assert torch.equal(found.boxes[0], found.boxes[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_works_in_float32_whatever_the_model_gave(dtype):
    out = {key: value.to(dtype) for key, value in outputs().items()}
    full = {key: value.float() for key, value in out.items()}
    sizes = [(3000, 4000), (480, 640)]
    for half, exact in zip(postprocess(out, sizes), postprocess(full, sizes), strict=True):
        assert half.boxes.dtype == half.scores.dtype == torch.float32
        assert torch.equal(half.boxes, exact.boxes)
        assert torch.equal(half.scores, exact.scores)


def test_labels_survive_many_classes():
    logits = torch.full((1, 2, 20000), -5.0)
    logits[0, 1, 19999] = 2.0
    (found,) = postprocess({"pred_logits": logits, "pred_boxes": torch.rand(1, 2, 4)}, [(10, 10)], top_k=1)
    assert found.labels.tolist() == [19999]
    assert found.labels.dtype == torch.int64
