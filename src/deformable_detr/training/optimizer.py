"""AdamW with the paper's groups of parameters, and the learning rate over the training (section 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..config.schema import TrainConfig
from ..utils.errors import UserError


def parameter_groups(model: nn.Module, config: TrainConfig, helpers: nn.Module | None = None) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: base, sampling (offsets and reference points) or backbone.

    Each group has "name", "params", "names" (of the parameters), "factor" (of the learning rate) and "lr". All decay
    alike, norms and biases too, as in the paper. Groups without parameters are left out.
    helpers: what learns beside the model; its parameters join the base group, named "helpers.…".
    """
    factors = {"base": 1.0, "sampling": config.sampling_lr_mult, "backbone": config.backbone_lr_mult}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name)].append((name, parameter))
    for name, parameter in helpers.named_parameters(prefix="helpers") if helpers is not None else ():
        members["base"].append((name, parameter))
    if not any(members.values()):
        raise UserError("the model has no trainable parameter: lower model.frozen_stages")
    return [
        {
            "name": group,
            "params": [parameter for _, parameter in members[group]],
            "names": [name for name, _ in members[group]],
            "factor": factor,
            "lr": config.lr * factor,
        }
        for group, factor in factors.items()
        if members[group]
    ]


def group_of(name: str) -> str:
    """The group of a parameter, by its name in the model."""
    if name.startswith("backbone."):
        return "backbone"
    return "sampling" if "sampling_offsets" in name or "reference_points" in name else "base"


def build_optimizer(model: nn.Module, config: TrainConfig, helpers: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in its fused form, which can skip a step without asking the host."""
    return torch.optim.AdamW(parameter_groups(model, config, helpers), weight_decay=config.weight_decay, fused=True)


PRESET_BATCH = 4  # images a step that the presets' learning rates are for


def total_batch_size(config: TrainConfig, processes: int) -> int:
    """Images an optimizer step, over all processes."""
    return config.total_batch_size or config.batch_size * processes


def scaled_lr(config: TrainConfig, batch: int) -> tuple[float, str]:
    """The learning rate for steps of `batch` images, and how it came about.

    lr × √(batch / base_batch_size), the rule for adaptive optimizers (Malladi et al. 2022).
    """
    meant = config.base_batch_size or (PRESET_BATCH if config.total_batch_size else config.batch_size)
    if batch == meant:
        return config.lr, f"{config.lr:g}"
    lr = config.lr * math.sqrt(batch / meant)
    return lr, f"{lr:.3g} = {config.lr:g} × √({batch} / {meant})"


def lr_factor(config: TrainConfig, step: int, progress: float) -> float:
    """What the learning rates are multiplied by.

    step: optimizer steps done; the first `warmup_steps` steps rise linearly from 1 / warmup_steps to 1.
    progress: 0..1, part of the training done. "step" divides by 10 at lr_drop, "cosine" falls to 0 at 1.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "step":
        return warmup * (0.1 if progress >= config.lr_drop else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, progress: float) -> None:
    """Gives every group the learning rate of this step."""
    factor = lr_factor(config, step, progress)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["factor"] * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter: "NAME/exp_avg" and so on, so that it does not depend on their order."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Takes back what `optimizer_tensors` gave; a state of another shape is a `UserError`.

    What learns no more, since more of the backbone is frozen or denoising is off now, needs no state.
    """
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for entry, value in tensors.items():
        name, _, key = entry.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            continue
        if value.ndim and value.shape != parameter.shape:
            raise UserError(f"the checkpoint's optimizer state does not fit the model: {entry}")
        # In the parameter's own memory format: the fused update walks through memory, not through indices.
        here = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
        optimizer.state[parameter][key] = here.copy_(value)
