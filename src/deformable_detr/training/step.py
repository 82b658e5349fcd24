"""One optimizer step: forward, losses, backward, clipping, update; and the watch for losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..distributed.context import DistributedContext
from ..distributed.parallel import gradients, parallelize, touch
from ..structures import ImageBatch, Target
from ..utils.errors import UserError
from .criterion import LossOutput, SetCriterion
from .denoising import BatchConsistentRng, Denoising
from .ema import average_of
from .matcher import Matches
from .optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from .signals import NonFiniteLoss
from .totals import Batch, BatchStats, combined, own_figures

if TYPE_CHECKING:
    from ..detector import DeformableDETR

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
    """Figures that the device may still compute while the host goes on; bad: images with predictions not finite."""

    step: int
    lr: float
    image_ids: list[int]
    bad: list[int]
    names: list[str]
    values: Tensor  # (len(names),)


class TrainStep:
    """A model and all that changes it.

    Nothing here waits for the device but the matcher: a step's figures are read during the next one, after the
    matcher's copy. An update from a loss or gradient that is not finite is left out on the device itself.
    """

    def __init__(self, model: DeformableDETR, config: TrainConfig, world: DistributedContext | None = None) -> None:
        self.model, self.config = model, config
        self.mean, self.std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
        self.device = self.mean.device
        self.world = world or DistributedContext(str(self.device), size=1)
        self.criterion = SetCriterion(config, model.config.class_aware_proposals)
        self.helpers = nn.ModuleDict()  # what learns beside the model and is no part of it
        if config.num_denoising:
            if not model.config.two_stage:
                raise UserError("train.num_denoising needs model.two_stage: true; set train.num_denoising=0")
            self.helpers["denoising"] = Denoising(config, model.config.num_classes, model.config.hidden_dim)
        self.helpers.to(self.device)
        self.network = parallelize(_Network(model, self.helpers), self.world)
        self.optimizer = build_optimizer(model, config, self.helpers)
        self.average = average_of(model, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._pending: _Pending | None = None
        self._overflows = 0

    def step(
        self, passes: Sequence[Batch], done: int, progress: float, totals: BatchStats | None = None
    ) -> StepFigures | None:
        """Learns from uint8 batches as if they were one, pass by pass; `done` steps came before.

        progress: 0..1, part of the training that is over. totals: of the whole step, where other processes have passes
        too, equally many, some perhaps without images; none: these passes are all of it.

        Returns the figures of the step before. Raises `NonFiniteLoss` for this step's predictions or that step's loss.
        """
        set_learning_rate(self.optimizer, self.config, done, progress)
        before, names, values, bad = self.backward(passes, done, totals)
        values = self.world.mean(values)
        norm = self._update(values[0])
        image_ids = [target.image_id for _, targets in passes for target in targets]
        rate = self.optimizer.param_groups[0]["lr"]
        self._pending = _Pending(
            done + 1, rate, image_ids, bad, [*names, "grad_norm"], torch.cat([values, norm.reshape(1)])
        )
        return before

    def backward(
        self, passes: Sequence[Batch], done: int = 0, totals: BatchStats | None = None
    ) -> tuple[StepFigures | None, list[str], Tensor, list[int]]:
        """Puts the gradients of the whole step in place; see `step`.

        Returns the figures of the step before, and of this one the names and values of the losses, of which the mean
        over the processes is that of the step, and the images whose predictions are not finite.
        """
        plain = totals is None and len(passes) == 1
        totals = totals or combined([own_figures(passes)])
        before, names, sums, bad, first = None, [], [], [], totals.first
        self.optimizer.zero_grad(set_to_none=True)  # before the pass: its activations take the gradients' place
        for number, (batch, targets) in enumerate(passes):
            with gradients(self.network, last=number == len(passes) - 1):
                # Alone, a pass draws from the generators that everybody seeds; in company, all draw the same numbers.
                noise = None if plain else BatchConsistentRng(totals.images, first, _mixed(self.config.seed, done))
                losses, total = self._losses(batch, targets, totals, noise)
                if number == 0:
                    before = self.settle()
                names = ["loss", *losses.parts]
                values = torch.stack([losses.total.detach(), *losses.parts.values()])
                bad += [target.image_id for target, finite in zip(targets, losses.finite, strict=False) if not finite]
                if bad and self.world.size == 1:
                    raise NonFiniteLoss(done + 1, dict(zip(names, values.tolist(), strict=True)), bad)
                if not plain:
                    values[-1] *= len(targets) * totals.processes / totals.images  # a mean over images
                self.scaler.scale(total).backward()
            sums.append(values * bool(targets))
            first += len(targets)
        return before, names, torch.stack(sums).sum(0), bad

    def _losses(
        self, batch: ImageBatch, targets: Sequence[Target], totals: BatchStats, noise: BatchConsistentRng | None
    ) -> tuple[LossOutput, Tensor]:
        """The losses of a pass, and the scalar to differentiate."""
        batch, shown = (batch, targets) if targets else _placeholder()
        batch = batch.to(self.device, non_blocking=True).normalize(self.mean, self.std)
        with _autocast(self.device, self.config.precision):
            outputs, known = self.network(batch.pixels, batch.padding_mask, shown, totals.most, noise)
        losses = self.criterion(outputs, shown, totals.num_boxes, known)
        if totals.processes == 1:
            return losses, losses.total
        total = losses.total * bool(targets) + touch(outputs, self.helpers)
        if targets and not all(losses.finite):
            total = total * math.nan  # all processes will see it in the gradient and stop together
        return losses, total

    def _update(self, loss: Tensor) -> Tensor:
        """Clips the gradients and takes the step; returns their norm."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_max_norm or math.inf)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # Fused AdamW changes nothing where this is 1, as the scaler of fp16 has it do.
            self.optimizer.found_inf = (~torch.isfinite(norm + loss)).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return norm

    @property
    def learned(self) -> DeformableDETR:
        """The model to evaluate and keep: the averaged one where there is an average."""
        return self.model if self.average is None else cast("DeformableDETR", self.average.module)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint must hold to go on exactly here, by groups."""
        groups = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.optimizer)}
        if self.helpers:
            groups["helpers"] = self.helpers.state_dict()
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        return groups

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Goes back to what `tensors` gave."""
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        for name, part, setting in (("helpers", self.helpers, "num_denoising"), ("average", self.average, "ema_decay")):
            if not part:  # also where the checkpoint has it: the run goes on without
                continue
            if name not in tensors:
                raise UserError(f"the run was without train.{setting}: set it to 0 to go on, or start a new run")
            part.load_state_dict(tensors[name])

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
            self._stop(pending, losses)
        overflow = not math.isfinite(values["grad_norm"])
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow and (not self.scaler.is_enabled() or self._overflows >= _OVERFLOWS):
            self._stop(pending, losses, "gradient of the loss")
        return StepFigures(pending.step, pending.lr, values)

    def _stop(self, pending: _Pending, losses: dict[str, float], what: str = "loss") -> NoReturn:
        """Raises in every process, which all have the same figures, and names the images of all."""
        everyone = self.world.all_gather_object((pending.bad, pending.image_ids))
        self.world.agreed = True
        ids = [number for bad, _ in everyone for number in bad] or [number for _, own in everyone for number in own]
        raise NonFiniteLoss(pending.step, losses, ids, what)


class _Network(nn.Module):
    """What a pass computes with: the model, and what learns beside it."""

    def __init__(self, model: DeformableDETR, helpers: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.helpers = model, helpers

    def forward(
        self,
        pixels: Tensor,
        padding_mask: Tensor,
        targets: Sequence[Target],
        most: int,
        noise: BatchConsistentRng | None,
    ) -> tuple[dict[str, Tensor], tuple[Matches, int] | None]:
        noisy = None
        if "denoising" in self.helpers:
            noisy = self.helpers["denoising"](targets, self.model.config.num_queries, most, noise)
        outputs = self.model(pixels, padding_mask, denoising_queries=noisy and noisy[0])
        return outputs, noisy and noisy[1:]


def _placeholder() -> Batch:
    """One black image, for a process that has none in a pass and must compute with the others all the same."""
    side = 128  # pixels; two or more cells at every stride that learning norms see
    pixels, mask = torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, side, side, dtype=torch.bool)
    nothing = Target.empty(-1, (side, side))
    return ImageBatch(pixels, mask), [nothing]


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _autocast(device: torch.device, precision: str) -> Any:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
