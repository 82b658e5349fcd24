"""One optimiser step: forward, losses, backward, clipping, update; and the watch for losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import UserError
from ..structures import ImageBatch, Target
from .average import average_of
from .denoising import Denoising
from .losses import DetectionLoss
from .optimiser import build_optimiser, load_optimiser_tensors, optimiser_tensors, set_learning_rate
from .stopping import NonFiniteLoss

if TYPE_CHECKING:
    from ..model.detector import DeformableDETR

_OVERFLOWS = 50  # steps in a row that fp16 may lose to overflow while its scale settles


@dataclass(frozen=True)
class StepFigures:
    """What a step gave: "loss", its unweighted parts and "grad_norm" before clipping.

    step: counted from 1; lr: of the base group.
    """

    step: int
    lr: float
    values: dict[str, float]


@dataclass(frozen=True)
class _Pending:
    """Figures that the device may still compute while the host goes on."""

    step: int
    lr: float
    image_ids: list[int]
    names: list[str]
    values: Tensor  # (len(names),)


class Stepper:
    """A model and all that changes it.

    Nothing here waits for the device but the matcher: a step's figures are read during the next one, after the
    matcher's copy. An update from a loss or gradient that is not finite is left out on the device itself.
    """

    def __init__(self, model: DeformableDETR, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.mean, self.std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
        self.device = self.mean.device
        self.criterion = DetectionLoss(config, model.config.class_proposals)
        self.helpers = nn.ModuleDict()  # what learns beside the model and is no part of it
        if config.denoising:
            if not model.config.two_stage:
                raise UserError("train.denoising needs model.two_stage: true; set train.denoising=0")
            self.helpers["denoising"] = Denoising(config, model.config.num_classes, model.config.hidden_dim)
        self.helpers.to(self.device)
        self.optimiser = build_optimiser(model, config, self.helpers)
        self.average = None if not config.ema_decay else average_of(model, config.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._pending: _Pending | None = None
        self._overflows = 0

    def step(self, batch: ImageBatch, targets: Sequence[Target], done: int, progress: float) -> StepFigures | None:
        """Learns from a uint8 batch; `done` steps came before, `progress` 0..1 of the training is over.

        Returns the figures of the step before. Raises `NonFiniteLoss` for this step's predictions or that step's loss.
        """
        set_learning_rate(self.optimiser, self.config, done, progress)
        batch = batch.to(self.device, non_blocking=True).normalise(self.mean, self.std)
        with _autocast(self.device, self.config.precision):
            noisy = None
            if "denoising" in self.helpers:
                noisy = self.helpers["denoising"](targets, self.model.config.num_queries)
            outputs = self.model(batch.pixels, batch.padding_mask, extra=noisy and noisy[0])
        losses = self.criterion(outputs, targets, known=noisy and noisy[1:])
        before = self.settle()
        names = ["loss", *losses.parts, "grad_norm"]
        values = [losses.total.detach(), *losses.parts.values()]
        if not all(losses.finite):
            bad = [target.image_id for target, finite in zip(targets, losses.finite, strict=True) if not finite]
            numbers = dict(zip(names, torch.stack(values).tolist(), strict=False))
            raise NonFiniteLoss(done + 1, numbers, bad)

        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()
        values.append(self._update(losses.total.detach()))
        self._pending = _Pending(
            done + 1,
            self.optimiser.param_groups[0]["lr"],
            [target.image_id for target in targets],
            names,
            torch.stack(values),
        )
        return before

    def _update(self, loss: Tensor) -> Tensor:
        """Clips the gradients and takes the step; returns their norm."""
        self.scaler.unscale_(self.optimiser)
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimiser)
            self.scaler.update()
        else:
            # Fused AdamW changes nothing where this is 1, as the scaler of fp16 has it do.
            self.optimiser.found_inf = (~torch.isfinite(norm + loss)).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return norm

    @property
    def learned(self) -> DeformableDETR:
        """The model to evaluate and keep: the averaged one where there is an average."""
        return self.model if self.average is None else cast("DeformableDETR", self.average.module)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint must hold to go on exactly here, by groups."""
        groups = {"model": self.model.state_dict(), "optimiser": optimiser_tensors(self.optimiser)}
        if self.helpers:
            groups["helpers"] = self.helpers.state_dict()
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        return groups

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Goes back to what `tensors` gave."""
        self.model.load_state_dict(tensors["model"])
        load_optimiser_tensors(self.optimiser, tensors["optimiser"])
        if self.helpers:
            self.helpers.load_state_dict(tensors["helpers"])
        if self.average is not None:
            self.average.load_state_dict(tensors["average"])

    def settle(self) -> StepFigures | None:
        """The figures of the last step if nobody had them yet; `NonFiniteLoss` if they are not finite.

        In fp16 the gradient may overflow now and then: that step is lost and the scale falls.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        values = dict(zip(pending.names, pending.values.tolist(), strict=True))
        losses = {name: value for name, value in values.items() if name != "grad_norm"}
        if not all(map(math.isfinite, losses.values())):
            raise NonFiniteLoss(pending.step, losses, pending.image_ids)
        overflow = not math.isfinite(values["grad_norm"])
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow and (not self.scaler.is_enabled() or self._overflows >= _OVERFLOWS):
            raise NonFiniteLoss(pending.step, losses, pending.image_ids, "gradient of the loss")
        return StepFigures(pending.step, pending.lr, values)


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
