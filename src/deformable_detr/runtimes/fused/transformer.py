"""Encoder, proposals and decoder for inference: weights concatenated for fewer, larger matrix products.

B images, S tokens, Q queries, C channels, M heads, D channels per head, L levels, P points, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from ...model.two_stage import TwoStageProposals
from .onednn import PackedLinear, fusable_activation
from .positional_inputs import PositionalInputs

CHUNK_MULTIPLE = 64  # chunk lengths are multiples of it; chunks overlap by fewer rows each


@dataclass(frozen=True)
class WeightPacking:
    """How weights are stored, and how many tokens pass through a layer together (None: all)."""

    dtype: torch.dtype
    packed: bool
    chunk_rows: int | None

    def linear(self, *layers: nn.Linear, activation: nn.Module | None = None) -> PackedLinear:
        """Return one layer with the outputs of several linear layers side by side."""
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return self.linear_from(weight, bias, activation)

    def linear_from(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None) -> PackedLinear:
        fused = None if activation is None else fusable_activation(activation)
        return PackedLinear(weight, bias, fused, self.dtype, self.packed)


def run_in_chunks(
    function: Callable[..., Sequence[Tensor]],
    chunk_rows: int | None,
    inputs: Sequence[Tensor | None],
    outputs: list[Tensor],
) -> list[Tensor]:
    """Run a function on a few rows of its inputs at a time, so that intermediate results stay in the cache.

    `inputs` are (B or 1, S, …) or None, `outputs` (B, S, …) are filled in place and may be inputs; an empty list makes
    new tensors. Without `chunk_rows`, the function is called once with the whole inputs.
    """
    if chunk_rows is None:
        return list(function(*inputs))
    B = max(len(x) for x in inputs if x is not None)
    S = next(x.shape[1] for x in inputs if x is not None)
    length = chunk_length(S, chunk_rows)
    for image in range(B):

        def run_from(start: int, image: int = image) -> Sequence[Tensor]:
            rows = (None if x is None else x[image if len(x) > 1 else 0, start : start + length] for x in inputs)
            return function(*rows)

        last = run_from(S - length)  # first, because it overlaps the chunk before it, which overwrites its inputs
        if not outputs:
            outputs = [rows.new_empty(B, S, *rows.shape[1:]) for rows in last]
        for start in range(0, S - length, length):
            for output, rows in zip(outputs, run_from(start), strict=True):
                output[image, start : start + length] = rows
        for output, rows in zip(outputs, last, strict=True):
            output[image, S - length :] = rows
    return outputs


def chunk_length(S: int, chunk_rows: int) -> int:
    """Return the rows per chunk: near `chunk_rows` and a multiple of `CHUNK_MULTIPLE`.

    Images of many sizes then share a few lengths; oneDNN compiles each new one, in half a millisecond and half a MiB.
    """
    count = max(1, round(S / chunk_rows))
    return min(S, -(-S // (CHUNK_MULTIPLE * count)) * CHUNK_MULTIPLE)


class FusedFeedForward(nn.Module):
    """x + the feed-forward network of y."""

    def __init__(self, ffn: FeedForward, packing: WeightPacking) -> None:
        super().__init__()
        self.linear1 = packing.linear(ffn.linear1, activation=ffn.activation)
        self.linear2 = packing.linear(ffn.linear2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear2(self.linear1(y), x)


class SamplingProjection(nn.Module):
    """Sampling offsets (…, M, L, P, 2) and attention logits (…, M, L, P) from one matrix product."""

    def __init__(self, attention: DeformableAttention, packing: WeightPacking) -> None:
        super().__init__()
        self.shape = (attention.heads, attention.levels, attention.points)
        self.num_offsets = attention.sampling_offsets.out_features
        self.linear = packing.linear(attention.sampling_offsets, attention.attention_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.linear(x)
        offsets, logits = outputs[..., : self.num_offsets], outputs[..., self.num_offsets :]
        return offsets.unflatten(-1, (*self.shape, 2)), logits.unflatten(-1, self.shape)


class FusedEncoderLayer(nn.Module):
    """An encoder layer as two functions of single tokens, before and after the sampling."""

    def __init__(self, layer: EncoderLayer, packing: WeightPacking) -> None:
        super().__init__()
        self.pre_norm = layer.pre_norm
        self.heads = layer.self_attn.heads
        self.value = packing.linear(layer.self_attn.value_proj)
        self.sampling = SamplingProjection(layer.self_attn, packing)
        self.output = packing.linear(layer.self_attn.output_proj)
        self.norm1, self.norm2 = layer.norm1.to(packing.dtype), layer.norm2.to(packing.dtype)
        self.ffn = FusedFeedForward(layer.ffn, packing)

    def before_sampling(
        self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (…, M, D), offsets and logits of tokens (…, C); values are 0 in the padding."""
        x = self.norm1(tokens) if self.pre_norm else tokens
        value = self.value(x)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        return value.unflatten(-1, (self.heads, -1)), *self.sampling(x + position)

    def after_sampling(self, tokens: Tensor, samples: Tensor) -> Tensor:
        """Return the layer's output from its input and the sampled values, (…, C) each."""
        tokens = self.output(samples, tokens)
        if self.pre_norm:
            return self.ffn(tokens, self.norm2(tokens))
        tokens = self.norm1(tokens)
        return self.norm2(self.ffn(tokens, tokens))


class FusedEncoder(nn.Module):
    """All encoder layers, and the value projections of all decoder layers: they read the same memory."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, decoder: Decoder, packing: WeightPacking) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedEncoderLayer(layer, packing) for layer in layers)  # type: ignore[arg-type]
        self.norm = norm.to(packing.dtype)
        attentions: list[Any] = [layer.cross_attn for layer in decoder.layers]
        self.values = packing.linear(*(attention.value_proj for attention in attentions))
        self.value_shape = (len(attentions), attentions[0].heads, -1)
        self.chunk_rows = packing.chunk_rows

    def forward(self, tokens: Tensor, positional: PositionalInputs) -> tuple[Tensor, list[Tensor]]:
        """Return the memory (B, S, C) and, per decoder layer, its values (B, S, M, D), of tokens (B, S, C)."""
        padding_mask = positional.padding_mask
        reference_points = positional.reference_points.expand(len(tokens), -1, -1, -1)
        per_token = (positional.position, padding_mask)
        layers: list[Any] = list(self.layers)
        if not layers:
            memory, *values = run_in_chunks(self._finish, self.chunk_rows, (tokens, padding_mask), [])
            return memory, values
        sampling_inputs = run_in_chunks(layers[0].before_sampling, self.chunk_rows, (tokens, *per_token), [])
        for layer, next_layer in zip(layers, [*layers[1:], None], strict=True):
            samples = ops.deformable_attention(
                sampling_inputs[0], positional.spatial_shapes, reference_points, *sampling_inputs[1:]
            )

            def after_sampling(
                x: Tensor, y: Tensor, position: Tensor, mask: Tensor | None, a: Any = layer, b: Any = next_layer
            ) -> Sequence[Tensor]:
                x = a.after_sampling(x, y)
                return self._finish(x, mask) if b is None else (x, *b.before_sampling(x, position, mask))

            # Rows are read before they are written, so the tensors of the previous layer can be reused.
            reused = [] if next_layer is None else [tokens, *sampling_inputs]
            sampling_inputs.clear()
            tokens, *sampling_inputs = run_in_chunks(
                after_sampling, self.chunk_rows, (tokens, samples, *per_token), reused
            )
        return tokens, sampling_inputs  # of the last layer: the memory and its values

    def _finish(self, tokens: Tensor, padding_mask: Tensor | None) -> Sequence[Tensor]:
        memory = self.norm(tokens)
        values = self.values(memory)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask[..., None], 0.0)
        return memory, *values.unflatten(-1, self.value_shape).unbind(-3)


class FusedProposals(nn.Module):
    """The highest-scoring tokens as queries: scores for all tokens, boxes for the selected ones only."""

    def __init__(self, stage: TwoStageProposals, heads: DetectionHeads, packing: WeightPacking) -> None:
        super().__init__()
        self.stage = stage
        self.chunk_rows, self.dtype = packing.chunk_rows, packing.dtype
        self.project, self.norm = packing.linear(stage.memory_proj), stage.memory_norm
        scorer: Any = heads.classes[heads.proposals]
        classes = slice(None) if stage.class_aware_proposals else slice(0, 1)
        self.register_buffer("weight", scorer.weight[classes].float().clone(), persistent=False)
        self.register_buffer("bias", scorer.bias[classes].float().clone(), persistent=False)
        self.boxes = heads.boxes[heads.proposals]

    def forward(self, memory: Tensor, positional: PositionalInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return queries (B, Q, C), their position (B, Q, C) or None, and boxes (B, Q, 4) of the memory (B, S, C)."""
        assert positional.anchors is not None
        B, S, C = memory.shape
        anchors = positional.anchors.expand(B, -1, -1)
        (scores,) = run_in_chunks(self._scores, self.chunk_rows, (memory, positional.valid), [])
        top = scores.topk(min(self.stage.num_queries, S), dim=1).indices[..., None]  # (B, Q, 1)
        valid = positional.valid.expand(B, -1)[..., None].gather(1, top)  # type: ignore[union-attr]
        tokens = self._tokens(memory.gather(1, top.expand(-1, -1, C)), valid[..., 0])
        boxes = (self.boxes(tokens) + anchors.gather(1, top.expand(-1, -1, 4))).sigmoid()
        position, queries = self.stage.embed_boxes(boxes, tokens)
        if self.stage.query_init == "encoder":
            queries = tokens
        elif self.stage.query_init == "learned":
            queries = self.stage.query_embedding.weight[: top.shape[1]].expand(B, -1, -1)
        assert queries is not None
        return queries, position, boxes

    def _tokens(self, memory: Tensor, valid: Tensor) -> Tensor:
        return self.norm(self.project(memory.masked_fill(~valid[..., None], 0.0)).float())

    def _scores(self, memory: Tensor, valid: Tensor) -> Sequence[Tensor]:
        logits = F.linear(self._tokens(memory, valid), self.weight, self.bias)  # type: ignore[arg-type]
        return (logits.amax(-1),)


class FusedDecoderLayer(nn.Module):
    """A decoder layer that gets its values from the encoder. All else is fp32: there are few queries."""

    def __init__(self, layer: DecoderLayer, packing: WeightPacking) -> None:
        super().__init__()
        self.pre_norm, self.heads = layer.pre_norm, layer.self_attn.num_heads
        C = layer.self_attn.embed_dim
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        packing = replace(packing, dtype=torch.float32)
        self.query_key = packing.linear_from(weight[: 2 * C], bias[: 2 * C])
        self.value = packing.linear_from(weight[2 * C :], bias[2 * C :])
        self.self_attn_output = packing.linear(layer.self_attn.out_proj)
        self.sampling = SamplingProjection(layer.cross_attn, packing)
        self.cross_attn_output = packing.linear(layer.cross_attn.output_proj)
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.ffn = FusedFeedForward(layer.ffn, packing)

    def forward(
        self, queries: Tensor, position: Tensor, reference_points: Tensor, values: Tensor, spatial_shapes: ops.Shapes
    ) -> Tensor:
        """queries, position: (B, Q, C). reference_points: (B, Q, L, 2 or 4). values: (B, S, M, D)."""
        x = self.norm1(queries) if self.pre_norm else queries
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        query, key, value = map(self._split_heads, (query, key, self.value(x)))
        attended = F.scaled_dot_product_attention(query, key, value)
        queries = self.self_attn_output(attended.transpose(1, 2).flatten(2), queries)
        queries = queries if self.pre_norm else self.norm1(queries)

        x = self.norm2(queries) if self.pre_norm else queries
        offsets, logits = self.sampling(x + position)
        samples = ops.deformable_attention(values, spatial_shapes, reference_points, offsets, logits)
        queries = self.cross_attn_output(samples.to(queries.dtype), queries)
        queries = queries if self.pre_norm else self.norm2(queries)

        queries = self.ffn(queries, self.norm3(queries) if self.pre_norm else queries)
        return queries if self.pre_norm else self.norm3(queries)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, M, Q, D)


class FusedDecoder(nn.Module):
    """The decoder layers and their box heads; classes are computed after the last layer only, or by the RoI head."""

    def __init__(self, decoder: Decoder, config: ModelConfig, packing: WeightPacking) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedDecoderLayer(layer, packing) for layer in decoder.layers)  # type: ignore[arg-type]
        self.norm, self.position_head, self.refine = decoder.norm, decoder.position_head, config.refine
        self.decoder_norm, self.box_eps = config.decoder_norm, config.box_eps
        boxes = decoder.heads.boxes
        self.boxes = nn.ModuleList(boxes[index if len(boxes) > 1 else 0] for index in range(config.decoder_layers))

    def forward(
        self, queries: Tensor, position: Tensor | None, reference_points: Tensor, values: list[Tensor],
        positional: PositionalInputs,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return boxes (B, Q, 4) and the normed output (B, Q, C) of the last layer.

        queries, position: (B, Q, C). reference_points: (B, Q, 2 or 4). values: (B, S, M, D) per layer.
        """
        ratios = positional.valid_ratios.expand(len(queries), -1, -1)
        for index, layer in enumerate(self.layers):
            scale = ratios if reference_points.shape[-1] == 2 else ratios.repeat(1, 1, 2)
            on_canvas = reference_points[:, :, None] * scale[:, None]
            if self.position_head is not None:
                position = self.position_head(queries, reference_points, ratios, index)
            queries = layer(queries, position, on_canvas, values[index], positional.spatial_shapes)
            is_last = index == len(self.layers) - 1
            if self.refine or is_last:
                normalized = queries if self.decoder_norm and not is_last else self.norm(queries)
                eps = self.box_eps[0 if is_last else 1]
                reference_points = refine_boxes(self.boxes[index](normalized), reference_points, eps)
        return reference_points, self.norm(queries)
