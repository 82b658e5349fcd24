"""The decoder: queries attend to each other and to the memory, and refine their boxes (section 4.1, appendix A.4)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config.schema import ModelConfig
from .attention import DeformableAttention, SamplingDetails
from .geometry import FlattenedFeatures, refine_boxes
from .heads import DetectionHeads
from .layers import MLP, Dropout, FeedForward
from .position_encoding import box_encoding


class Queries(NamedTuple):
    """The decoder's input.

    content: (B, Q, C).
    position: (B, Q, C), or None with iterative_query_pos: the reference boxes then give it.
    reference_points: (B, Q, 2) points or (B, Q, 4) boxes.
    """

    content: Tensor
    position: Tensor | None
    reference_points: Tensor


class DenoisingQueries(NamedTuple):
    """X queries that only training adds, before the model's own (DN-DETR, section 4).

    content: (B, X, C).
    reference_points: (B, X, 4) boxes.
    attn_mask: (X + Q, X + Q) bool, True = the row's query does not attend to the column's.
    """

    content: Tensor
    reference_points: Tensor
    attn_mask: Tensor


class SelfAttention(nn.MultiheadAttention):
    """PyTorch's multi-head attention, parameters included, with the faster `Dropout`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout, batch_first=True)
        self.attn_dropout = Dropout(dropout)  # `dropout` is the base class's float

    def forward(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x, position: (B, Q, C). attn_mask: (Q, Q) bool, True = not attended to. Positions are not in the values."""
        B, Q, C = x.shape
        assert self.in_proj_weight is not None
        weight, bias = (t.split([2 * C, C]) for t in (self.in_proj_weight, self.in_proj_bias))
        qk = F.linear(x + position, weight[0], bias[0]).view(B, Q, 2, self.num_heads, -1)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, M, Q, D) each
        v = F.linear(x, weight[1], bias[1]).view(B, Q, self.num_heads, -1).transpose(1, 2)
        if self.training and self.dropout:
            # scaled_dot_product_attention would draw PyTorch's own dropout mask, which is slower on CPUs.
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, M, Q, Q)
            if attn_mask is not None:
                logits = logits.masked_fill(attn_mask, -torch.inf)
            out = self.attn_dropout(logits.softmax(-1)) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, None if attn_mask is None else ~attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention among the queries, deformable cross-attention to the memory, and a feed-forward network."""

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
        return_attention: bool = False,
    ) -> tuple[Tensor, SamplingDetails | None]:
        """Update queries (B, Q, C) from the memory (B, S, C) around reference points (B, Q, L, 2 or 4)."""
        pre = self.pre_norm
        x = self.norm1(queries) if pre else queries
        queries = queries + self.dropout(self.self_attn(x, query_position, attn_mask))
        queries = queries if pre else self.norm1(queries)

        x = self.norm2(queries) if pre else queries
        x, details = self.cross_attn(
            x + query_position, reference_points, memory, spatial_shapes, padding_mask, return_attention
        )
        queries = queries + self.dropout(x)
        queries = queries if pre else self.norm2(queries)

        queries = queries + self.dropout(self.ffn(self.norm3(queries) if pre else queries))
        return queries if pre else self.norm3(queries), details


class QueryPosition(MLP):
    """Query positions from boxes (DAB-DETR, section 4.1), for `iterative_query_pos`."""

    def __init__(self, config: ModelConfig) -> None:
        C = config.hidden_dim
        super().__init__(2 * C, C, C, layers=2)
        self.on_canvas = config.iterative_query_pos in ("dino", "dab")
        self.scale = MLP(C, C, C, layers=2) if config.iterative_query_pos == "dab" else None

    def forward(self, content: Tensor, boxes: Tensor, valid_ratios: Tensor, layer: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return (B, Q, C) of queries (B, Q, C) with boxes (B, Q, 4) and valid ratios (B, L, 2) before a layer."""
        if self.on_canvas:
            boxes = boxes * valid_ratios[:, :1].repeat(1, 1, 2)
        encoding = box_encoding(boxes, content.shape[-1] // 2).to(content.dtype)
        position = super().forward(encoding)
        return position if self.scale is None or layer == 0 else position * self.scale(content)


class Decoder(nn.Module):
    """A stack of decoder layers, with prediction heads on every one of them."""

    def __init__(self, config: ModelConfig, heads: DetectionHeads) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm, self.box_eps = config.decoder_norm, config.box_eps
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm or config.decoder_norm else nn.Identity()
        self.heads = heads
        self.refine, self.look_forward_twice = config.refine, config.look_forward_twice
        self.keep_normed = config.reads_stride4  # for the heads after the decoder
        self.position_head = QueryPosition(config) if config.iterative_query_pos else None
        self.gradient_checkpointing = config.gradient_checkpointing

    def forward(
        self,
        queries: Queries,
        memory: Tensor,
        features: FlattenedFeatures,
        attn_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[SamplingDetails]]:
        """Run all layers; predict after each.

        Args:
            queries: The initial queries.
            memory: (B, S, C), the encoder's output for `features`.
            features: The encoder's input.
            attn_mask: (Q, Q) bool, True = not attended to.
            return_attention: Also return where each layer sampled.

        Returns:
            Logits (layers, B, Q, K), boxes (layers, B, Q, 4), each layer's normed output (B, Q, C) if a mask or
            RoI head reads it, each layer's input reference points, and each layer's `SamplingDetails`.
        """
        content, position, reference_points = queries
        all_logits, all_boxes, all_normed, all_references, all_details = [], [], [], [], []
        base_references = reference_points  # deltas are added to them; with look_forward_twice they carry a gradient
        for index, layer in enumerate(self.layers):
            if self.position_head is not None:
                position = self.position_head(content, reference_points, features.valid_ratios, index)
            scale = features.valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)[:, None]
            inputs = (
                content, position, reference_points[:, :, None] * scale, memory,
                features.spatial_shapes, features.padding_mask, attn_mask, return_attention,
            )  # fmt: skip
            if self.gradient_checkpointing and self.training:
                content, details = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                content, details = layer(*inputs)
            normed = self.norm(content)
            logits, deltas = self.heads(normed, index)
            boxes = refine_boxes(deltas, base_references, self.box_eps[0])
            all_logits.append(logits)
            all_boxes.append(boxes)
            if self.keep_normed:
                all_normed.append(normed)
            all_references.append(reference_points)
            all_details.append(details)
            if self.refine:  # gradients stay in a layer (appendix A.4) or reach the one before (DINO, section 3.5)
                keep_gradient = self.look_forward_twice and torch.is_grad_enabled()
                refined = boxes
                if self.decoder_norm:
                    deltas = self.heads.deltas(content, index)
                if keep_gradient or self.decoder_norm or self.box_eps[0] != self.box_eps[1]:
                    refined = refine_boxes(deltas, reference_points, self.box_eps[1])
                reference_points = refined.detach()
                base_references = refined if keep_gradient else reference_points
        attention = all_details if return_attention else []
        return torch.stack(all_logits), torch.stack(all_boxes), all_normed, all_references, attention
