"""AdamW with the paper's parameter groups, and the learning-rate schedule (section 5)."""

import math
from typing import Any

import torch
from torch import nn

from ..config.schema import TrainConfig
from ..predict.predictor import Detector
from ..utils.errors import UserError

PRESET_BATCH_SIZE = 4  # images per step for which the presets' learning rates are tuned


def parameter_groups(model: nn.Module, config: TrainConfig, denoising: nn.Module | None = None) -> list[dict[str, Any]]:
    """Put every trainable parameter into one of the groups "base", "sampling" and "backbone".

    "sampling" holds the projections of sampling offsets and reference points. All groups have the same weight decay,
    norms and biases included, as in the paper. Parameters of `denoising` join "base".

    Returns:
        One dict per non-empty group: "name", "params", "names" (of the parameters), "factor" (relative to lr), "lr".
    """
    factors = {"base": 1.0, "sampling": config.sampling_lr_mult, "backbone": config.backbone_lr_mult}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in factors}
    in_backbone = getattr(model, "backbone_parameters", Detector.backbone_parameters).match
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_sampling = "sampling_offsets" in name or "reference_points" in name
            group = "backbone" if in_backbone(name) else "sampling" if is_sampling else "base"
            members[group].append((name, parameter))
    if denoising is not None:
        members["base"] += denoising.named_parameters(prefix="denoising")
    if not any(members.values()):
        raise UserError("the model has no trainable parameter: lower model.frozen_stages")
    groups = []
    for group, factor in factors.items():
        if members[group]:
            names, parameters = map(list, zip(*members[group], strict=True))
            lr = config.lr * factor
            groups.append({"name": group, "params": parameters, "names": names, "factor": factor, "lr": lr})
    return groups


def build_optimizer(model: nn.Module, config: TrainConfig, denoising: nn.Module | None = None) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`. Its fused form can skip a step without waiting for the device."""
    return torch.optim.AdamW(parameter_groups(model, config, denoising), weight_decay=config.weight_decay, fused=True)


def total_batch_size(config: TrainConfig, world_size: int) -> int:
    """Return the images per optimizer step over all processes."""
    return config.total_batch_size or config.batch_size * world_size


def scaled_lr(config: TrainConfig, batch_size: int) -> tuple[float, str]:
    """Return lr × √(batch_size / base_batch_size) (Malladi et al. 2022) and a text that shows the calculation."""
    base = config.base_batch_size or (PRESET_BATCH_SIZE if config.total_batch_size else config.batch_size)
    if batch_size == base:
        return config.lr, f"{config.lr:g}"
    lr = config.lr * math.sqrt(batch_size / base)
    return lr, f"{lr:.3g} = {config.lr:g} × √({batch_size} / {base})"


def lr_factor(config: TrainConfig, step: int, progress: float) -> float:
    """Return the factor of the learning rates after `step` optimizer steps, with 0..1 of the training done.

    Warm-up rises linearly over `warmup_steps`. Schedule "step" divides by 10 at `lr_drop`, "cosine" falls to 0.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "step":
        return warmup * (0.1 if progress >= config.lr_drop else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, progress: float) -> None:
    """Set the learning rate of every group for this step."""
    factor = lr_factor(config, step, progress)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["factor"] * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer state by parameter name: "NAME/exp_avg", "NAME/exp_avg_sq", "NAME/step"."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named_parameters(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what `optimizer_tensors` returned; entries of parameters that are no longer trained are ignored.

    Raises UserError if an entry has another shape than its parameter.
    """
    parameters = _named_parameters(optimizer)
    for entry, value in tensors.items():
        name, _, key = entry.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            continue
        if value.ndim and value.shape != parameter.shape:
            raise UserError(f"the checkpoint's optimizer state does not fit the model: {entry}")
        # In the memory format of the parameter: the fused update walks through memory, not through indices.
        state = torch.empty_like(parameter if value.ndim else value, dtype=value.dtype, device=parameter.device)
        optimizer.state[parameter][key] = state.copy_(value)


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
