"""Two-stage: the encoder's best proposals become the decoder's queries (section 4.2, appendix A.4)."""

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from .decoder import Queries
from .geometry import FlattenedFeatures, proposal_anchors
from .heads import DetectionHeads
from .position_encoding import box_encoding


class TwoStageProposals(nn.Module):
    """Score a box at every token and turn the best ones into queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.num_queries = config.num_queries
        self.class_aware_proposals, self.query_init = config.class_aware_proposals, config.query_init
        self.memory_proj = nn.Linear(C, C)
        self.memory_norm = nn.LayerNorm(C)
        # In the paper a proposal's box gives both the query's position and its content.
        self.position_from_box = not config.iterative_query_pos
        self.content_from_box = self.query_init == "box"
        parts = int(self.position_from_box) + int(self.content_from_box)
        if parts:
            self.query_proj = nn.Linear(2 * C, parts * C)
            self.query_norm = nn.LayerNorm(parts * C)
        if self.query_init == "learned":
            self.query_embedding = nn.Embedding(config.num_queries, C)

    def embed_boxes(self, boxes: Tensor, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return position and content (B, Q, C) of boxes (B, Q, 4); None for a part that does not come from the box.

        like: A tensor (…, C) that gives C and the result's dtype.
        """
        if not (self.position_from_box or self.content_from_box):
            return None, None
        # Encoded in fp32, as the published weights were trained; half precision is too coarse.
        encoding = box_encoding(boxes.float(), like.shape[-1] // 2).to(like.dtype)
        parts = list(self.query_norm(self.query_proj(encoding)).split(like.shape[-1], dim=-1))
        position = parts.pop(0) if self.position_from_box else None
        return position, parts[0] if self.content_from_box else None

    def forward(
        self, memory: Tensor, features: FlattenedFeatures, heads: DetectionHeads
    ) -> tuple[Queries, Tensor, Tensor]:
        """Return the Q best tokens of the memory (B, S, C) as queries, and logits (B, S, K) and boxes (B, S, 4) of all.

        If S < Q, all tokens become queries.
        """
        anchors, valid = proposal_anchors(features.spatial_shapes, features.valid_ratios, features.padding_mask)
        tokens = memory.masked_fill(~valid[..., None], 0.0)
        tokens = self.memory_norm(self.memory_proj(tokens))
        logits, deltas = heads(tokens, heads.proposals)
        box_logits = deltas + anchors
        count = torch.sym_min(self.num_queries, memory.shape[1])  # `min` would fix S in an exported graph
        scores = logits.amax(-1) if self.class_aware_proposals else logits[..., 0]
        best = scores.topk(count, dim=1).indices[..., None]  # (B, Q, 1)
        boxes = box_logits.gather(1, best.expand(-1, -1, 4)).detach().sigmoid()
        position, content = self.embed_boxes(boxes, memory)
        if self.query_init == "encoder":
            content = tokens.gather(1, best.expand(-1, -1, tokens.shape[-1])).detach()
        elif self.query_init == "learned":
            content = self.query_embedding.weight[:count].expand(memory.shape[0], -1, -1)
        assert content is not None
        return Queries(content, position, boxes), logits, box_logits.sigmoid()
