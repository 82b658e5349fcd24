"""The prediction heads: class logits and box deltas of decoder queries and encoder proposals."""

import copy
import math

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.dtype import upcast
from .layers import MLP

PRIOR_LOGIT = -math.log(99)  # class bias for an initial probability of 1% (focal prior; RetinaNet, section 4.1)


class DetectionHeads(nn.Module):
    """A class head and a box head, shared by all layers, or one pair per layer with iterative refinement.

    A two-stage model has one more pair, for the encoder's proposals, and a model with an RoI head one more, the last.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        extra = int(config.two_stage) + bool(config.roi_grid)
        pairs = config.decoder_layers + extra if config.refine else 1
        self.proposals = config.decoder_layers  # index of their pair
        self.last = pairs - 1 if config.roi_grid else config.decoder_layers - 1  # index of the pair that predicts
        class_head = nn.Linear(config.hidden_dim, config.num_classes)
        nn.init.constant_(class_head.bias, PRIOR_LOGIT)
        box_head = MLP(config.hidden_dim, config.hidden_dim, 4, layers=3)
        last = box_head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.classes = nn.ModuleList(copy.deepcopy(class_head) for _ in range(pairs))
        self.boxes = nn.ModuleList(copy.deepcopy(box_head) for _ in range(pairs))
        if not config.two_stage:
            # Reference points have no size: boxes start at sigmoid(−2) ≈ 12% of the image.
            with torch.no_grad():
                self.boxes[0].layers[-1].bias[2:] = -2.0  # type: ignore[index]

    def forward(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Predict logits (…, K) and box deltas (…, 4) in logit space from (…, C), in at least fp32.

        layer: The decoder layer, `self.proposals`, or `self.last` for the RoI head.
        """
        index = layer if len(self.classes) > 1 else 0
        return upcast(self.classes[index](x)), self.deltas(x, layer)

    def deltas(self, x: Tensor, layer: int) -> Tensor:
        """Predict only the box deltas."""
        return upcast(self.boxes[layer if len(self.boxes) > 1 else 0](x))
