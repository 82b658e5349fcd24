"""Masks in exported files: equal to the model's, verified, and used by predict and evaluate."""

import pytest
import torch

from deformable_detr import DeformableDETR, load_detector
from deformable_detr.config import presets
from deformable_detr.evaluation.evaluator import evaluate_dataset, open_eval_dataset
from deformable_detr.export import ExportOptions, export_model, load_exported
from deformable_detr.export.verify import MASK_IOU, max_differences, verify
from deformable_detr.model.mask_ops import select_masks
from deformable_detr.predict.predictor import forward
from deformable_detr.runtimes.detector import pad_to_canvas
from deformable_detr.structures import ImageBatch
from deformable_detr.utils.errors import UserError
from tests.support.training import write_dataset
from tests.support.transformers_models import write_repository

TARGETS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
PACKAGES = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino"), "torch": ()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = presets.small(
        backbone="test_resnet", backbone_weights="none", hidden_dim=32, num_heads=4, ffn_dim=48, encoder_layers=1,
        decoder_layers=2, num_queries=15, num_classes=3, image_size=96, num_feature_levels=3, masks=True,
    )  # fmt: skip
    model = DeformableDETR(config).eval()
    with torch.no_grad():  # masks with both signs, and classes that depend on the image
        for name, value in model.named_parameters():
            if name.startswith("mask_head"):
                value.normal_(0, 1.5 / max(1, value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1)
            if "heads.classes" in name and value.dim() > 1:
                value.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module", params=TARGETS)
def exported(request, model, tmp_path_factory):
    """A file with post-processing and a fixed canvas, and the lines of its report."""
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    lines = []
    path = tmp_path_factory.mktemp("files") / TARGETS[request.param]
    options = ExportOptions(post_processing=True, image_size=(96, 128))
    result = export_model(model, path, request.param, options, lines.append)
    assert all(case.mask_iou >= MASK_IOU for case in result.cases)
    assert any("mask IoU" in line for line in lines)
    return load_exported(path, "cpu")


def batch():
    """Return images that are smaller than the canvas and than one another."""
    pixels = torch.randint(0, 256, (2, 3, 64, 90), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask = torch.zeros(2, 64, 90, dtype=torch.bool)
    mask[1, 50:], mask[1, :, 80:] = True, True
    return ImageBatch(pixels.masked_fill(mask[:, None], 0), mask)


def test_predictions_have_the_masks_of_the_model(model, exported):
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ours, theirs = model.predict(image, 0.0, 5), exported.predict(image, 0.0, 5)
    assert exported.config.masks
    assert theirs.masks.shape == (5, 96, 128)
    with torch.inference_mode():
        outputs = forward(exported, batch())
    assert outputs["content_ratios"].tolist() == [
        [pytest.approx(64 / 96), pytest.approx(90 / 128)], [pytest.approx(50 / 96), pytest.approx(80 / 128)]
    ]  # fmt: skip
    union, intersection = ours.masks | theirs.masks, ours.masks & theirs.masks
    assert 0.001 < union.float().mean() < 0.99
    assert intersection.sum() > 0.99 * union.sum()


def test_the_file_has_the_masks_of_its_detections(exported):
    images = batch()
    normalized = images.normalize(exported.pixel_mean, exported.pixel_std)
    inputs = pad_to_canvas(normalized.pixels, normalized.padding_mask, (96, 128))
    values = exported.runtime([*inputs, torch.tensor([[64, 90]] * 2)])
    outputs = dict(zip(exported.metadata.outputs, values, strict=True))
    assert list(outputs) == [
        "pred_logits", "pred_boxes", "mask_embeddings", "mask_features", "boxes", "scores", "labels", "masks",
    ]  # fmt: skip
    assert outputs["masks"].shape == (2, 45, 24, 32)
    best = outputs["pred_logits"].flatten(1).topk(45, dim=1).indices // 3
    difference = (outputs["masks"] - select_masks(outputs, best)).flatten(2).abs().amax(2)
    assert (difference < 1e-3).float().mean() > 0.9  # others have equal scores


def test_verification_detects_other_masks(model, exported):
    runtime = exported.runtime

    def changed(change):
        def run(inputs):
            outputs = list(runtime(inputs))
            return change(outputs)

        return run

    def larger(outputs):
        outputs[3] = outputs[3] + 0.3
        return outputs

    def other_detections(outputs):
        outputs[-1] = outputs[-1].flip(1)
        return outputs

    assert len(verify(model, exported)) == 3
    for change, message in ((larger, "differs from the model.*mask IoU"), (other_detections, "do not match")):
        exported.runtime = changed(change)
        with pytest.raises(UserError, match=message):
            verify(model, exported)
    exported.runtime = runtime


def test_differences_of_masks():
    generator = torch.Generator().manual_seed(0)
    expected = {
        "pred_logits": torch.randn(1, 4, 3, generator=generator),
        "pred_boxes": torch.rand(1, 4, 4, generator=generator),
        "pred_masks": torch.randn(1, 4, 20, 20, generator=generator),
    }
    swapped = {name: value.flip(1) for name, value in expected.items()}
    assert max_differences(expected, swapped) == (0.0, 0.0, 1.0)
    rounding = {**expected, "pred_masks": expected["pred_masks"] - 5e-4}
    assert max_differences(expected, rounding)[2] == 1.0
    shifted = {**expected, "pred_masks": expected["pred_masks"].roll(1, dims=3)}
    assert max_differences(expected, shifted)[2] < 0.6
    assert max_differences(expected, {**expected, "pred_masks": expected["pred_masks"][:, :, :9]})[2] == 0.0
    missing = {name: value for name, value in expected.items() if name != "pred_masks"}
    assert max_differences(expected, missing)[0] == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_rf_detr_in_a_file(target, tmp_path):
    """The file is verified, and `evaluate` compares its masks."""
    pytest.importorskip("transformers")
    for package in PACKAGES[target]:
        pytest.importorskip(package)
    write_repository(tmp_path / "model", "rf_detr masks", names=["a", "b", "c"])
    data = write_dataset(tmp_path / "data", mask_every=1)
    model, path = load_detector(tmp_path / "model", "cpu"), tmp_path / TARGETS[target]
    result = export_model(model, path, target, ExportOptions(), print)
    assert all(case.mask_iou >= MASK_IOU for case in result.cases)
    expected = evaluate_dataset(model, open_eval_dataset(model, data), workers=0, progress=False)
    exported = load_exported(path, "cpu")
    metrics = evaluate_dataset(exported, open_eval_dataset(exported, data), workers=0, progress=False).metrics
    assert metrics["segm"]["AP"] == pytest.approx(expected.metrics["segm"]["AP"], abs=1e-6)
    assert len(expected.results) > 100
    assert all("segmentation" in row for row in expected.results)
