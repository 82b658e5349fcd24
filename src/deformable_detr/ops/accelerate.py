"""This package's op inside models that people already run: transformers' users of multi-scale deformable attention.

    from deformable_detr import ops
    ops.accelerate(model)   # names of the layers that changed
    ops.restore(model)      # as it was

Only the sampling core is swapped, in this model alone: weights, inputs, outputs and other models of the process stay.
"""

from __future__ import annotations

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
_CORE_CLASS = "MultiScaleDeformableAttention"  # a child module of the attention layers of the first generation
_CORE_ATTRIBUTE = "ms_deformable_attn_core"  # D-FINE, DEIMv2: a function on each layer
_BEFORE = "_before_accelerate"


def _shapes(spatial_shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in spatial_shapes)


def _first(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """Mask2Former's and OneFormer's function."""
    return sample_and_sum(value, _shapes(spatial_shapes), sampling_locations, attention_weights)


def _second(
    value: Tensor,
    spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    points: list[int],
    method: str = "default",
) -> Tensor:
    """RT-DETRv2's and its heirs' function: each level its own number of points, (B, Q, M, all points, 2)."""
    if method != "default":
        raise ValueError(f"sampling method {method!r}: only 'default' (bilinear) is accelerated; call ops.restore")
    most = max(points)
    if min(points) < most:  # unused points: anywhere, weight zero
        sampling_locations = _level_by_level(sampling_locations, points, most, axis=3)
        attention_weights = _level_by_level(attention_weights, points, most, axis=3)
    return sample_and_sum(
        value,
        _shapes(spatial_shapes),
        sampling_locations.unflatten(3, (len(points), most)),
        attention_weights.unflatten(3, (len(points), most)),
    )


def _level_by_level(tensor: Tensor, points: list[int], most: int, axis: int) -> Tensor:
    trailing = [0, 0] * (tensor.dim() - axis - 1)
    levels = [F.pad(level, [*trailing, 0, most - level.shape[axis]]) for level in tensor.split(points, dim=axis)]
    return torch.cat(levels, dim=axis)


class _Core(nn.Module):
    """In the place of transformers' `MultiScaleDeformableAttention`, which it keeps for `restore`."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.__dict__["before"] = before  # no child: nothing new in state_dict or modules()

    def forward(
        self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
        attention_weights, im2col_step,
    ):  # fmt: skip
        shapes = _shapes(value_spatial_shapes_list)
        return sample_and_sum(value, shapes, sampling_locations, attention_weights)


# Functions of transformers' modules that layers call by name, and what stands in for them.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": _first,
    "multi_scale_deformable_attention_v2": _second,
}


def _called_by(layer: nn.Module) -> str | None:
    """The function of `_FUNCTIONS` that the layer's own forward calls."""
    forward = type(layer).forward
    if not type(layer).__module__.startswith("transformers.") or not isinstance(forward, types.FunctionType):
        return None
    return next((name for name in _FUNCTIONS if name in forward.__code__.co_names), None)


def _rebound(forward: types.FunctionType, name: str) -> types.FunctionType:
    """The same code, with one of the names it looks up bound to this package's function."""
    scope = {**forward.__globals__, name: _FUNCTIONS[name]}
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _accelerate_layer(layer: nn.Module) -> bool:
    if not type(layer).__module__.startswith("transformers.") or _BEFORE in layer.__dict__:
        return False
    for name, child in layer.named_children():
        if type(child).__name__ == _CORE_CLASS:
            setattr(layer, name, _Core(child))
            return True
    if getattr(layer, "method", None) == "discrete" or getattr(layer, "decoder_method", None) == "discrete":
        return False
    if _CORE_ATTRIBUTE in layer.__dict__:
        layer.__dict__[_BEFORE] = layer.__dict__[_CORE_ATTRIBUTE]
        setattr(layer, _CORE_ATTRIBUTE, _second)
        return True
    if name := _called_by(layer):
        layer.__dict__[_BEFORE] = None
        layer.forward = types.MethodType(_rebound(type(layer).forward, name), layer)
        return True
    return False


def accelerate(model: nn.Module) -> tuple[str, ...]:
    """Swaps this package's op into the model, in place; returns the names of the layers that changed.

    Outputs agree within 1e-5 (fp32). Layers that sample by nearest neighbor (`decoder_method="discrete"`) stay as they
    are, and so do layers that were changed before. UserError where there is no layer to change: it lists the models
    whose layers are known.
    """
    layers = list(model.named_modules())
    changed = tuple(name for name, layer in layers if _accelerate_layer(layer))
    if not changed and not any(_is_accelerated(layer) for _, layer in layers):
        raise UserError(
            f"{type(model).__name__} has no multi-scale deformable attention that is known here; supported are "
            f"transformers' {', '.join(SUPPORTED)} (with bilinear sampling)"
        )
    return changed


def _is_accelerated(layer: nn.Module) -> bool:
    return isinstance(layer, _Core) or _BEFORE in layer.__dict__


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undoes `accelerate`, in place; returns the names of the layers that changed."""
    changed = []
    for name, layer in list(model.named_modules()):
        for child_name, child in list(layer.named_children()):
            if isinstance(child, _Core):
                setattr(layer, child_name, child.before)
                changed.append(name)
        if _BEFORE in layer.__dict__:
            before = layer.__dict__.pop(_BEFORE)
            if before is None:
                del layer.forward
            else:
                setattr(layer, _CORE_ATTRIBUTE, before)
            changed.append(name)
    return tuple(changed)
