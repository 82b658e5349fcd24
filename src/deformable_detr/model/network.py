"""Deformable DETR, from pixels to class logits and boxes (figure 1 of the paper)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from .attention import DeformableAttention
from .backbone import Backbone, InputProjection, pixel_statistics
from .decoder import Decoder, DenoisingQueries
from .encoder import Encoder
from .geometry import get_valid_ratios, level_masks
from .heads import DetectionHeads
from .position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from .two_stage import TwoStageProposals

N = TypeVar("N", bound="DeformableDETRNetwork")


class DeformableDETRNetwork(nn.Module):
    """The detector.

    Raises UserError where the backbone or its weights cannot be had.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_dim
        self.backbone = Backbone(config)
        self.projections = InputProjection(config, self.backbone.channels)
        self.position = PositionEmbeddingSine(C) if config.position_encoding == "sine" else PositionEmbeddingLearned(C)
        self.level_embedding = nn.Parameter(torch.empty(config.num_feature_levels, C))
        self.encoder = Encoder(config)
        heads = DetectionHeads(config)
        if config.two_stage:
            self.proposals = TwoStageProposals(config)
        else:
            self.query_embedding = nn.Embedding(config.num_queries, 2 * C)
            self.reference_points = nn.Linear(C, 2)
        self.decoder = Decoder(config, heads)
        self._reset_parameters()
        mean, std = pixel_statistics(config)
        self.register_buffer("pixel_mean", torch.tensor(mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std), persistent=False)

    def _reset_parameters(self) -> None:
        """Xavier for all matrices of the transformer, then the parts that start in their own way."""
        parts = [self.encoder, self.decoder.layers]
        parts.append(self.proposals if self.config.two_stage else self.reference_points)
        for part in parts:
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not self.config.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embedding)

    def forward(
        self,
        pixels: Tensor,
        padding_mask: Tensor | None = None,
        *,
        return_attention: bool = False,
        denoising_queries: DenoisingQueries | None = None,
    ) -> dict[str, Any]:
        """Class logits and boxes of every query.

        pixels: (B, 3, H, W), normalized RGB. padding_mask: (B, H, W) bool, True = padding; none: no padding.
        Returns a dict of
            pred_logits (B, Q, K) and pred_boxes (B, Q, 4), cxcywh in 0..1 of the unpadded image;
            layer_logits (N, B, Q, K) and layer_boxes (N, B, Q, 4), the same of all N decoder layers;
            two-stage: encoder_logits (B, S, K), of which column 0 says "object" (all columns their class with
            class_aware_proposals), and encoder_boxes (B, S, 4);
            with denoising queries: denoising_logits (N, B, extra, K) and denoising_boxes (N, B, extra, 4);
            with return_attention: encoder_attention and decoder_attention, lists of `SamplingDetails` a layer,
            decoder_reference_points, what each layer started from, and spatial_shapes, (height, width) a level.
        """
        if padding_mask is None:
            padding_mask = pixels.new_zeros(pixels.shape[0], *pixels.shape[2:], dtype=torch.bool)
        if denoising_queries is not None and not self.config.two_stage:
            raise ValueError("denoising queries start from boxes: they need a two-stage model")
        pixels = pixels.masked_fill(padding_mask[:, None], 0.0)

        maps = self.projections(self.backbone(pixels))
        spatial_shapes = tuple((x.shape[2], x.shape[3]) for x in maps)
        masks = level_masks(padding_mask, spatial_shapes)
        precision = torch.promote_types(pixels.dtype, torch.float32)
        valid_ratios = get_valid_ratios(masks, precision)  # (B, L, 2)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, S, C)
        mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)  # (B, S)
        position = torch.cat(
            [
                self.position(mask, tokens.dtype).flatten(2).transpose(1, 2) + level
                for mask, level in zip(masks, self.level_embedding, strict=True)
            ],
            dim=1,
        )

        memory, encoder_attention = self.encoder(tokens, position, spatial_shapes, valid_ratios, mask, return_attention)

        out: dict[str, Any] = {}
        if self.config.two_stage:
            proposed = self.proposals(memory, spatial_shapes, valid_ratios, mask, self.decoder.heads)
            queries, query_position, references = proposed[:3]
            if denoising_queries is not None:
                position, _ = self.proposals.embed_boxes(denoising_queries.boxes, memory)
                queries = torch.cat((denoising_queries.queries.to(queries.dtype), queries), dim=1)
                references = torch.cat((denoising_queries.boxes.to(references.dtype), references), dim=1)
                if query_position is not None and position is not None:
                    query_position = torch.cat((position, query_position), dim=1)
            out |= {"encoder_logits": proposed.logits, "encoder_boxes": proposed.boxes}
        else:
            query_position, queries = self.query_embedding.weight.expand(pixels.shape[0], -1, -1).chunk(2, dim=-1)
            references = self.reference_points(query_position).to(precision).sigmoid()

        # With fewer tokens than queries there are fewer queries: the model's own come last in the mask.
        attn_mask = (
            denoising_queries.attn_mask[: queries.shape[1], : queries.shape[1]]
            if denoising_queries is not None
            else None
        )
        decoded = self.decoder(
            queries, query_position, references, memory, spatial_shapes, valid_ratios, mask,
            attn_mask, return_attention,
        )  # fmt: skip
        logits, boxes = decoded.logits, decoded.boxes
        if denoising_queries is not None:
            count = denoising_queries.queries.shape[1]
            out |= {"denoising_logits": logits[:, :, :count], "denoising_boxes": boxes[:, :, :count]}
            logits, boxes = logits[:, :, count:], boxes[:, :, count:]
        out |= {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "layer_logits": logits, "layer_boxes": boxes}
        if return_attention:
            out |= {"encoder_attention": encoder_attention, "decoder_attention": decoded.details}
            out |= {"decoder_reference_points": decoded.reference_points, "spatial_shapes": spatial_shapes}
        return out
