"""Two-stage: the encoder's own proposals become the decoder's queries (section 4.2, appendix A.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..config.schema import ModelConfig
from .geometry import proposal_anchors
from .heads import DetectionHeads
from .position_encoding import box_encoding


class Proposals(NamedTuple):
    """The best Q tokens as queries, and what was said of all S tokens.

    queries, query_position: (B, Q, C); no position where it follows from the boxes.
    reference_points: (B, Q, 4) cxcywh in 0..1.
    logits: (B, S, K), of which column 0 says "object", or each its class with class_aware_proposals.
    boxes: (B, S, 4) cxcywh in 0..1.
    """

    queries: Tensor
    query_position: Tensor | None
    reference_points: Tensor
    logits: Tensor
    boxes: Tensor


class TwoStageProposals(nn.Module):
    """Scores a box at every token and turns the best ones into queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.num_queries = config.num_queries
        self.class_aware_proposals, self.query_init = config.class_aware_proposals, config.query_init
        self.memory_proj = nn.Linear(C, C)
        self.memory_norm = nn.LayerNorm(C)
        # What is made from a proposal's box: the query's position, its content, or both (the paper).
        self.parts = (not config.iterative_query_pos, self.query_init == "box")
        if any(self.parts):
            self.query_proj = nn.Linear(2 * C, sum(self.parts) * C)
            self.query_norm = nn.LayerNorm(sum(self.parts) * C)
        if self.query_init == "learned":
            self.query_embedding = nn.Embedding(config.num_queries, C)

    def embed_boxes(self, boxes: Tensor, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Position and content, (B, Q, C) each or none, of queries that start at boxes (B, Q, 4) in 0..1."""
        if not any(self.parts):
            return None, None
        # In fp32 whatever the model's own precision: so the published weights were trained, and half would not do.
        encoded = box_encoding(boxes.float(), like.shape[-1] // 2).to(like.dtype)
        made = list(self.query_norm(self.query_proj(encoded)).split(like.shape[-1], dim=-1))
        position = made.pop(0) if self.parts[0] else None
        return position, made[0] if self.parts[1] else None

    def forward(
        self,
        memory: Tensor,
        spatial_shapes: ops.Shapes,
        valid_ratios: Tensor,
        padding_mask: Tensor | None,
        heads: DetectionHeads,
    ) -> Proposals:
        """memory: (B, S, C). valid_ratios: (B, L, 2). padding_mask: (B, S). Fewer tokens than queries: all serve."""
        anchors, usable = proposal_anchors(spatial_shapes, valid_ratios, padding_mask)
        tokens = memory.masked_fill(~usable[..., None], 0.0)
        tokens = self.memory_norm(self.memory_proj(tokens))
        logits, deltas = heads(tokens, -1)
        unactivated = deltas + anchors
        count = torch.sym_min(self.num_queries, memory.shape[1])  # `min`, but open in an exported graph
        scores = logits.amax(-1) if self.class_aware_proposals else logits[..., 0]
        best = scores.topk(count, dim=1).indices[..., None]  # (B, Q, 1)
        chosen = unactivated.gather(1, best.expand(-1, -1, 4)).detach().sigmoid()
        query_position, queries = self.embed_boxes(chosen, memory)
        if self.query_init == "encoder":
            queries = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1])).detach()
        elif self.query_init == "learned":
            queries = self.query_embedding.weight[:count].expand(memory.shape[0], -1, -1)
        assert queries is not None
        return Proposals(queries, query_position, chosen, logits, unactivated.sigmoid())
