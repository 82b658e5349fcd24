"""Encoder, proposals and decoder for inference: the modules of `model`, weights arranged for fewer, larger products.

B images, S tokens, Q queries, C channels, M heads, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...config.schema import ModelConfig
from ...model.attention import DeformableAttention
from ...model.decoder import Decoder, DecoderLayer
from ...model.encoder import EncoderLayer
from ...model.geometry import refine_boxes
from ...model.heads import DetectionHeads
from ...model.layers import FeedForward
from ...model.position_encoding import box_encoding
from ...model.two_stage import TwoStageProposals
from .layout import PositionalInputs
from .onednn import PackedLinear, activation_of

STEP = 64  # rows that the length of a part is a multiple of; the parts overlap by fewer rows each


class WeightPacking:
    """How the weights are kept: dtype of the heavy parts, oneDNN's layout or not, rows of tokens at a time."""

    def __init__(self, dtype: torch.dtype, packed: bool, rows: int | None) -> None:
        self.dtype, self.packed, self.rows = dtype, packed, rows

    def product(self, *layers: nn.Linear, activation: nn.Module | None = None, dtype: torch.dtype | None = None):
        """One product with the outputs of several linear layers side by side."""
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        known = None if activation is None else activation_of(activation)
        return PackedLinear(weight, bias, known, dtype or self.dtype, self.packed)

    def exact(self) -> WeightPacking:
        """The same in fp32, which boxes and classes are computed in."""
        return WeightPacking(torch.float32, self.packed, self.rows)


def in_parts(
    run: Callable[..., Sequence[Tensor]], rows: int | None, tensors: Sequence[Tensor | None], into: list[Tensor]
) -> list[Tensor]:
    """`run` over a few rows of its tensors at a time, so that what it makes in between stays in the cache.

    tensors: (B or 1, S, …), none is handed on. run takes rows of them, (n, …), and returns rows of results.
    into: the tensors (B, S, …) for the results; empty ones are made. rows: about as many; none: all at once, and
    nothing is copied.
    """
    if rows is None:
        return list(run(*tensors))
    B = max(len(t) for t in tensors if t is not None)
    S = next(t.shape[1] for t in tensors if t is not None)
    rows = part_length(S, rows)
    for image in range(B):

        def run_from(start: int, image: int = image) -> Sequence[Tensor]:
            return run(*(None if t is None else t[image if len(t) > 1 else 0, start : start + rows] for t in tensors))

        last = run_from(S - rows)  # first: it begins inside the one before it, which writes over what it reads
        if not into:
            into = [found.new_empty(B, S, *found.shape[1:]) for found in last]
        for start in range(0, S - rows, rows):
            for whole, found in zip(into, run_from(start), strict=True):
                whole[image, start : start + rows] = found
        for whole, found in zip(into, last, strict=True):
            whole[image, S - rows :] = found
    return into


def part_length(S: int, rows: int) -> int:
    """Rows of each part of S, about `rows`: a multiple of `STEP`, so that images of many sizes share a few lengths.

    oneDNN compiles a product anew for each number of rows: half a millisecond and more than half a MiB every time.
    """
    parts = max(1, round(S / rows))
    return min(S, -(-S // (STEP * parts)) * STEP)


class Norm(nn.Module):
    """Layer normalization in the weights' own precision."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm.to(dtype) if isinstance(norm, nn.LayerNorm) else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class FeedForwardPair(nn.Module):
    """x + the feed-forward network of y."""

    def __init__(self, ffn: FeedForward, form: WeightPacking) -> None:
        super().__init__()
        self.widen = form.product(ffn.linear1, activation=ffn.activation)
        self.narrow = form.product(ffn.linear2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.narrow(self.widen(y), x)


class Sampling(nn.Module):
    """Offsets and attention logits of a deformable attention in one product: (…, M, L, P, 2) and (…, M, L, P)."""

    def __init__(self, attention: DeformableAttention, form: WeightPacking) -> None:
        super().__init__()
        self.shape = (attention.heads, attention.levels, attention.points)
        self.split = attention.sampling_offsets.out_features
        self.product = form.product(attention.sampling_offsets, attention.attention_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.product(x)
        offsets, logits = found[..., : self.split], found[..., self.split :]
        return offsets.unflatten(-1, (*self.shape, 2)), logits.unflatten(-1, self.shape)


class FastEncoderLayer(nn.Module):
    """An encoder layer in two steps, before and after the sampling, that know each token by itself."""

    def __init__(self, layer: EncoderLayer, form: WeightPacking) -> None:
        super().__init__()
        self.pre_norm = layer.pre_norm
        self.heads = layer.self_attn.heads
        self.value = form.product(layer.self_attn.value_proj)
        self.sampling = Sampling(layer.self_attn, form)
        self.output = form.product(layer.self_attn.output_proj)
        self.norm1, self.norm2 = Norm(layer.norm1, form.dtype), Norm(layer.norm2, form.dtype)
        self.ffn = FeedForwardPair(layer.ffn, form)

    def before(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Values (…, M, D), offsets and logits of tokens (…, C). padding: (…), True where values are to be zero."""
        x = self.norm1(tokens) if self.pre_norm else tokens
        value = self.value(x)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        return value.unflatten(-1, (self.heads, -1)), *self.sampling(x + position)

    def after(self, tokens: Tensor, read: Tensor) -> Tensor:
        """The layer's tokens from those that came in and what they read, (…, C) each."""
        tokens = self.output(read, tokens)
        if self.pre_norm:
            return self.ffn(tokens, self.norm2(tokens))
        tokens = self.norm1(tokens)
        return self.norm2(self.ffn(tokens, tokens))


class FastEncoder(nn.Module):
    """All encoder layers, and the values that the decoder's layers read: they all project the same memory."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, decoder: Decoder, form: WeightPacking) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FastEncoderLayer(layer, form) for layer in layers)  # type: ignore[arg-type]
        self.norm = Norm(norm, form.dtype)
        attentions: list[Any] = [layer.cross_attn for layer in decoder.layers]
        self.values = form.product(*(attention.value_proj for attention in attentions))
        self.value_shape = (len(attentions), attentions[0].heads, -1)
        self.rows = form.rows

    def forward(self, tokens: Tensor, layout: PositionalInputs) -> tuple[Tensor, list[Tensor]]:
        """tokens: (B, S, C). The memory (B, S, C), and a decoder layer each its values (B, S, M, D)."""
        B = len(tokens)
        references = layout.references.expand(B, -1, -1, -1)
        fixed = (layout.position, layout.mask)
        layers: list[Any] = list(self.layers)
        if not layers:
            memory, *values = in_parts(self._finish, self.rows, (tokens, layout.mask), [])
            return memory, values
        sampled = in_parts(layers[0].before, self.rows, (tokens, *fixed), [])
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            read = ops.deformable_attention(sampled[0], layout.spatial_shapes, references, *sampled[1:])
            if following is None:
                sampled.clear()

                def last(x: Tensor, y: Tensor, mask: Tensor | None, layer: Any = layer) -> Sequence[Tensor]:
                    return self._finish(layer.after(x, y), mask)

                memory, *values = in_parts(last, self.rows, (tokens, read, layout.mask), [])
                return memory, values

            def between(
                x: Tensor, y: Tensor, position: Tensor, mask: Tensor | None, a: Any = layer, b: Any = following
            ) -> Sequence[Tensor]:
                x = a.after(x, y)
                return x, *b.before(x, position, mask)

            # Rows are read before they are written: the tensors of the layer before serve again.
            tokens, *sampled = in_parts(between, self.rows, (tokens, read, *fixed), [tokens, *sampled])
        raise AssertionError("unreachable: the last layer returns")

    def _finish(self, tokens: Tensor, padding: Tensor | None) -> Sequence[Tensor]:
        memory = self.norm(tokens)
        values = self.values(memory)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        return memory, *values.unflatten(-1, self.value_shape).unbind(-3)


class FastProposals(nn.Module):
    """The best tokens as queries. Scores are computed for all of them, boxes only for the chosen."""

    def __init__(self, stage: TwoStageProposals, heads: DetectionHeads, form: WeightPacking) -> None:
        super().__init__()
        self.stage = stage
        self.rows, self.dtype = form.rows, form.dtype
        self.project, self.norm = form.product(stage.memory_proj), stage.memory_norm
        index = -1 if len(heads.classes) > 1 else 0
        scorer: Any = heads.classes[index]
        kept = slice(None) if stage.class_aware_proposals else slice(0, 1)
        self.register_buffer("weight", scorer.weight[kept].float().clone(), persistent=False)
        self.register_buffer("bias", scorer.bias[kept].float().clone(), persistent=False)
        self.boxes = heads.boxes[index]

    def forward(self, memory: Tensor, layout: PositionalInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries (B, Q, C), their position (B, Q, C) or none, and boxes (B, Q, 4) of the memory (B, S, C)."""
        assert layout.anchors is not None
        B, S, C = memory.shape
        anchors = layout.anchors.expand(B, -1, -1)
        (scores,) = in_parts(self._scores, self.rows, (memory, layout.usable), [])
        best = scores.topk(min(self.stage.num_queries, S), dim=1).indices[..., None]  # (B, Q, 1)
        usable = layout.usable.expand(B, -1)[..., None].gather(1, best)  # type: ignore[union-attr]
        tokens = self._tokens(memory.gather(1, best.expand(-1, -1, C)), usable[..., 0])
        boxes = (self.boxes(tokens) + anchors.gather(1, best.expand(-1, -1, 4))).sigmoid()
        position, queries = self.stage.embed_boxes(boxes, tokens)
        if self.stage.query_init == "encoder":
            queries = tokens
        elif self.stage.query_init == "learned":
            queries = self.stage.query_embedding.weight[: best.shape[1]].expand(B, -1, -1)
        assert queries is not None
        return queries, position, boxes

    def _tokens(self, memory: Tensor, usable: Tensor) -> Tensor:
        return self.norm(self.project(memory.masked_fill(~usable[..., None], 0.0)).float())

    def _scores(self, memory: Tensor, usable: Tensor) -> Sequence[Tensor]:
        logits = F.linear(self._tokens(memory, usable), self.weight, self.bias)  # type: ignore[arg-type]
        return (logits.amax(-1),)


class FastDecoderLayer(nn.Module):
    """A decoder layer that is given its values. All in fp32 but those: the queries are few."""

    def __init__(self, layer: DecoderLayer, form: WeightPacking) -> None:
        super().__init__()
        self.pre_norm, self.heads = layer.pre_norm, layer.self_attn.num_heads
        C = layer.self_attn.embed_dim
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        exact = form.exact()
        self.query_key = PackedLinear(weight[: 2 * C], bias[: 2 * C], None, exact.dtype, exact.packed)
        self.value = PackedLinear(weight[2 * C :], bias[2 * C :], None, exact.dtype, exact.packed)
        self.spoken = exact.product(layer.self_attn.out_proj)
        self.sampling = Sampling(layer.cross_attn, exact)
        self.read = exact.product(layer.cross_attn.output_proj)
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.ffn = FeedForwardPair(layer.ffn, exact)

    def forward(
        self, queries: Tensor, position: Tensor, references: Tensor, values: Tensor, spatial_shapes: ops.Shapes
    ) -> Tensor:
        """queries, position: (B, Q, C). references: (B, Q, L, 2 or 4). values: (B, S, M, D)."""
        x = self.norm1(queries) if self.pre_norm else queries
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        query, key, value = map(self._by_head, (query, key, self.value(x)))
        spoken = F.scaled_dot_product_attention(query, key, value)
        queries = self.spoken(spoken.transpose(1, 2).flatten(2), queries)
        queries = queries if self.pre_norm else self.norm1(queries)

        x = self.norm2(queries) if self.pre_norm else queries
        offsets, logits = self.sampling(x + position)
        read = ops.deformable_attention(values, spatial_shapes, references, offsets, logits)
        queries = self.read(read.to(queries.dtype), queries)
        queries = queries if self.pre_norm else self.norm2(queries)

        queries = self.ffn(queries, self.norm3(queries) if self.pre_norm else queries)
        return queries if self.pre_norm else self.norm3(queries)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, M, Q, D)


class FastDecoder(nn.Module):
    """The decoder's layers with the box heads that refine; classes are read after the last one only."""

    def __init__(self, decoder: Decoder, config: ModelConfig, form: WeightPacking) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FastDecoderLayer(layer, form) for layer in decoder.layers)  # type: ignore[arg-type]
        self.norm, self.position_head, self.refine = decoder.norm, decoder.position_head, config.refine
        last = config.decoder_layers - 1
        boxes = decoder.heads.boxes
        self.boxes = nn.ModuleList(boxes[index if len(boxes) > 1 else 0] for index in range(last + 1))
        self.classes = decoder.heads.classes[last if len(decoder.heads.classes) > 1 else 0]

    def forward(
        self,
        queries: Tensor,
        position: Tensor | None,
        references: Tensor,
        values: list[Tensor],
        layout: PositionalInputs,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, K) and boxes (B, Q, 4). queries, position: (B, Q, C). references: (B, Q, 2 or 4)."""
        ratios = layout.valid_ratios.expand(len(queries), -1, -1)
        for index, layer in enumerate(self.layers):
            across = ratios if references.shape[-1] == 2 else ratios.repeat(1, 1, 2)
            on_canvas = references[:, :, None] * across[:, None]
            if self.position_head is not None:
                position = self.position_head(box_encoding(references, queries.shape[-1] // 2))
            queries = layer(queries, position, on_canvas, values[index], layout.spatial_shapes)
            if self.refine or index == len(self.layers) - 1:
                references = refine_boxes(self.boxes[index](self.norm(queries)), references)
        return self.classes(self.norm(queries)), references
