"""One optimizer step: forward, losses, backward, clipping, update, and the check for losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..data.dataloader import Batch, mix_seeds
from ..data.multi_scale import MultiScaleBatches
from ..distributed.context import DistributedContext
from ..distributed.parallel import accumulate_gradients, parallelize, zero_with_gradient
from ..structures import ImageBatch, Target
from ..utils.errors import UserError
from .denoising import BatchConsistentRng
from .ema import exponential_moving_average
from .matcher import PackedTargets
from .objective import SetObjective
from .optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from .signals import NonFiniteLoss

if TYPE_CHECKING:
    from ..predict.predictor import Detector

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_OVERFLOWS = 50  # consecutive steps that fp16 may skip while its loss scale settles


@dataclass(frozen=True)
class BatchStats:
    """Sizes of the whole batch of a step, over all micro-batches and processes.

    first_image: Images of the processes of lower rank; the other fields are equal in every process.
    """

    images: int
    objects: int
    max_objects: int
    masks: int = 0
    first_image: int = 0
    world_size: int = 1

    @property
    def num_boxes(self) -> float:
        """Divisor of the losses in each process, whose gradients are then averaged over the processes."""
        return max(self.objects, 1) / self.world_size

    @property
    def num_masks(self) -> float:
        """Divisor of the mask losses, as `num_boxes` is of the others."""
        return max(self.masks, 1) / self.world_size

    @classmethod
    def combine(cls, counts: Sequence[Sequence[float]], rank: int = 0) -> BatchStats:
        """Return the stats for process `rank` from the `count_objects` of every process."""
        images, objects, max_objects, masks = ([int(numbers[index]) for numbers in counts] for index in range(4))
        return cls(sum(images), sum(objects), max(max_objects), sum(masks), sum(images[:rank]), len(counts))


def count_objects(micro_batches: Sequence[Batch]) -> tuple[int, int, int, int]:
    """Return (images, objects, most objects in an image, objects with a mask) of this process."""
    targets = [target for _, targets in micro_batches for target in targets]
    counts = [len(target.labels) for target in targets]
    masks = sum(int(target.has_mask.sum()) for target in targets if target.has_mask is not None)
    return len(counts), sum(counts), max(counts, default=0), masks


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step: "loss", its unweighted parts, and "grad_norm" before clipping.

    step: Counted from 1. lr: Learning rate of the base group.
    """

    step: int
    lr: float
    values: dict[str, float]


@dataclass
class _PendingMetrics:
    """Metrics of a step that the device may still be computing; bad_images have non-finite predictions."""

    step: int
    lr: float
    names: list[str]
    values: Tensor  # (len(names),)
    images: list[int]
    bad_images: list[int]


class TrainStep:
    """A model with its criterion, optimizer, loss scale and moving average.

    The matcher is the only wait for the device: the metrics of a step are read during the next one, after the
    matcher's copy. The device itself skips an update from a non-finite loss or gradient.
    """

    def __init__(
        self,
        model: Detector,
        config: TrainConfig,
        context: DistributedContext | None = None,
        multi_scale: MultiScaleBatches | None = None,
    ) -> None:
        self.model, self.config, self.multi_scale = model, config, multi_scale
        self.mean, self.std = model.get_buffer("pixel_mean"), model.get_buffer("pixel_std")
        self.device = self.mean.device
        self.context = context or DistributedContext(str(self.device), world_size=1)
        self.objective: Any = model.training_objective() or SetObjective(model, config)
        self.denoising = self.objective.denoising
        self.network = parallelize(self.objective, self.context)
        self.optimizer = build_optimizer(model, config, self.denoising)
        self.ema = exponential_moving_average(model, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._pending: _PendingMetrics | None = None
        self._overflows = 0

    @property
    def ema_or_model(self) -> Detector:
        """The model to evaluate and save: the moving average if there is one."""
        return self.model if self.ema is None else cast("Detector", self.ema.module)

    def step(
        self, micro_batches: Sequence[Batch], global_step: int, progress: float, stats: BatchStats | None = None
    ) -> StepMetrics | None:
        """Take one optimizer step on uint8 micro-batches as if they were one batch.

        Args:
            micro_batches: Of this process.
            global_step: Number of steps taken before.
            progress: Part of the training that is done, 0..1.
            stats: Of the whole step, if other processes take part. Each then has equally many micro-batches, some
                perhaps without images. Default: computed from `micro_batches`.

        Returns the metrics of the step before, if not read yet. Raises NonFiniteLoss for this step's predictions or the
        loss of the step before.
        """
        set_learning_rate(self.optimizer, self.config, global_step, progress)
        previous, pending = self.backward(micro_batches, global_step, stats)
        losses = self.context.all_reduce_mean(pending.values)
        grad_norm = self._update(losses[0])
        pending.names.append("grad_norm")
        pending.values = torch.cat([losses, grad_norm.reshape(1)])
        self._pending = pending
        return previous

    def backward(
        self, micro_batches: Sequence[Batch], global_step: int = 0, stats: BatchStats | None = None
    ) -> tuple[StepMetrics | None, _PendingMetrics]:
        """Compute the gradients of a step; see `step`. Return the metrics of the step before and this step's losses."""
        single = stats is None and len(micro_batches) == 1
        stats = stats or BatchStats.combine([count_objects(micro_batches)])
        previous, names, sums, bad_images, first = None, [], [], [], stats.first_image
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass: its activations take the gradients' place
        for index, (batch, targets) in enumerate(micro_batches):
            with accumulate_gradients(self.network, last=index == len(micro_batches) - 1):
                # A single micro-batch draws from the global generator; several draw parts of the same numbers.
                rng = None
                if not single:
                    rng = BatchConsistentRng(stats.images, first, mix_seeds(self.config.seed, global_step))
                losses, parts, finite, total = self._forward(batch, targets, stats, rng, global_step)
                if index == 0:
                    previous = self.flush_pending_metrics()
                names = ["loss", *parts]
                values = torch.stack([losses.detach(), *parts.values()])
                bad_images += [target.image_id for target, ok in zip(targets, finite, strict=False) if not ok]
                if bad_images and self.context.world_size == 1:
                    named = dict(zip(names, values.tolist(), strict=True))
                    raise NonFiniteLoss(global_step + 1, named, bad_images)
                if not single:
                    values[-1] *= len(targets) * stats.world_size / stats.images  # the cardinality error, a mean
                self.scaler.scale(total).backward()
            sums.append(values * bool(targets))
            first += len(targets)
        lr, images = self.optimizer.param_groups[0]["lr"], [target.image_id for _, ts in micro_batches for target in ts]
        return previous, _PendingMetrics(global_step + 1, lr, names, torch.stack(sums).sum(0), images, bad_images)

    def _forward(
        self,
        batch: ImageBatch,
        targets: Sequence[Target],
        stats: BatchStats,
        rng: BatchConsistentRng | None,
        global_step: int,
    ) -> tuple[Tensor, dict[str, Tensor], list[bool], Tensor]:
        """Return the losses of a micro-batch (see `objective`) and the scalar to differentiate."""
        images, shown = (batch, targets) if targets else _placeholder_batch()
        images = images.to(self.device, non_blocking=True).normalize(self.mean, self.std)
        if self.multi_scale is not None:
            images = self.multi_scale(images, global_step)
        packed, precision = PackedTargets.pack(shown), self.config.precision
        with torch.autocast(self.device.type, _DTYPES.get(precision), enabled=precision != "fp32"):
            outputs = self.network(images, packed, stats.max_objects, rng)
        losses = self.objective.losses(outputs, packed.to(self.device), stats.num_boxes, stats.num_masks)
        total, _, finite = losses
        if stats.world_size == 1:
            return *losses, total
        tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        total = total * bool(targets) + zero_with_gradient(tensors, *self.objective.unused_modules())
        if targets and not all(finite):
            total = total * math.nan  # all processes see it in the gradient and stop together
        return *losses, total

    def _update(self, loss: Tensor) -> Tensor:
        """Clip the gradients, update the weights and return the norm of the gradients before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_max_norm or math.inf)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # Fused AdamW skips the update if found_inf is 1, as with the GradScaler of fp16.
            self.optimizer.found_inf = (~torch.isfinite(norm + loss)).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return norm

    def flush_pending_metrics(self) -> StepMetrics | None:
        """Return the metrics of the last step if not read yet; raise `NonFiniteLoss` if they are not finite.

        In fp16 the gradient may overflow occasionally: the step is skipped and the loss scale halves.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        values = dict(zip(pending.names, pending.values.tolist(), strict=True))
        losses = {name: value for name, value in values.items() if name != "grad_norm"}
        if not all(map(math.isfinite, losses.values())):
            self._raise_non_finite(pending, losses, "loss")
        overflow = not math.isfinite(values["grad_norm"])
        self._overflows = self._overflows + 1 if overflow else 0
        if overflow and (not self.scaler.is_enabled() or self._overflows >= _MAX_OVERFLOWS):
            self._raise_non_finite(pending, losses, "gradient of the loss")
        return StepMetrics(pending.step, pending.lr, values)

    def _raise_non_finite(self, pending: _PendingMetrics, losses: dict[str, float], what: str) -> NoReturn:
        """Raise in every process, all of which have the same metrics, naming the images of all."""
        gathered = self.context.all_gather_object((pending.bad_images, pending.images))
        self.context.exit_synced = True
        image_ids = [image for bad, _ in gathered for image in bad] or [image for _, ids in gathered for image in ids]
        raise NonFiniteLoss(pending.step, losses, image_ids, what)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors that an exact resume needs, by group."""
        groups = {name: module.state_dict() for name, module in self._modules_to_save().items()}
        return {**groups, "optimizer": optimizer_tensors(self.optimizer)}

    def load_state_tensors(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Restore what `state_tensors` returned; a group that the config no longer needs is ignored."""
        for name, module in self._modules_to_save().items():
            if name not in tensors:
                option = {"denoising": "num_denoising", "ema": "ema_decay"}[name]
                raise UserError(f"cannot resume: the run had train.{option}=0; set it to 0, or start a new run")
            module.load_state_dict(tensors[name])
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])

    def _modules_to_save(self) -> dict[str, nn.Module]:
        modules = {"model": self.model, "denoising": self.denoising, "ema": self.ema}
        return {name: module for name, module in modules.items() if module is not None}


def _placeholder_batch() -> Batch:
    """Return one black image, for a process without images that must compute with the others."""
    side = 128  # pixels; two or more cells at every stride, which trainable norms need
    pixels, mask = torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, side, side, dtype=torch.bool)
    return ImageBatch(pixels, mask), [Target.empty(-1, (side, side))]
