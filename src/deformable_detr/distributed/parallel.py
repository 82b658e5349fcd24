"""Data parallelism: DistributedDataParallel with uneven batches and gradient accumulation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .context import DistributedContext


def parallelize(unit: nn.Module, world: DistributedContext) -> nn.Module:
    """Wrap `unit` in DistributedDataParallel, or return it unchanged in a run of one process."""
    if world.size == 1:
        return unit
    learning_norms = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats for module in unit.modules()
    )
    # Batch norms that learn take the first process's statistics; without any, buffers are the same everywhere.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as it was called
    options: dict[str, Any] = {name: learning_norms}
    return DistributedDataParallel(unit, gradient_as_bucket_view=True, **options)


@contextmanager
def gradients(network: nn.Module, last: bool) -> Iterator[None]:
    """Within it a pass adds to the gradients; only the last pass of a step exchanges them between the processes."""
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def touch(outputs: dict[str, torch.Tensor], helpers: nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zero for every parameter: each process then exchanges all of them in each step."""
    zero = torch.stack([value.float().sum() for value in outputs.values() if value.requires_grad]).sum() * 0
    for parameter in helpers.parameters():
        zero = zero + parameter.float().sum() * 0
    return zero
