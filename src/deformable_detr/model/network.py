"""Deformable DETR (Zhu et al. 2021, arXiv 2010.04159, figure 1), from pixels to class logits and boxes.

    pixels (B, 3, H, W) ─ backbone, input projections ─► L maps (B, C, H_l, W_l) ─ flatten ─► tokens (B, S, C)
        ─ encoder ─► memory (B, S, C) ─ initial queries (B, Q, C) ─ decoder, heads ─► logits (B, Q, K), boxes (B, Q, 4)
    with masks: memory and the backbone's stride-4 map ─ mask head ─► features (B, D, h, w), embeddings (B, Q, D)

Dimensions in `model` and `ops`: B images, S memory tokens (the pixels of all levels), Q queries, M heads, D channels
per head, C = M·D, L levels, P points per head and level, K classes. "layers" is the number of decoder layers.
Boxes are (cx, cy, w, h) in 0..1 of the unpadded image; `padding_mask` is True at padding.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.schema import ModelConfig
from ..utils.dtype import upcast
from .attention import DeformableAttention
from .backbone import Backbone, InputProjection, backbone_strides, pixel_statistics
from .decoder import Decoder, DenoisingQueries, Queries
from .encoder import Encoder
from .geometry import FlattenedFeatures, get_valid_ratios
from .heads import DetectionHeads
from .layers import resize_mask
from .mask_head import MaskHead
from .position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from .roi_head import RoIHead, refine_in_box
from .two_stage import TwoStageProposals

NetworkT = TypeVar("NetworkT", bound="DeformableDETRNetwork")


class DeformableDETRNetwork(nn.Module):
    """The detection network. Raises UserError if the backbone or its weights are not available."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_dim
        self.backbone = Backbone(config)
        self.own_levels = len(backbone_strides(config))
        self.projections = InputProjection(config, self.backbone.channels[-self.own_levels :])
        self.position = _position_encoding(config)
        self.level_embedding = nn.Parameter(torch.empty(config.num_feature_levels, C))
        self.encoder = Encoder(config)
        heads = DetectionHeads(config)
        if config.two_stage:
            self.proposals = TwoStageProposals(config)
        elif config.iterative_query_pos:
            self.query_embedding = nn.Embedding(config.num_queries, C)
            self.query_boxes = nn.Embedding(config.num_queries, 4)  # in logit space
        else:
            self.query_embedding = nn.Embedding(config.num_queries, 2 * C)
            self.reference_points = nn.Linear(C, 2)
        self.decoder = Decoder(config, heads)
        self._reset_parameters()
        # Last, so that all other parameters start as without them.
        self.roi_head = RoIHead(config, self.backbone.channels[0]) if config.roi_grid else None
        self.mask_head = MaskHead(config, self.backbone.channels[0]) if config.masks else None
        mean, std = pixel_statistics(config)
        self.register_buffer("pixel_mean", torch.tensor(mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std), persistent=False)

    def _reset_parameters(self) -> None:
        """Initialize the matrices of encoder, decoder layers and query part by Xavier, then parts with other rules."""
        query_parts = [module for name, module in self.named_children() if name in ("proposals", "reference_points")]
        for part in (self.encoder, self.decoder.layers, *query_parts):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not self.config.two_stage and self.config.iterative_query_pos:
            nn.init.zeros_(self.query_embedding.weight)
            with torch.no_grad():
                self.query_boxes.weight.uniform_(0.05, 0.95).logit_()
        elif not self.config.two_stage:
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
        """Predict class logits and boxes for every query.

        Args:
            pixels: (B, 3, H, W), normalized RGB.
            padding_mask: (B, H, W) bool. Default: no padding.
            return_attention: Also return where every layer sampled.
            denoising_queries: Additional queries for training a two-stage model.

        Returns:
            A dict with
            pred_logits (B, Q, K) and pred_boxes (B, Q, 4): the last layer's predictions;
            layer_logits (layers, B, Q, K) and layer_boxes (layers, B, Q, 4): those of all decoder layers, and of the
            RoI head as one more layer;
            encoder_logits (B, S, K) and encoder_boxes (B, S, 4), two-stage only: the proposals. Column 0 of the logits
            means "object"; with class_aware_proposals, each column is its class;
            denoising_logits and denoising_boxes, with denoising_queries: like layer_logits and layer_boxes;
            mask_embeddings (B, Q, D) and mask_features (B, D, h, w), with masks: see `mask_ops`; in training mode also
            layer_mask_embeddings (layers, B, Q, D) and, with denoising_queries, denoising_mask_embeddings;
            encoder_attention, decoder_attention (`SamplingDetails` per layer), decoder_reference_points (per layer) and
            spatial_shapes ((height, width) per level), with return_attention.
        """
        features, stride4 = self._flatten(pixels, padding_mask)
        memory, encoder_attention = self.encoder(features, return_attention)
        queries, outputs = self._initial_queries(memory, features)
        attn_mask, extra = None, 0
        if denoising_queries is not None:
            queries, attn_mask = self._prepend(denoising_queries, queries, memory)
            extra = denoising_queries.content.shape[1]
        logits, boxes, normed, reference_points, decoder_attention = self.decoder(
            queries, memory, features, attn_mask, return_attention
        )
        if self.roi_head is not None and stride4 is not None:
            logits, boxes = self._refine_by_roi(stride4, padding_mask, logits, boxes, normed, features.valid_ratios)
        if self.mask_head is not None and stride4 is not None:
            finest, ratios = features.spatial_shapes[0], features.valid_ratios[:, 0]
            outputs["mask_features"] = self.mask_head.features(stride4, memory, finest, ratios)
            outputs |= self._mask_embeddings(normed, boxes, extra)
        if denoising_queries is not None:
            outputs |= {"denoising_logits": logits[:, :, :extra], "denoising_boxes": boxes[:, :, :extra]}
            logits, boxes = logits[:, :, extra:], boxes[:, :, extra:]
        outputs |= {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "layer_logits": logits, "layer_boxes": boxes}
        if return_attention:
            outputs |= {"encoder_attention": encoder_attention, "decoder_attention": decoder_attention}
            outputs |= {"decoder_reference_points": reference_points, "spatial_shapes": features.spatial_shapes}
        return outputs

    def _refine_by_roi(
        self, stride4: Tensor, padding_mask: Tensor | None, logits: Tensor, boxes: Tensor, normed: list[Tensor],
        valid_ratios: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Append the RoI head's predictions to the layers', and its queries to their normed outputs."""
        assert self.roi_head is not None
        shape, heads = (stride4.shape[2], stride4.shape[3]), self.decoder.heads
        mask = None if padding_mask is None else resize_mask(padding_mask, shape)
        normed.append(self.roi_head(stride4, mask, normed[-1], boxes[-1], valid_ratios[:, 0]))
        last_logits, deltas = heads(normed[-1], heads.last)
        refined = refine_in_box(deltas, boxes[-1].detach())
        return torch.cat([logits, last_logits[None]]), torch.cat([boxes, refined[None]])

    def _mask_embeddings(self, normed: list[Tensor], boxes: Tensor, extra: int) -> dict[str, Tensor]:
        """Mask embeddings from the decoder's normed outputs and boxes; the first `extra` queries are for denoising."""
        assert self.mask_head is not None
        if not self.training:
            return {"mask_embeddings": self.mask_head.embeddings(normed[-1][:, extra:], boxes[-1][:, extra:])}
        embeddings = self.mask_head.embeddings(torch.stack(normed), boxes)
        own = embeddings[:, :, extra:]
        outputs = {"mask_embeddings": own[-1], "layer_mask_embeddings": own}
        return {**outputs, "denoising_mask_embeddings": embeddings[:, :, :extra]} if extra else outputs

    def _flatten(self, pixels: Tensor, padding_mask: Tensor | None) -> tuple[FlattenedFeatures, Tensor | None]:
        """Pixels to the tokens of all levels, level after level and row by row; also the stride-4 map if it is read."""
        if padding_mask is None:
            padding_mask = pixels.new_zeros(pixels.shape[0], *pixels.shape[2:], dtype=torch.bool)
        maps = self.backbone(pixels.masked_fill(padding_mask[:, None], 0.0))
        stride4 = maps[0] if self.config.reads_stride4 else None
        maps = self.projections(maps[-self.own_levels :])
        spatial_shapes = tuple((x.shape[2], x.shape[3]) for x in maps)
        masks = [resize_mask(padding_mask, shape) for shape in spatial_shapes]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        positions = [
            self.position(mask, tokens.dtype).flatten(2).transpose(1, 2) + level
            for mask, level in zip(masks, self.level_embedding, strict=True)
        ]
        features = FlattenedFeatures(
            tokens=tokens,
            position=torch.cat(positions, dim=1),
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            spatial_shapes=spatial_shapes,
            valid_ratios=get_valid_ratios(masks, torch.promote_types(pixels.dtype, torch.float32)),
        )
        return features, stride4

    def _initial_queries(self, memory: Tensor, features: FlattenedFeatures) -> tuple[Queries, dict[str, Any]]:
        """The decoder's input, and the outputs of the proposal stage."""
        if self.config.two_stage:
            queries, logits, boxes = self.proposals(memory, features, self.decoder.heads)
            return queries, {"encoder_logits": logits, "encoder_boxes": boxes}
        queries = learned_queries(self)
        return Queries(*(None if x is None else x.expand(memory.shape[0], -1, -1) for x in queries)), {}  # type: ignore[arg-type]

    def _prepend(self, denoising: DenoisingQueries, queries: Queries, memory: Tensor) -> tuple[Queries, Tensor]:
        """Put denoising queries before the model's own; also return the attention mask of all."""
        content, position, reference_points = queries
        content = torch.cat((denoising.content.to(content.dtype), content), dim=1)
        denoising_position, _ = self.proposals.embed_boxes(denoising.reference_points, memory)
        if denoising_position is not None and position is not None:
            position = torch.cat((denoising_position, position), dim=1)
        boxes = torch.cat((denoising.reference_points.to(reference_points.dtype), reference_points), dim=1)
        count = content.shape[1]  # less than the mask's size if there are fewer tokens than queries
        return Queries(content, position, boxes), denoising.attn_mask[:count, :count]


def learned_queries(network: DeformableDETRNetwork) -> Queries:
    """Return the queries of a one-stage network, the same for every image: B = 1."""
    embedding = network.query_embedding.weight[None]
    if network.config.iterative_query_pos:
        return Queries(embedding, None, upcast(network.query_boxes.weight[None]).sigmoid())
    position, content = embedding.chunk(2, dim=-1)
    return Queries(content, position, upcast(network.reference_points(position)).sigmoid())


def _position_encoding(config: ModelConfig) -> PositionEmbeddingSine | PositionEmbeddingLearned:
    if config.position_encoding == "learned":
        return PositionEmbeddingLearned(config.hidden_dim)
    temperature, offset = (20, 1.0) if config.position_encoding == "dino" else (10000, 0.5)
    return PositionEmbeddingSine(config.hidden_dim, temperature, offset)
