"""Batch normalization with fixed statistics and affine parameters, for pretrained backbones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FrozenBatchNorm(nn.Module):
    """timm's or torchvision's frozen batch norm in one pass, without saving its input, in the input's precision.

    Args:
        norm: The frozen norm to replace. Buffers keep their names.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, norm.get_buffer(name))
        self.eps: float = norm.eps
        # timm's norms include the activation.
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        constants = (self.running_mean, self.running_var, self.weight, self.bias)
        normed = _Affine.apply(x, *constants, self.eps) if self.training else F.batch_norm(x, *constants, eps=self.eps)
        return self.act(self.drop(normed))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Affine(torch.autograd.Function):
    """F.batch_norm with constants; PyTorch's own saves the input, which this gradient does not need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        # The gradient of x is grad · weight / sqrt(var + eps): the same norm with mean and bias zero.
        zeros = torch.zeros_like(var)
        scaled = F.batch_norm(grad, zeros, var, weight, zeros, eps=ctx.eps)
        return scaled, None, None, None, None, None


def freeze_batch_norms(body: nn.Module) -> nn.Module:
    """Return the module with every batch norm replaced by a `FrozenBatchNorm`."""
    from timm.layers.norm_act import freeze_batch_norm_2d

    body = freeze_batch_norm_2d(body)
    for name, module in list(body.named_modules()):
        if type(module).__name__.startswith("FrozenBatchNorm"):
            body.set_submodule(name, FrozenBatchNorm(module))
    return body
