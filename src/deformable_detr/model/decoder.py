"""The decoder: queries talk to each other, read the encoder's memory and refine their boxes (section 4.1, A.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config.schema import ModelConfig
from .attention import DeformableAttention, SamplingDetails
from .geometry import refine_boxes
from .heads import DetectionHeads
from .layers import MLP, Dropout, FeedForward
from .position_encoding import box_encoding


class DecoderOutput(NamedTuple):
    """What each decoder layer says. N: layers.

    logits: (N, B, Q, K). boxes: (N, B, Q, 4) cxcywh in 0..1.
    reference_points: (N, B, Q, 2 or 4), what each layer started from, 0..1 of the unpadded image.
    details: of each layer, empty unless asked for.
    """

    logits: Tensor
    boxes: Tensor
    reference_points: list[Tensor]
    details: list[SamplingDetails]


class DenoisingQueries(NamedTuple):
    """Queries beside the model's own, for training only (denoising, more queries an object). N: their number.

    queries: (B, N, C). boxes: (B, N, 4) cxcywh in 0..1, where they start.
    attn_mask: (N + Q, N + Q) bool, True = the row's query does not see the column's; the extra ones come first.
    """

    queries: Tensor
    boxes: Tensor
    attn_mask: Tensor


class SelfAttention(nn.MultiheadAttention):
    """Attention of the queries to each other, with the parameters of PyTorch's and with our `Dropout`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout, batch_first=True)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x, position: (B, Q, C), of which the sum decides who listens to whom. attn_mask: (Q, Q), True = unseen."""
        B, Q, C = x.shape
        assert self.in_proj_weight is not None
        weight, bias = (t.split([2 * C, C]) for t in (self.in_proj_weight, self.in_proj_bias))
        asked = F.linear(x + position, weight[0], bias[0]).view(B, Q, 2, self.num_heads, -1)
        q, k = asked.permute(2, 0, 3, 1, 4)  # (B, M, Q, D) each
        v = F.linear(x, weight[1], bias[1]).view(B, Q, self.num_heads, -1).transpose(1, 2)
        if self.training and self.dropout:
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, M, Q, Q)
            if attn_mask is not None:
                logits = logits.masked_fill(attn_mask, -torch.inf)
            read = self.drop(logits.softmax(-1)) @ v
        else:
            read = F.scaled_dot_product_attention(q, k, v, None if attn_mask is None else ~attn_mask)
        return self.out_proj(read.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention among the queries, deformable attention to the memory, a feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.pre_norm = config.pre_norm
        self.self_attn = SelfAttention(C, config.num_heads, config.dropout)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn = DeformableAttention(C, config.num_heads, config.num_feature_levels, config.decoder_points)
        self.norm2 = nn.LayerNorm(C)
        self.ffn = FeedForward(C, config.ffn_dim, config.activation, config.dropout)
        self.norm3 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: ops.Shapes,
        padding_mask: Tensor | None,
        attn_mask: Tensor | None = None,
        return_details: bool = False,
    ) -> tuple[Tensor, SamplingDetails | None]:
        pre = self.pre_norm
        x = self.norm1(queries) if pre else queries
        queries = queries + self.dropout(self.self_attn(x, query_position, attn_mask))
        queries = queries if pre else self.norm1(queries)

        x = self.norm2(queries) if pre else queries
        read, details = self.cross_attn(
            x + query_position, reference_points, memory, spatial_shapes, padding_mask, return_details
        )
        queries = queries + self.dropout(read)
        queries = queries if pre else self.norm2(queries)

        queries = queries + self.dropout(self.ffn(self.norm3(queries) if pre else queries))
        return queries if pre else self.norm3(queries), details


class Decoder(nn.Module):
    """Layers that each feed the next, with the heads that read every one of them."""

    def __init__(self, config: ModelConfig, heads: DetectionHeads) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm else nn.Identity()
        self.heads = heads
        self.refine, self.look_forward_twice = config.refine, config.look_forward_twice
        C = config.hidden_dim
        self.position_head = MLP(2 * C, C, C, layers=2) if config.iterative_query_pos else None
        self.gradient_checkpointing = config.gradient_checkpointing

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor | None,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: ops.Shapes,
        valid_ratios: Tensor,
        padding_mask: Tensor | None,
        attn_mask: Tensor | None = None,
        return_details: bool = False,
    ) -> DecoderOutput:
        """queries, query_position: (B, Q, C). reference_points: (B, Q, 2 or 4) in 0..1 of the unpadded image.

        memory: (B, S, C). valid_ratios: (B, L, 2). padding_mask: (B, S). attn_mask: (Q, Q), True = unseen.
        query_position is not read with iterative_query_pos: it then follows from the reference boxes.
        """
        all_logits, all_boxes, all_references, every = [], [], [], []
        start = reference_points  # what boxes are relative to; the same numbers, but with a gradient to look twice
        for index, layer in enumerate(self.layers):
            # On the padded canvas of each level; boxes scale in both corners alike.
            ratios = valid_ratios if reference_points.shape[-1] == 2 else valid_ratios.repeat(1, 1, 2)
            on_canvas = reference_points[:, :, None] * ratios[:, None]
            if self.position_head is not None:
                encoded = box_encoding(reference_points, queries.shape[-1] // 2)
                query_position = self.position_head(encoded.to(queries.dtype))
            inputs = (queries, query_position, on_canvas, memory, spatial_shapes, padding_mask)
            if self.gradient_checkpointing and self.training:
                queries, details = checkpoint(layer, *inputs, attn_mask, return_details, use_reentrant=False)
            else:
                queries, details = layer(*inputs, attn_mask, return_details)
            logits, deltas = self.heads(self.norm(queries), index)
            boxes = refine_boxes(deltas, start)
            all_logits.append(logits)
            all_boxes.append(boxes)
            all_references.append(reference_points)
            every.append(details)
            if self.refine:  # gradients stay inside a layer (appendix A.4), or reach the one before (DINO, section 3.5)
                twice = self.look_forward_twice and torch.is_grad_enabled()
                start = refine_boxes(deltas, reference_points) if twice else boxes.detach()
                reference_points = boxes.detach()
        return DecoderOutput(
            torch.stack(all_logits),
            torch.stack(all_boxes),
            all_references,
            [item for item in every if item is not None],
        )
