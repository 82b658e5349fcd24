"""Exponential moving average of the weights, which a run evaluates and saves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def exponential_moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average to update with `update_parameters(model)` after each step; `.module` is the averaged model.

    Batch-norm statistics are averaged too. After n steps the decay is at most (1 + n) / (10 + n), so that the initial
    weights are soon forgotten.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        steps = float(num_averaged)
        weight = 1 - min(decay, (1 + steps) / (10 + steps))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True).requires_grad_(False)
