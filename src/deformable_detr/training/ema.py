"""The exponential moving average of the weights, which is what a run evaluates and keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """An average that `update_parameters(model)` brings up to date after a step; `.module` is the averaged model.

    decay: in 0..1, part of the average that a step leaves. Early steps leave less, (1 + n) / (10 + n) after n of
    them, so that the start is soon forgotten. Norm statistics are averaged too.
    """

    @torch.no_grad()
    def blend(averages: Sequence[Tensor], values: Sequence[Tensor], done: Tensor | int) -> None:
        steps = float(done)
        weight = 1 - min(decay, (1 + steps) / (10 + steps))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    averaged = AveragedModel(model, multi_avg_fn=blend, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged
