"""Two-stage: the encoder's own proposals become the decoder's queries (section 4.2, appendix A.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..config import ModelConfig
from .encoder import pixel_centres
from .heads import Heads
from .position import box_encoding

BASE_SIZE = 0.05  # side of a proposal at the finest level, relative to the image; doubles from level to level


class Proposals(NamedTuple):
    """The best Q tokens as queries, and what was said of all S tokens.

    queries, query_position: (B, Q, C). reference_points: (B, Q, 4) cxcywh in 0..1.
    logits: (B, S, K), of which column 0 says "object". boxes: (B, S, 4) cxcywh in 0..1.
    """

    queries: Tensor
    query_position: Tensor
    reference_points: Tensor
    logits: Tensor
    boxes: Tensor


class ProposalStage(nn.Module):
    """Scores a box at every token and turns the best ones into queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.num_queries = config.num_queries
        self.memory_proj = nn.Linear(C, C)
        self.memory_norm = nn.LayerNorm(C)
        self.query_proj = nn.Linear(2 * C, 2 * C)
        self.query_norm = nn.LayerNorm(2 * C)

    def forward(
        self,
        memory: Tensor,
        spatial_shapes: ops.Shapes,
        valid_ratios: Tensor,
        padding_mask: Tensor | None,
        heads: Heads,
    ) -> Proposals:
        """memory: (B, S, C). valid_ratios: (B, L, 2). padding_mask: (B, S). Fewer tokens than queries: all serve."""
        anchors, usable = proposal_anchors(spatial_shapes, valid_ratios, padding_mask)
        tokens = memory.masked_fill(~usable[..., None], 0.0)
        tokens = self.memory_norm(self.memory_proj(tokens))
        logits, deltas = heads(tokens, -1)
        unactivated = deltas + anchors
        count = min(self.num_queries, memory.shape[1])
        best = logits[..., 0].topk(count, dim=1).indices  # (B, Q)
        chosen = unactivated.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        encoded = box_encoding(chosen, memory.shape[-1] // 2).to(memory.dtype)
        query_position, queries = self.query_norm(self.query_proj(encoded)).chunk(2, dim=-1)
        return Proposals(queries, query_position, chosen, logits, unactivated.sigmoid())


def proposal_anchors(
    spatial_shapes: ops.Shapes, valid_ratios: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A box around each token, in logit space (B, S, 4), and which tokens can be proposals, (B, S).

    Tokens in the padding or within 1% of the image's border are not usable; their logits are +inf.
    """
    centres = pixel_centres(spatial_shapes, valid_ratios)  # (B, S, 2)
    sizes = [centres.new_full((h * w,), BASE_SIZE * 2**level) for level, (h, w) in enumerate(spatial_shapes)]
    boxes = torch.cat((centres, torch.cat(sizes)[None, :, None].expand(len(centres), -1, 2)), dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if padding_mask is not None:
        usable = usable & ~padding_mask
    return torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], torch.inf), usable
