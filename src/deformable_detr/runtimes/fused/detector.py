"""The detector for inference: the same outputs from the same weights, sooner and in less memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config.schema import ModelConfig
from ...model.backbone import InputProjection
from ...model.network import DeformableDETRNetwork
from ...utils.errors import UserError
from .folding import example, stripped
from .fusion import fused
from .layout import Layouts, PositionalInputs
from .onednn import ROWS, PackedConv2d, available, has_bf16
from .transformer import FastDecoder, FastEncoder, FastProposals, WeightPacking

if TYPE_CHECKING:
    from .compiled import CudaGraphs

_log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OptimizedDetector(nn.Module):
    """What `DeformableDETR.optimize` makes: takes the model's place in `predict` and `evaluate`, and cannot learn.

    config, pixel_mean, pixel_std: the model's. precision: fp32 or bf16. It stays on the device it was made on.

    In bf16 the backbone, the encoder and what the decoder reads are in half precision; queries, boxes and classes are
    fp32 throughout.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: DeformableDETRNetwork, precision: str = "fp32", packed: bool | None = None) -> None:
        """packed: oneDNN's weight layout; none: where it can be had. Raises UserError for a precision there is not."""
        super().__init__()
        if precision not in DTYPES:
            raise UserError(f"precision '{precision}': choose from {', '.join(DTYPES)}")
        device = model.get_buffer("pixel_mean").device
        dtype = DTYPES[precision]
        if dtype == torch.bfloat16 and device.type == "cpu" and not has_bf16():
            raise UserError("precision bf16: this processor has no bf16 products (AVX512-BF16 or AMX); use fp32")
        if packed is None:
            packed = device.type == "cpu" and available(dtype) and available(torch.float32)
        copied = stripped(model)
        self.config: ModelConfig = model.config
        self.precision, self.dtype = precision, dtype
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, copied.get_buffer(name).clone(), persistent=False)
        form = WeightPacking(dtype, packed, ROWS if device.type == "cpu" else None)
        pixels = example(copied.backbone.body, self.config, self.pixel_mean, (96, 128))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.layouts = Layouts(copied, dtype)
        self.backbone = fused(copied.backbone.body, pixels, dtype, packed)
        self.projections = FastProjections(copied.projections, dtype, packed)
        if self.config.two_stage:
            self.proposals = FastProposals(copied.proposals, copied.decoder.heads, form)
        else:
            with torch.no_grad():
                position, queries = copied.query_embedding.weight[None].chunk(2, dim=-1)
                start = copied.reference_points(position).sigmoid()
            for name, value in (("queries", queries), ("query_position", position), ("references", start)):
                self.register_buffer(name, value.clone(), persistent=False)
        self.encoder = FastEncoder(copied.encoder.layers, copied.encoder.norm, copied.decoder, form)
        self.decoder = FastDecoder(copied.decoder, self.config, form)
        self.eval().requires_grad_(False)
        self.packed = packed
        self.bucket: int | None = None  # set by `compiled.specialize`, as the next
        self.graphs: CudaGraphs | None = None
        _log.info("optimized for %s in %s%s", device, precision, ", weights laid out for oneDNN" if packed else "")

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, padding_mask: Tensor | None = None, *, return_attention: bool = False
    ) -> dict[str, Any]:
        """pred_logits (B, Q, K) and pred_boxes (B, Q, 4), cxcywh in 0..1 of the unpadded image, fp32.

        pixels: (B, 3, H, W), normalized RGB. padding_mask: (B, H, W) bool, True = padding; none: no padding.
        Raises UserError for attention, which only the model itself tells.
        """
        if return_attention:
            raise UserError("an optimized model does not tell where it looked; ask the model it was made of")
        if padding_mask is not None and not bool(padding_mask.any()):
            padding_mask = None
        if self.bucket is not None:
            from .layout import padded_to

            pixels, padding_mask = padded_to(pixels, padding_mask, self.bucket)
        if padding_mask is not None:
            pixels = pixels.masked_fill(padding_mask[:, None], 0.0)
        if self.graphs is not None:
            logits, boxes = self.graphs(pixels, padding_mask)
            return {"pred_logits": logits, "pred_boxes": boxes}
        maps = self.features(pixels)
        shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
        layout = self.layouts((pixels.shape[2], pixels.shape[3]), shapes, padding_mask)
        logits, boxes = self.detect(maps, layout)
        return {"pred_logits": logits, "pred_boxes": boxes}

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The maps of all levels, (B, H_l, W_l, C)."""
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.projections(list(self.backbone(pixels)))

    def detect(self, maps: list[Tensor], layout: PositionalInputs) -> tuple[Tensor, Tensor]:
        """Logits and boxes from the maps of all levels, which are let go of."""
        B = len(maps[0])
        tokens = torch.cat([x.flatten(1, 2) for x in maps], dim=1)
        maps.clear()
        memory, values = self.encoder(tokens, layout)
        del tokens
        if self.config.two_stage:
            queries, position, references = self.proposals(memory, layout)
        else:
            queries, position, references = (
                self.get_buffer(name).expand(B, -1, -1) for name in ("queries", "query_position", "references")
            )
        del memory
        return self.decoder(queries, position, references, values, layout)

    def predict(self, source: Any, threshold: float = 0.5, top_k: int = 100, batch_size: int = 1) -> Any:
        """As `DeformableDETR.predict`."""
        from ...predict.predictor import predict

        return predict(self, source, threshold, top_k, batch_size)

    def optimize(self, *_: Any, **__: Any) -> OptimizedDetector:
        """Itself: it is."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(self.pixel_mean)
        if probe.device == self.pixel_mean.device and probe.dtype == self.pixel_mean.dtype:
            return self
        raise UserError("an optimized model stays as it was made; move the model it was made of and optimize that")


class FastProjections(nn.Module):
    """Backbone maps (B, C_l, H_l, W_l) → normalized maps of all levels (B, H_l, W_l, C), channels last throughout."""

    def __init__(self, projections: InputProjection, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        pairs: list[Any] = [list(level.children()) for level in projections.levels]
        self.convolutions = nn.ModuleList(PackedConv2d(pair[0], None, dtype, packed) for pair in pairs)
        self.norms = nn.ModuleList(pair[1] for pair in pairs)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = []
        coarsest = features[-1]
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            source = features[index] if index < len(features) else coarsest
            maps.append(group_norm(convolution(source).permute(0, 2, 3, 1), norm))
            if index >= len(features):
                coarsest = maps[-1].permute(0, 3, 1, 2)
        return maps


def group_norm(x: Tensor, norm: Any) -> Tensor:
    """`nn.GroupNorm` of maps (B, H, W, C) with the channels last, sums in fp32.

    In fp32 on the CPU of deviations from the mean: PyTorch's own, for channels that come last, takes the mean's square
    from the squares' mean, 2e-4 off where the mean is ten deviations from zero. In bf16 the maps are no more exact.
    """
    B, _, _, C = x.shape
    groups = norm.num_groups
    if x.device.type != "cpu" or x.dtype != torch.float32:
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, norm.eps).permute(0, 2, 3, 1)
    flat = x.reshape(B, -1, C)
    mean = flat.mean(1).view(B, groups, -1).mean(-1, keepdim=True).expand(-1, -1, C // groups).reshape(B, 1, C)
    apart = flat - mean
    variance = apart.square().mean(1).view(B, groups, -1).mean(-1, keepdim=True)
    scale = (variance + norm.eps).rsqrt().expand(-1, -1, C // groups).reshape(B, 1, C) * norm.weight
    return torch.addcmul(norm.bias, apart, scale).view(x.shape)
