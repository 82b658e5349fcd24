"""FSDP2: each process holds a part of every parameter and its optimizer state; a layer is whole while it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from .context import DistributedContext


def shard(unit: nn.Module, world: DistributedContext) -> None:
    """Divides the parameters of `unit` among the processes, in place: layers of the transformer one by one."""
    from torch.distributed.fsdp import fully_shard

    for parameter in unit.parameters():  # FSDP takes no channels-last weights
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(world.device.type, (world.size,))
    for name, module in unit.named_modules():
        path = name.split(".")
        if path[-1].isdecimal() and path[-3:-1] in (["encoder", "layers"], ["decoder", "layers"]):
            fully_shard(module, mesh=mesh)
    fully_shard(unit, mesh=mesh)


def local(value: Tensor) -> Tensor:
    """This process's part; all of a tensor that is not divided."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values put together from all processes; all must call it."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}


class ShardedAverage:
    """What `training.average.average_of` is for a whole model: the moving average of each process's part."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.done = decay, 0
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes in the model after a step."""
        weight = 1.0 if not self.done else 1 - min(self.decay, (1 + self.done) / (10 + self.done))
        for name, value in model.state_dict().items():
            average = local(self.values[name])
            if average.is_floating_point() and self.done:
                average.lerp_(local(value).to(average.dtype), weight)
            else:
                average.copy_(local(value))
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps are in it."""
        return {**self.values, "n_averaged": torch.tensor(self.done)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.done = int(state["n_averaged"])
        for name, value in self.values.items():
            local(value).copy_(local(state[name]))
