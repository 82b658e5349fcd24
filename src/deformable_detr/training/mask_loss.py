"""Mask losses and matching costs at sampled points, so that their memory does not depend on the image size.

Sources: Mask2Former, section 3.2 (losses and costs at points); PointRend, section 3.3 (importance sampling). Predicted
masks are not cropped to boxes, so half of the points are anywhere in the image; half are near the object's box.

Dimensions: B images, Q queries, N objects, M objects with a mask, P points, D channels, K predictions of an object's
mask by all layers and denoising groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema import TrainConfig
from ..distributed.parallel import zero_with_gradient
from ..model.mask_ops import content_ratios
from ..structures import ImageBatch
from ..utils.dtype import upcast
from .denoising import BatchConsistentRng
from .matcher import Matches, PackedTargets

MASK_LOSS_NAMES = ("loss_mask", "loss_dice")
OVERSAMPLING, IMPORTANT = 3, 0.75  # candidates per point; the part of the points that are the most uncertain candidates
AREA = 1.5  # side of the area where an object's own points are, relative to its box
MIN_LOGIT = -8.0  # far outside of its box, a mask is not to be learned: the box is wrong
_CHUNK = 32  # objects whose candidates are sampled together


class MaskCriterion:
    """Cross-entropy and dice cost of masks for the matcher, and the losses of the matched pairs.

    Their inputs are the model's outputs, with what `draw_points` adds: "mask_features" (B, D, h, w),
    "layer_mask_embeddings" (layers, B, Q, D) and, with denoising, "denoising_mask_embeddings" (layers, B, X, D).
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.num_points = config, config.mask_points
        selected = round(IMPORTANT * self.num_points)
        # Random numbers per image: candidates, points that are not selected, points of the cost.
        self.draws = (OVERSAMPLING * self.num_points, self.num_points - selected, self.num_points)

    def draw_points(self, images: ImageBatch, rng: BatchConsistentRng | None) -> dict[str, Tensor]:
        """Return "mask_points" (B, sum(draws), 2), random numbers in 0..1, and "content_ratios" (see `mask_ops`).

        The numbers come from `rng`, by default PyTorch's global generator of the host, which a resumed run restores.
        """
        points = (rng or BatchConsistentRng()).uniform(torch.Size((len(images), sum(self.draws), 2)))
        ratios = content_ratios(images.padding_mask)
        return {"mask_points": points.to(ratios.device, non_blocking=True), "content_ratios": ratios}

    @torch.no_grad()
    def costs(self, outputs: Mapping[str, Tensor], targets: PackedTargets, layers: slice) -> Tensor:
        """Return the (N, layers, Q) cost of the masks; 0 for objects without one.

        All queries and objects of an image are compared at the same points: the first half of them anywhere in the
        image, then some of each object's area.
        """
        embeddings = outputs["layer_mask_embeddings"][layers]
        count, _, queries, _ = embeddings.shape
        costs = upcast(embeddings.new_zeros(len(targets.labels), count, queries))
        random = outputs["mask_points"].split(self.draws, dim=1)[2]
        first = 0
        for image, objects in enumerate(targets.host_mask_counts):
            if not objects:
                continue
            mine = slice(first, first := first + objects)
            masked = targets.masked[mine]
            boxes = targets.boxes[masked]
            anywhere, near = random[image].chunk(2)
            turn = torch.arange(len(near), device=boxes.device) % objects
            points = torch.cat([anywhere, _near_boxes(near[:, None], boxes[turn])[:, 0]])[None]
            features = _sample(outputs, points, masked.new_tensor([image]))[0]  # (P, D)
            logits = (upcast(embeddings[:, image]) @ features.T).clamp(min=MIN_LOGIT)  # (layers, Q, P)
            values = mask_values(targets.masks[mine], boxes, points.expand(objects, -1, -1))  # (objects, P)
            mask, dice = _pairwise(logits, values.to(logits))
            costs[masked] = (self.config.mask_cost * mask + self.config.dice_cost * dice).permute(2, 0, 1)
        return costs

    def losses(
        self,
        outputs: Mapping[str, Tensor],
        targets: PackedTargets,
        matches: Matches,
        denoising_matches: tuple[Matches, int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the losses, cross-entropy and dice, summed over the objects with a mask: (2, layers) of the matched
        queries, and (2,) of the denoising queries of all layers, averaged over their groups.

        matches: (layers, pairs), of the last decoder layers.
        """
        layers = len(matches.query)
        embeddings = outputs["layer_mask_embeddings"][-layers:]
        if not len(targets.masked):
            tensors = {name: value for name, value in outputs.items() if "mask_" in name}
            zero = zero_with_gradient(tensors) + upcast(embeddings.new_zeros(2, layers))
            return zero, None if denoising_matches is None else zero.sum(1)
        image, masked = targets.image[targets.masked], targets.masked
        # An object that no query is left for has weight 0.
        query = targets.image.new_zeros(layers, len(targets.labels)).scatter_(1, matches.target, matches.query)
        matched = torch.zeros_like(query).scatter_(1, matches.target, 1)[:, masked]
        layer = torch.arange(layers, device=query.device)[:, None]
        predictions = [embeddings[layer, image, query[:, masked]]]  # (layers, M, D)
        if denoising_matches is not None:
            pairs, groups = denoising_matches
            query = pairs.query.view(groups, -1)[:, masked]
            predictions.append(outputs["denoising_mask_embeddings"][:, image, query].flatten(0, 1))
        points = self._points(outputs, targets, predictions[0][-1].detach())
        features = _sample(outputs, points, image)  # (M, P, D)
        logits = upcast(torch.cat(predictions)).transpose(0, 1) @ features.transpose(1, 2)  # (M, K, P)
        logits = logits.clamp(min=MIN_LOGIT)
        values = mask_values(targets.masks, targets.boxes[masked], points)[:, None].to(logits)
        losses = torch.stack([_cross_entropy(logits, values), _dice(logits, values)])  # (2, M, K)
        own = (losses[..., :layers] * matched.T).sum(1)
        return own, None if denoising_matches is None else losses[..., layers:].sum((1, 2)) / groups

    @torch.no_grad()
    def _points(self, outputs: Mapping[str, Tensor], targets: PackedTargets, embeddings: Tensor) -> Tensor:
        """Return (M, P, 2) points in 0..1 of the image: where the last layer's masks are uncertain, and random ones.

        embeddings: (M, D) of the queries that the last layer's matches assign to the objects.
        """
        image, boxes = targets.image[targets.masked], targets.boxes[targets.masked]
        candidates, others, _ = outputs["mask_points"].split(self.draws, dim=1)
        candidates, others = (_half_near_boxes(part[image], boxes) for part in (candidates, others))
        chunks = zip(*(part.split(_CHUNK) for part in (candidates, image, upcast(embeddings))), strict=True)
        logits = [(_sample(outputs, points, index) @ rows[:, :, None])[..., 0] for points, index, rows in chunks]
        count = self.num_points - others.shape[1]
        uncertain = torch.cat(logits).abs().topk(count, dim=1, largest=False).indices
        return torch.cat([candidates.gather(1, uncertain[..., None].expand(-1, -1, 2)), others], dim=1)


def _near_boxes(random: Tensor, boxes: Tensor) -> Tensor:
    """Map random numbers (M, P, 2) to the area of each box (M, 4), inside the image."""
    centers, sizes = boxes[:, None, :2], boxes[:, None, 2:]
    low, high = ((centers + side * AREA / 2 * sizes).clamp(0, 1) for side in (-1, 1))
    return low + random * (high - low)


def _half_near_boxes(random: Tensor, boxes: Tensor) -> Tensor:
    """Map the second half of random numbers (M, P, 2) to the area of each box; the first is anywhere in the image."""
    anywhere, near = random.chunk(2, dim=1)
    return torch.cat([anywhere, _near_boxes(near, boxes)], dim=1)


def _sample(outputs: Mapping[str, Tensor], points: Tensor, image: Tensor) -> Tensor:
    """Interpolate the mask features at points (n, P, 2) in 0..1 of the images (n,): (n, P, D)."""
    canvas = points * outputs["content_ratios"].flip(1)[image][:, None]
    return sample_features(upcast(outputs["mask_features"]), canvas, image)


def sample_features(features: Tensor, points: Tensor, image: Tensor) -> Tensor:
    """Interpolate features (B, D, h, w) bilinearly at points (n, P, 2), x and y in 0..1 of the images (n,): (n, P, D).

    Like `grid_sample` with padding "border", but four times faster on CPUs: a point is a weighted bag of four pixels.
    """
    _, D, h, w = features.shape
    size = points.new_tensor([w, h])
    pixels = torch.minimum((points * size - 0.5).clamp(min=0), size - 1)
    low = pixels.floor()
    right, lower = (pixels - low).unbind(-1)
    left, upper = 1 - right, 1 - lower
    (x0, y0), (x1, y1) = (part.long().unbind(-1) for part in (low, torch.minimum(low + 1, size - 1)))
    y0, y1 = (image[:, None] * h + y for y in (y0, y1))
    rows = torch.stack([y0 * w + x0, y0 * w + x1, y1 * w + x0, y1 * w + x1], dim=-1)
    weights = torch.stack([upper * left, upper * right, lower * left, lower * right], dim=-1)
    table = features.permute(0, 2, 3, 1).reshape(-1, D)
    sums = F.embedding_bag(rows.view(-1, 4), table, mode="sum", per_sample_weights=weights.view(-1, 4).to(table.dtype))
    return sums.view(*points.shape[:2], D)


def mask_values(masks: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """Return the (M, P) coverage in 0..1 of masks (M, R, R) uint8 inside boxes (M, 4) at points (M, P, 2)."""
    grid = (points - boxes[:, None, :2]) * 2 / boxes[:, None, 2:].clamp(min=1e-6)
    values = F.grid_sample(masks[:, None].to(points.dtype), grid[:, None], align_corners=False)
    return values[:, 0, 0] / 255


def _cross_entropy(logits: Tensor, values: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, values.expand_as(logits), reduction="none").mean(-1)


def _dice(logits: Tensor, values: Tensor) -> Tensor:
    """Return the dice loss with one virtual point, as in Mask2Former; the last dimension is the points."""
    p = logits.sigmoid()
    return 1 - (2 * (p * values).sum(-1) + 1) / (p.sum(-1) + values.sum(-1) + 1)


def _pairwise(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return both losses of every mask (…, P) with every object (n, P): (…, n) each."""
    p = logits.sigmoid()
    overlap, total = p @ values.T, p.sum(-1, keepdim=True) + values.sum(-1)
    # The cross-entropy of x and t is softplus(x) − x · t.
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ values.T) / logits.shape[-1]
    return cross_entropy, 1 - (2 * overlap + 1) / (total + 1)
