"""The prediction heads: class logits and boxes of decoder queries and encoder proposals."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from .layers import MLP


class DetectionHeads(nn.Module):
    """A class head and a box head: one pair for all layers, or a pair a layer with iterative refinement.

    With two-stage there is one pair more, the last, for the encoder's proposals.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pairs = config.decoder_layers + config.two_stage if config.refine else 1
        class_head = nn.Linear(config.hidden_dim, config.num_classes)
        # Focal prior: at the start every class has probability 1% (RetinaNet, section 4.1).
        nn.init.constant_(class_head.bias, -math.log(99))
        box_head = MLP(config.hidden_dim, config.hidden_dim, 4, layers=3)
        last = box_head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        boxes = [copy.deepcopy(box_head) for _ in range(pairs)]
        self.classes = nn.ModuleList(copy.deepcopy(class_head) for _ in range(pairs))
        self.boxes = nn.ModuleList(boxes)
        if not config.two_stage:
            # The first reference has no size yet: boxes start at sigmoid(−2) ≈ 12% of the image.
            with torch.no_grad():
                boxes[0].layers[-1].bias[2:] = -2.0  # type: ignore[index]

    def forward(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(…, C) → logits (…, K) and box deltas (…, 4) in logit space, both fp32 at least. layer −1: the encoder's."""
        index = layer if len(self.classes) > 1 else 0
        logits, deltas = self.classes[index](x), self.boxes[index](x)
        precision = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(precision), deltas.to(precision)
