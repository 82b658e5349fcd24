"""Run the attention of transformers' models by this package's op.

    from deformable_detr import ops
    ops.accelerate(model)   # returns the names of the layers that changed
    ops.restore(model)

Only the sampling core changes, and only in the given model: weights, inputs and outputs stay, with their types.
Copies and pickles of the model keep the op.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .dispatch import sample_and_sum
from .reference import Shapes

SUPPORTED = (
    "Deformable DETR", "RT-DETR", "RT-DETRv2", "D-FINE", "DEIMv2", "Grounding DINO", "MM Grounding DINO", "OmDet-Turbo",
    "LW-DETR", "RF-DETR", "Mask2Former", "OneFormer",
)  # fmt: skip
_CORE_CLASS = "MultiScaleDeformableAttention"  # Deformable DETR, RT-DETR, …: a child module of the attention layer
_CORE_ATTRIBUTE = "ms_deformable_attn_core"  # D-FINE, DEIMv2: a function on the layer
_FUNCTION_V2 = "multi_scale_deformable_attention_v2"  # RT-DETRv2: a function of its module
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
    name = _called_function(layer)
    if name is None:
        return False
    layer.__dict__[_ORIGINAL] = None
    layer.forward = _Rebound(layer, name, _FUNCTIONS[name])
    return True


def observe(model: nn.Module, observer: Callable[[Shapes, Tensor, Tensor], None]) -> None:
    """Call a function before each sampling. This cannot be undone, so give it a copy of the model.

    Args:
        model: One of the `SUPPORTED` models except Mask2Former and OneFormer, accelerated or not.
        observer: Gets spatial shapes, locations (B, Q, M, L, P, 2) in 0..1 of the maps, and weights (B, Q, M, L, P).
            A level with fewer points than P repeats its last one with weight zero. `decoder_method="discrete"` reads
            single pixels: the locations are their centers.
    """
    for layer in model.modules():
        if not type(layer).__module__.startswith("transformers."):
            continue
        if type(layer).__name__ == _CORE_CLASS:
            layer.forward = _observed(layer.forward, _core_sampling, observer)
        elif _CORE_ATTRIBUTE in layer.__dict__:
            setattr(layer, _CORE_ATTRIBUTE, _observed(layer.__dict__[_CORE_ATTRIBUTE], _sampling_v2, observer))
        elif _called_function(layer) == _FUNCTION_V2:
            current = cast(Any, layer.forward)
            original = getattr(current, "function", None) or current.__func__.__globals__[_FUNCTION_V2]
            layer.forward = _Rebound(layer, _FUNCTION_V2, _observed(original, _sampling_v2, observer))


def _observed(core: Callable[..., Tensor], read: Callable[..., Any], observer: Callable[..., None]) -> Any:
    def run(*arguments: Any) -> Tensor:
        observer(*read(*arguments))
        return core(*arguments)

    return run


def _called_function(layer: nn.Module) -> str | None:
    """Return which of `_FUNCTIONS` a layer's `forward` calls, if any."""
    forward = type(layer).forward
    names = forward.__code__.co_names if isinstance(forward, types.FunctionType) else ()
    return next((name for name in _FUNCTIONS if name in names), None)


class _Rebound:
    """A layer's `forward` in which a global name is bound to another function.

    Unlike a bound method, it is part of copies and pickles of the layer.
    """

    def __init__(self, layer: nn.Module, name: str, function: Callable[..., Tensor]) -> None:
        forward: Any = type(layer).forward
        scope = {**forward.__globals__, name: function}
        copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        self.layer, self.name, self.function, self.forward = layer, name, function, copy

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.forward(self.layer, *arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Rebound, (self.layer, self.name, self.function)


def _core_forward(
    value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights,
    im2col_step,
):  # fmt: skip
    """`forward` of transformers' `MultiScaleDeformableAttention`."""
    return _attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attention(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """Mask2Former, OneFormer: locations (B, Q, M, L, P, 2)."""
    return _sample(value, spatial_shapes, sampling_locations, attention_weights)


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
    locations, weights = _per_level(sampling_locations, points), _per_level(attention_weights, points)
    return _sample(value, spatial_shapes, locations, weights)


def _sample(value: Tensor, spatial_shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """Return the output in the type that transformers' code has: fp32 under autocast, which widens its grid_sample."""
    output = sample_and_sum(value, _shapes(spatial_shapes), locations, weights)
    autocast = torch.is_autocast_enabled(value.device.type)
    return output.to(torch.promote_types(value.dtype, torch.float32 if autocast else weights.dtype))


def _core_sampling(_, __, spatial_shapes: Any, ___, locations: Tensor, weights: Tensor, *____):
    """What a core with the arguments of `_core_forward` samples; see `observe`."""
    return _shapes(spatial_shapes), locations, weights


def _sampling_v2(
    _, spatial_shapes: Any, locations: Tensor, weights: Tensor, points: list[int], method: str = "default"
) -> tuple[Shapes, Tensor, Tensor]:
    """What a core with the arguments of `_attention_v2` samples; see `observe`."""
    shapes = _shapes(spatial_shapes)
    locations, weights = _per_level(locations, points), _per_level(weights, points)
    if method == "discrete":
        size = torch.tensor(shapes, device=locations.device).flip(1)[:, None]  # (L, 1, 2), width and height
        pixels = (locations * size + 0.5).long().clamp(torch.zeros_like(size), size - 1)
        locations = (pixels + 0.5) / size
    for level, count in enumerate(points):
        if count < max(points):
            locations[..., level, count:, :] = locations[..., level, count - 1 : count, :]
    return shapes, locations, weights


def _per_level(tensor: Tensor, points: list[int]) -> Tensor:
    """(B, Q, M, sum of points, …) to (B, Q, M, L, P, …), filled up with zeros."""
    if min(points) == max(points):
        return tensor.unflatten(3, (len(points), points[0]))
    trailing = [0, 0] * (tensor.dim() - 4)
    levels = [F.pad(level, [*trailing, 0, max(points) - level.shape[3]]) for level in tensor.split(points, dim=3)]
    return torch.stack(levels, dim=3)


def _shapes(spatial_shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in spatial_shapes)


# Functions that transformers' layers look up by name, and their replacements.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": _attention,
    _FUNCTION_V2: _attention_v2,
}
