"""DistributedDataParallel with gradient accumulation and uneven batches."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .context import DistributedContext


def parallelize(network: nn.Module, context: DistributedContext) -> nn.Module:
    """Wrap the network in DistributedDataParallel; return it unchanged in a run of one process."""
    if context.world_size == 1:
        return network
    # Trainable batch norms take the statistics of rank 0; without any, buffers are the same in every process.
    sync_buffers = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for module in network.modules()
    )
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # older PyTorch
    options: dict[str, Any] = {name: sync_buffers}
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


@contextmanager
def accumulate_gradients(network: nn.Module, last: bool) -> Iterator[None]:
    """Run one pass of a step inside it: only the last pass averages the gradients over the processes."""
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def zero_with_gradient(outputs: dict[str, torch.Tensor], *modules: nn.Module) -> torch.Tensor:
    """Return 0 with a zero gradient for every parameter, so that all processes exchange the same gradients."""
    zero = torch.stack([value.float().sum() for value in outputs.values() if value.requires_grad]).sum() * 0
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        zero = zero + parameter.float().sum() * 0
    return zero
