"""Run the attention of transformers' models by this package's op.

    from deformable_detr import ops
    ops.accelerate(model)   # returns the names of the layers that changed
    ops.restore(model)

Only the sampling core changes, and only in the given model: weights, inputs and outputs stay.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .dispatch import sample_and_sum

SUPPORTED = (
    "Deformable DETR", "RT-DETR", "RT-DETRv2", "D-FINE", "DEIMv2", "Grounding DINO", "MM Grounding DINO", "OmDet-Turbo",
    "LW-DETR", "RF-DETR", "Mask2Former", "OneFormer",
)  # fmt: skip
_CORE_CLASS = "MultiScaleDeformableAttention"  # Deformable DETR, RT-DETR, …: a child module of the attention layer
_CORE_ATTRIBUTE = "ms_deformable_attn_core"  # D-FINE, DEIMv2: a function on the layer
_ORIGINAL = "_before_accelerate"


def accelerate(model: nn.Module) -> tuple[str, ...]:
    """Replace the sampling core of every multi-scale deformable attention in one of the `SUPPORTED` models, in place.

    Outputs agree within 1e-5 in fp32. Layers that are accelerated already or sample the nearest pixel
    (`decoder_method="discrete"`) are skipped.

    Returns:
        The names of the layers that changed.

    Raises:
        UserError: The model has no supported layer.
    """
    layers = list(model.named_modules())
    changed = tuple(name for name, layer in layers if _accelerate_layer(layer))
    if not changed and not any(_ORIGINAL in layer.__dict__ for _, layer in layers):
        raise UserError(
            f"{type(model).__name__} has no supported multi-scale deformable attention; supported are transformers' "
            f"{', '.join(SUPPORTED)} (with bilinear sampling)"
        )
    return changed


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`, in place, and return the names of the layers that changed."""
    changed = []
    for name, layer in model.named_modules():
        if _ORIGINAL in layer.__dict__:
            original = layer.__dict__.pop(_ORIGINAL)
            if original is None:
                del layer.forward
            else:
                setattr(layer, _CORE_ATTRIBUTE, original)
            changed.append(name)
    return tuple(changed)


def _accelerate_layer(layer: nn.Module) -> bool:
    if not type(layer).__module__.startswith("transformers.") or _ORIGINAL in layer.__dict__:
        return False
    if type(layer).__name__ == _CORE_CLASS:
        layer.__dict__[_ORIGINAL] = None
        layer.forward = _core_forward
        return True
    if getattr(layer, "method", None) == "discrete" or getattr(layer, "decoder_method", None) == "discrete":
        return False
    if _CORE_ATTRIBUTE in layer.__dict__:
        layer.__dict__[_ORIGINAL] = layer.__dict__[_CORE_ATTRIBUTE]
        setattr(layer, _CORE_ATTRIBUTE, _attention_v2)
        return True
    forward = type(layer).forward
    if isinstance(forward, types.FunctionType):
        for name in _FUNCTIONS:
            if name in forward.__code__.co_names:
                layer.__dict__[_ORIGINAL] = None
                layer.forward = types.MethodType(_rebind(forward, name), layer)
                return True
    return False


def _rebind(forward: types.FunctionType, name: str) -> types.FunctionType:
    """Copy a function with one of its global names bound to this package's op."""
    scope = {**forward.__globals__, name: _FUNCTIONS[name]}
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _core_forward(
    value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights,
    im2col_step,
):  # fmt: skip
    """`forward` of transformers' `MultiScaleDeformableAttention`."""
    return _attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attention(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """Mask2Former, OneFormer: locations (B, Q, M, L, P, 2)."""
    return sample_and_sum(value, _shapes(spatial_shapes), sampling_locations, attention_weights)


def _attention_v2(
    value: Tensor,
    spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points: list[int],
    method: str = "default",
) -> Tensor:
    """RT-DETRv2 and its successors: locations (B, Q, M, sum of points, 2), with a number of points per level."""
    if method != "default":
        raise ValueError(f"sampling method {method!r} is not accelerated, only 'default' (bilinear); call ops.restore")
    P = max(points)
    if min(points) < P:  # pad with points of weight zero
        sampling_locations = _pad_points(sampling_locations, points)
        attention_weights = _pad_points(attention_weights, points)
    return sample_and_sum(
        value,
        _shapes(spatial_shapes),
        sampling_locations.unflatten(3, (len(points), P)),
        attention_weights.unflatten(3, (len(points), P)),
    )


def _pad_points(tensor: Tensor, points: list[int]) -> Tensor:
    trailing = [0, 0] * (tensor.dim() - 4)
    levels = [F.pad(level, [*trailing, 0, max(points) - level.shape[3]]) for level in tensor.split(points, dim=3)]
    return torch.cat(levels, dim=3)


def _shapes(spatial_shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in spatial_shapes)


# Functions that transformers' layers look up by name, and their replacements.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": _attention,
    "multi_scale_deformable_attention_v2": _attention_v2,
}
