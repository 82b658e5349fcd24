"""Compare the outputs of an exported file with the model's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.image_size import FixedSize
from ..model.mask_ops import MASK_OUTPUTS, has_masks, select_masks
from ..model.postprocess import clip_boxes_to_image, topk_boxes
from ..predict.predictor import Detector
from ..runtimes.detector import ExportedDetector
from ..runtimes.metadata import output_names
from ..utils.errors import UserError
from .graph import TOP_K

LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-3, 1e-4  # maximum differences of an fp32 file
MASK_IOU = 0.99  # minimum of an fp32 file
ATTEMPTS = 20
_DETECTIONS = ("pred_logits", "pred_boxes", "boxes", "scores", "labels")


@dataclass(frozen=True)
class VerifiedCase:
    """One input: its batch size, height and width, the maximum differences of logits and boxes, and the minimum IoU of
    a query's mask in the file and in the model; None without masks.
    """

    batch: int
    height: int
    width: int
    logits: float
    boxes: float
    mask_iou: float | None = None

    def __str__(self) -> str:
        masks = "" if self.mask_iou is None else f", mask IoU {self.mask_iou:.4f}"
        size = f"batch {self.batch} of {self.height}×{self.width}"
        return f"{size}: logits {self.logits:.1e}, boxes {self.boxes:.1e}{masks}"


def verify(
    model: Detector,
    exported: ExportedDetector,
    tolerances: tuple[float, float, float] = (LOGIT_TOLERANCE, BOX_TOLERANCE, MASK_IOU),
) -> list[VerifiedCase]:
    """Compare a file and a model (evaluation mode, fp32, CPU) on three batches of 1 to 5 images with padding.

    Raises UserError if a difference of logits or boxes exceeds its tolerance, or a mask's IoU is less than it.
    """
    cases = []
    side = min(model.config.image_size, 480)
    sizes = [(side, side * 4 // 3), (side * 2 // 3 | 1, side * 4 // 5 | 1), (side // 2 + 3, side // 3 | 1)]
    for batch, size in zip((1, 2, 5), sizes, strict=True):  # landscape, odd, portrait
        height, width = exported.canvas or size
        pixels, mask, expected = example_inputs(model, batch, height, width)
        case = VerifiedCase(batch, height, width, *max_differences(expected, exported(pixels, mask)))
        cases.append(case)
        same_masks = case.mask_iou is None or case.mask_iou >= tolerances[2]
        if not (case.logits <= tolerances[0] and case.boxes <= tolerances[1] and same_masks):  # also true for NaN
            limits = f"logits {tolerances[0]:.0e}, boxes {tolerances[1]:.0e}"
            limits += "" if case.mask_iou is None else f", mask IoU {tolerances[2]}"
            limits = f"(allowed: {limits}); nothing was written"
            with torch.inference_mode():
                scores = model.proposal_scores(pixels, mask)
            if math.isfinite(case.boxes) and _is_ambiguous(scores, model.config.num_queries):
                reason = "many proposals of the model have equal scores, so rounding selects its queries; train it more"
                raise UserError(f"refused: the file cannot be verified, {case} {limits}; {reason}")
            raise UserError(f"refused: the exported file differs from the model, {case} {limits}")
        if exported.metadata.post_processing:
            _verify_detections(exported, pixels, mask, case)
    return cases


def max_differences(expected: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[float, ...]:
    """Return the maximum differences of logits and boxes, inf if the shapes differ, and with masks the minimum IoU.

    Queries are matched first, because proposals with almost equal scores may swap places. Other outputs of a model
    are ignored.
    """
    from scipy.optimize import linear_sum_assignment

    keys = ("pred_logits", "pred_boxes")
    expected = {name: expected[name] for name in (*keys, *MASK_OUTPUTS) if name in expected}
    different = (float("inf"), float("inf"), 0.0)[: 3 if has_masks(expected) else 2]
    if any(name not in outputs or value.shape != outputs[name].shape for name, value in expected.items()):
        return different
    outputs = {name: outputs[name].cpu() for name in expected}
    if not all(bool(torch.isfinite(value).all()) for value in outputs.values()):
        return different
    orders, maxima = [], [0.0, 0.0]
    pairs = zip(*(expected[key] for key in keys), *(outputs[key] for key in keys), strict=True)
    for logits, boxes, out_logits, out_boxes in pairs:
        order = torch.arange(len(logits))
        if (logits - out_logits).abs().max() > LOGIT_TOLERANCE or (boxes - out_boxes).abs().max() > BOX_TOLERANCE:
            distance = torch.cdist(logits, out_logits, p=torch.inf) + 10 * torch.cdist(boxes, out_boxes, p=torch.inf)
            order = torch.from_numpy(np.asarray(linear_sum_assignment(distance.numpy())[1]))
        maxima[0] = max(maxima[0], float((logits - out_logits[order]).abs().max()))
        maxima[1] = max(maxima[1], float((boxes - out_boxes[order]).abs().max()))
        orders.append(order)
    if not has_masks(expected):
        return maxima[0], maxima[1]
    return maxima[0], maxima[1], _min_mask_iou(expected, outputs, torch.stack(orders))


def _min_mask_iou(expected: dict[str, Tensor], outputs: dict[str, Tensor], orders: Tensor) -> float:
    """Return the smallest IoU of the masks of a query. Cells whose logits are 0 up to rounding count as equal."""
    logits = select_masks(expected, torch.arange(orders.shape[1]).expand_as(orders))
    out_logits = select_masks(outputs, orders)
    masks = logits > 0
    out_masks = torch.where((logits - out_logits).abs() <= LOGIT_TOLERANCE, masks, out_logits > 0)
    union, intersection = (pair.flatten(2).sum(2) for pair in (masks | out_masks, masks & out_masks))
    return float(torch.where(union > 0, intersection / union, 1.0).min())


def example_inputs(model: Detector, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return pixels with smooth and rough areas, a mask, and the model's outputs.

    The images have different padding, but none if the model stretches images to one size: proposals in padding have
    equal scores there, and none occurs.
    """
    padded = 0 if isinstance(model.resize_rule, FixedSize) else batch
    for seed in range(ATTEMPTS):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(batch, 3, 5, 7, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        pixels += 0.3 * torch.randn(batch, 3, height, width, generator=generator)
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        for index in range(1, padded):
            mask[index, height - index * height // (2 * batch) :] = True
            mask[index, :, width - (batch - index) * width // (2 * batch) :] = True
        pixels = pixels.masked_fill(mask[:, None], 0.0)
        with torch.inference_mode():
            out, scores = model(pixels, mask), model.proposal_scores(pixels, mask)
        if not _is_ambiguous(scores, model.config.num_queries):
            break
    return pixels, mask, {key: out[key].clone() for key in output_names(model.config, False)}


def _is_ambiguous(scores: Tensor | None, count: int, gap: float = 1e-4) -> bool:
    """Return whether rounding could select other proposals: the last selected and first rejected score are close."""
    if scores is None or scores.shape[1] <= count:
        return False
    top = scores.topk(count + 1, dim=1).values
    return bool((top[:, count - 1] - top[:, count] < gap).any())


def _verify_detections(exported: ExportedDetector, pixels: Tensor, mask: Tensor, case: VerifiedCase) -> None:
    """Compare the post-processed outputs with our post-processing of the same file's logits and boxes."""
    sizes = torch.tensor([[101 + 7 * index, 203 - 5 * index] for index in range(len(pixels))])
    outputs = dict(zip(exported.metadata.outputs, exported.runtime([pixels, mask, sizes]), strict=True))
    logits, boxes, corners, scores, labels = (outputs[name] for name in _DETECTIONS)
    nms_iou = exported.config.nms_iou
    expected_corners, expected_scores, expected_labels, queries = topk_boxes(
        logits, boxes, sizes.float(), TOP_K, nms_iou
    )
    expected_scores = expected_scores.clamp(min=0)
    expected_corners = clip_boxes_to_image(expected_corners, sizes)
    # Ranks whose score no other detection has; the last one may have an equal that was not returned.
    differs = torch.nn.functional.pad(expected_scores.diff().abs() >= 1e-6, (1, 1), value=True)
    unique = differs[:, 1:] & differs[:, :-1]
    unique[:, -1] = False
    masks = outputs.get("masks")
    if not (
        scores.shape == expected_scores.shape
        and bool(((scores - expected_scores).abs() < 1e-5).all())
        and torch.equal(labels[unique], expected_labels[unique])
        and bool(((corners - expected_corners)[unique].abs() < 1e-2).all())
        and (masks is None or bool(((masks - select_masks(outputs, queries))[unique].abs() < 1e-2).all()))
    ):
        raise UserError(f"refused: the file's detections do not match its logits and boxes, {case}")
