"""Whether a file computes what its model does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..detector import DeformableDETR
from ..model.postprocess import clip_boxes_to_image, topk_boxes
from ..runtimes.detector import ExportedDetector
from ..utils.errors import UserError
from .graph import TOP_K

LOGITS, BOXES = 1e-3, 1e-4  # greatest differences of an fp32 file
ATTEMPTS = 20


@dataclass(frozen=True)
class Case:
    """One input: its batch, height and width, and the greatest differences found there."""

    batch: int
    height: int
    width: int
    logits: float
    boxes: float

    def __str__(self) -> str:
        return f"batch {self.batch} of {self.height}×{self.width}: logits {self.logits:.1e}, boxes {self.boxes:.1e}"


def cases(image_size: tuple[int, int] | None, short_side: int) -> list[tuple[int, int, int]]:
    """(batch, height, width) to verify: the size itself, or three sizes, odd and portrait ones too."""
    if image_size is not None:
        return [(batch, *image_size) for batch in (1, 2, 5)]
    side = min(short_side, 480)
    return [(1, side, side * 4 // 3), (2, side * 2 // 3 | 1, side * 4 // 5 | 1), (5, side // 2 + 3, side // 3 | 1)]


def verify(
    model: DeformableDETR, exported: ExportedDetector, tolerances: tuple[float, float] = (LOGITS, BOXES)
) -> list[Case]:
    """Compares the file with the model over `cases`; with more than one image a batch, with padding.

    model: in evaluation mode, fp32, on the CPU. Raises UserError for a difference over (logits, boxes) tolerances.
    """
    found = []
    for batch, height, width in cases(exported.canvas, model.config.image_size):
        pixels, mask, wanted = _inputs(model, batch, height, width)
        case = Case(batch, height, width, *difference(wanted, exported(pixels, mask)))
        found.append(case)
        # Written so that not-a-number fails too.
        if not (case.logits <= tolerances[0] and case.boxes <= tolerances[1]):
            raise UserError(
                f"refused: the exported file differs from the model, {case} "
                f"(allowed: logits {tolerances[0]:.0e}, boxes {tolerances[1]:.0e}); nothing was written"
            )
        if exported.described.post_processing:
            _verify_detections(exported, pixels, mask, case)
    return found


def difference(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, float]:
    """Greatest difference of logits and of boxes; inf where the shapes differ.

    Queries may stand in another order: proposals whose scores are a rounding apart swap places.
    """
    from scipy.optimize import linear_sum_assignment

    worst = [0.0, 0.0]
    for key in ("pred_logits", "pred_boxes"):
        if wanted[key].shape != got[key].shape:
            return float("inf"), float("inf")
    for logits, boxes, got_logits, got_boxes in zip(
        wanted["pred_logits"], wanted["pred_boxes"], got["pred_logits"].cpu(), got["pred_boxes"].cpu(), strict=True
    ):
        if not bool(torch.isfinite(got_logits).all() and torch.isfinite(got_boxes).all()):
            return float("inf"), float("inf")
        if float((logits - got_logits).abs().max()) > LOGITS or float((boxes - got_boxes).abs().max()) > BOXES:
            distance = torch.cdist(logits, got_logits, p=torch.inf) + 10 * torch.cdist(boxes, got_boxes, p=torch.inf)
            order = torch.from_numpy(np.asarray(linear_sum_assignment(distance.numpy())[1]))
            got_logits, got_boxes = got_logits[order], got_boxes[order]
        worst[0] = max(worst[0], float((logits - got_logits).abs().max()))
        worst[1] = max(worst[1], float((boxes - got_boxes).abs().max()))
    return worst[0], worst[1]


def _inputs(model: DeformableDETR, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images that are smooth in places and rough in others, in different paddings, and the model's outputs."""
    for seed in range(ATTEMPTS):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(batch, 3, 5, 7, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        pixels += 0.3 * torch.randn(batch, 3, height, width, generator=generator)
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        for index in range(1, batch):
            mask[index, height - index * height // (2 * batch) :] = True
            mask[index, :, width - (batch - index) * width // (2 * batch) :] = True
        pixels = pixels.masked_fill(mask[:, None], 0.0)
        with torch.inference_mode():
            out = model(pixels, mask)
        if not _on_the_edge(model, out):
            break
    return pixels, mask, {key: out[key].clone() for key in ("pred_logits", "pred_boxes")}


def _on_the_edge(model: DeformableDETR, out: dict[str, Tensor], gap: float = 1e-4) -> bool:
    """Whether the last proposal that became a query and the first that did not are a rounding apart.

    The least difference in the arithmetic would then choose another query, so such an input shows nothing.
    """
    if not model.config.two_stage:
        return False
    logits = out["encoder_logits"]
    scores = logits.amax(-1) if model.config.class_aware_proposals else logits[..., 0]
    count = model.config.num_queries
    if scores.shape[1] <= count:
        return False
    best = scores.topk(count + 1, dim=1).values
    return bool((best[:, count - 1] - best[:, count] < gap).any())


def _verify_detections(exported: ExportedDetector, pixels: Tensor, mask: Tensor, case: Case) -> None:
    """The post-processed outputs against the rule they follow, applied to the same file's raw outputs."""
    sizes = torch.tensor([[101 + 7 * index, 203 - 5 * index] for index in range(len(pixels))])
    logits, boxes, corners, scores, labels = exported.runtime([pixels, mask, sizes])
    wanted_corners, wanted_scores, wanted_labels = topk_boxes(logits, boxes, sizes.float(), TOP_K)
    wanted_corners = clip_boxes_to_image(wanted_corners, sizes)
    clear = torch.ones_like(scores, dtype=torch.bool)  # ranks of which no other pair has the same score
    equal = (wanted_scores[:, 1:] - wanted_scores[:, :-1]).abs() < 1e-6
    clear[:, 1:] &= ~equal
    clear[:, :-1] &= ~equal
    clear[:, -1] = False
    fits = scores.shape == wanted_scores.shape and bool(((scores - wanted_scores).abs() < 1e-5).all())
    if not (fits and torch.equal(labels[clear], wanted_labels[clear])
            and bool(((corners - wanted_corners)[clear].abs() < 1e-2).all())):  # fmt: skip
        raise UserError(f"refused: the exported file's detections are not those of its logits and boxes, {case}")
