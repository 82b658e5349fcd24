"""The detector for inference: the model's outputs, faster and in less memory."""

import logging
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config.schema import ModelConfig
from ...model.backbone import InputProjection
from ...model.layers import resize_mask
from ...model.mask_head import mask_embeddings
from ...model.network import DeformableDETRNetwork, learned_queries
from ...model.roi_head import refine_in_box
from ...predict.predictor import Detector
from ...utils.errors import UserError
from .folding import example_pixels, inference_copy
from .fusion import fuse_backbone
from .heads import FusedMaskHead, FusedRoIHead
from .onednn import CHUNK_ROWS, PackedConv2d, has_bf16, is_available
from .positional_inputs import PositionalInputCache, PositionalInputs
from .transformer import FusedDecoder, FusedEncoder, FusedProposals, WeightPacking

_log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OptimizedCopy(Detector):
    """A detector for inference on the device that the model was on."""

    def __reduce__(self) -> NoReturn:  # oneDNN's packed weights have no storage to copy
        hint = "copy or send the model, or its folder from save_pretrained, and call optimize() there"
        raise TypeError(f"an optimized model cannot be copied, pickled or sent to a process; {hint}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(self.pixel_mean)
        if probe.device == self.pixel_mean.device and probe.dtype == self.pixel_mean.dtype:
            return self
        raise UserError("an optimized model cannot change its device or dtype; move the original model, then optimize")


class OptimizedDetector(OptimizedCopy):
    """The result of `DeformableDETR.optimize`. It takes the model's place in `predict` and `evaluate`.

    It cannot be trained, and stays on the device that the model is on. In bf16 the backbone, the encoder and the
    decoder's values are in half precision; queries, boxes and classes stay in fp32.

    Args:
        model: Not changed.
        precision: "fp32" or "bf16".
        compile: Compile backbone and transformer with `torch.compile` at the first call, for any size.

    Raises:
        UserError: The precision is unknown, or the processor lacks it.
    """

    config: ModelConfig
    queries: Any
    query_position: Any
    reference_points: Any

    def __init__(self, model: DeformableDETRNetwork, precision: str = "fp32", compile: bool = False) -> None:
        super().__init__()
        device = model.get_buffer("pixel_mean").device
        dtype = checked_dtype(precision, device)
        packed = not compile and device.type == "cpu" and is_available(dtype) and is_available(torch.float32)
        source = inference_copy(model)
        self.config = model.config
        self.dtype = dtype
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, source.get_buffer(name).clone(), persistent=False)
        pixels = example_pixels(source.backbone.body, self.config, self.pixel_mean, (96, 128))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        # The compiler does its own blocking.
        packing = WeightPacking(dtype, packed, CHUNK_ROWS if device.type == "cpu" and not compile else None)
        self.positional_inputs = PositionalInputCache(source, dtype)
        self.backbone = fuse_backbone(source.backbone.body, pixels, dtype, packed)
        self.projections = FusedInputProjection(source.projections, dtype, packed)
        if self.config.two_stage:
            self.proposals = FusedProposals(source.proposals, source.decoder.heads, packing)
        else:
            self._register_learned_queries(source)
        self.encoder = FusedEncoder(source.encoder.layers, source.encoder.norm, source.decoder, packing)
        self.decoder = FusedDecoder(source.decoder, self.config, packing)
        self.own_levels = source.own_levels
        self.roi_head = None if source.roi_head is None else FusedRoIHead(source.roi_head, packing)
        self.mask_head = None if source.mask_head is None else FusedMaskHead(source.mask_head, packing)
        heads = source.decoder.heads
        self.classes = heads.classes[heads.last if len(heads.classes) > 1 else 0]
        self.roi_boxes = heads.boxes[heads.last] if self.config.roi_grid else None
        self.eval().requires_grad_(False)
        if compile:
            self.features = torch.compile(self.features, dynamic=True)
            self.detect = torch.compile(self.detect, dynamic=True)
        _log.info("optimized for %s in %s%s", device, precision, ", weights packed for oneDNN" if packed else "")

    @torch.no_grad()
    def _register_learned_queries(self, source: DeformableDETRNetwork) -> None:
        names = ("queries", "query_position", "reference_points")
        for name, value in zip(names, learned_queries(source), strict=True):
            self.register_buffer(name, None if value is None else value.clone(), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return `pred_logits` and `pred_boxes` in fp32, with masks also `mask_embeddings` and `mask_features`, as
        `DeformableDETRNetwork.forward` does.
        """
        if padding_mask is not None and not bool(padding_mask.any()):
            padding_mask = None
        if padding_mask is not None:
            pixels = pixels.masked_fill(padding_mask[:, None], 0.0)
        maps, stride4 = self.features(pixels)
        mask = None
        if padding_mask is not None and stride4 is not None:
            mask = resize_mask(padding_mask, (stride4.shape[2], stride4.shape[3]))
        shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
        positional = self.positional_inputs((pixels.shape[2], pixels.shape[3]), shapes, padding_mask)
        return self.detect(maps, stride4, mask, positional)

    def features(self, pixels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Return the projected maps of all levels, (B, H_l, W_l, C); also the backbone's stride-4 map if it is read."""
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        maps = list(self.backbone(pixels))
        stride4 = maps[0] if self.config.reads_stride4 else None
        return self.projections(maps[-self.own_levels :]), stride4

    def detect(
        self, maps: list[Tensor], stride4: Tensor | None, stride4_mask: Tensor | None, positional: PositionalInputs
    ) -> dict[str, Tensor]:
        """Return the outputs from the maps of all levels; the list is emptied to free their memory."""
        B = len(maps[0])
        tokens = torch.cat([x.flatten(1, 2) for x in maps], dim=1)
        maps.clear()
        memory, values = self.encoder(tokens, positional)
        del tokens
        if self.config.two_stage:
            queries, position, reference_points = self.proposals(memory, positional)
        else:
            queries, position, reference_points = (
                None if x is None else x.expand(B, -1, -1)
                for x in (self.queries, self.query_position, self.reference_points)
            )
        outputs = {}
        if self.mask_head is not None and stride4 is not None:
            finest, ratios = positional.spatial_shapes[0], positional.valid_ratios[:, 0]
            outputs["mask_features"] = self.mask_head.features(stride4, memory, finest, ratios)
        del memory
        boxes, normed = self.decoder(queries, position, reference_points, values, positional)
        if self.roi_head is not None and self.roi_boxes is not None and stride4 is not None:
            normed = self.roi_head(stride4, stride4_mask, normed, boxes, positional.valid_ratios[:, 0])
            boxes = refine_in_box(self.roi_boxes(normed), boxes)
        if self.mask_head is not None:
            outputs["mask_embeddings"] = mask_embeddings(self.mask_head.embed(normed), boxes)
        return {"pred_logits": self.classes(normed), "pred_boxes": boxes, **outputs}


def checked_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a precision. Raises UserError if it is unknown, or the processor lacks it."""
    if precision not in DTYPES:
        raise UserError(f"precision '{precision}': choose from {', '.join(DTYPES)}")
    if precision == "bf16" and device.type == "cpu" and not has_bf16():
        raise UserError("precision bf16: this processor has no bf16 instructions (AVX512-BF16 or AMX); use fp32")
    return DTYPES[precision]


class FusedInputProjection(nn.Module):
    """Backbone maps (B, C_l, H_l, W_l) → normalized maps of all levels (B, H_l, W_l, C), channels-last throughout."""

    def __init__(self, projections: InputProjection, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        levels: list[Any] = [list(level.children()) for level in projections.levels]
        self.convolutions = nn.ModuleList(PackedConv2d(conv, None, dtype, packed) for conv, _ in levels)
        self.norms = nn.ModuleList(norm for _, norm in levels)

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
    """`nn.GroupNorm` of channels-last maps (B, H, W, C), with fp32 sums.

    PyTorch's channels-last kernel for the CPU computes the variance as the difference of two large numbers: 2e-4 off if
    the mean is ten deviations from zero. So the deviations are squared here.
    """
    B, _, _, C = x.shape
    groups = norm.num_groups
    if x.device.type != "cpu" or x.dtype != torch.float32:
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, norm.eps).permute(0, 2, 3, 1)
    flat = x.reshape(B, -1, C)
    mean = flat.mean(1).view(B, groups, -1).mean(-1, keepdim=True).expand(-1, -1, C // groups).reshape(B, 1, C)
    deviation = flat - mean
    variance = deviation.square().mean(1).view(B, groups, -1).mean(-1, keepdim=True)
    scale = (variance + norm.eps).rsqrt().expand(-1, -1, C // groups).reshape(B, 1, C) * norm.weight
    return torch.addcmul(norm.bias, deviation, scale).view(x.shape)
