"""The encoder: every pixel of every level attends to a few points around it (section 4.1, "Deformable encoder")."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config.schema import ModelConfig
from .attention import DeformableAttention, SamplingDetails
from .geometry import FlattenedFeatures, pixel_centers
from .layers import Dropout, FeedForward


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, with post-norm or pre-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.hidden_dim
        self.pre_norm = config.pre_norm
        self.self_attn = DeformableAttention(C, config.num_heads, config.num_feature_levels, config.encoder_points)
        self.norm1 = nn.LayerNorm(C)
        self.ffn = FeedForward(C, config.ffn_dim, config.activation, config.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: ops.Shapes,
        padding_mask: Tensor | None,
        return_attention: bool = False,
    ) -> tuple[Tensor, SamplingDetails | None]:
        """Update tokens (B, S, C) from each other around reference points (B, S, L, 2)."""
        x = self.norm1(tokens) if self.pre_norm else tokens
        x, details = self.self_attn(x + position, reference_points, x, spatial_shapes, padding_mask, return_attention)
        tokens = tokens + self.dropout(x)
        if self.pre_norm:
            return tokens + self.dropout(self.ffn(self.norm2(tokens))), details
        tokens = self.norm1(tokens)
        return self.norm2(tokens + self.dropout(self.ffn(tokens))), details


class Encoder(nn.Module):
    """A stack of encoder layers over the tokens of all levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm and config.encoder_layers else nn.Identity()
        self.gradient_checkpointing = config.gradient_checkpointing

    def forward(
        self, features: FlattenedFeatures, return_attention: bool = False
    ) -> tuple[Tensor, list[SamplingDetails]]:
        """Return the memory (B, S, C) and, if asked for, the sampling of each layer."""
        tokens, position, padding_mask, spatial_shapes, valid_ratios = features
        centers = pixel_centers(spatial_shapes, valid_ratios)
        reference_points = centers[:, :, None] * valid_ratios[:, None]  # (B, S, L, 2) in 0..1 of the padded maps
        all_details = []
        for layer in self.layers:
            inputs = (tokens, position, reference_points, spatial_shapes, padding_mask, return_attention)
            if self.gradient_checkpointing and self.training:
                tokens, details = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                tokens, details = layer(*inputs)
            all_details.append(details)
        return self.norm(tokens), all_details if return_attention else []
