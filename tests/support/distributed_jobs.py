"""Jobs for the processes of a test: `python distributed_jobs.py JOB FOLDER`, started by `processes.launch`."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deformable_detr.config.image_size import ShortestEdge
from deformable_detr.data.dataloader import DistributedBatchSampler, LoaderOptions, collate
from deformable_detr.detector import DeformableDETR
from deformable_detr.distributed.context import DistributedContext
from deformable_detr.structures import Target
from deformable_detr.training.step import BatchStats, TrainStep, count_objects
from deformable_detr.utils.errors import UserError
from tests.support.training import random_targets, tiny_config

JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {}


def job(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    JOBS[function.__name__] = function
    return function


def outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """Return the result of an action, or how it ended."""
    try:
        return {"result": action()}
    except UserError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except SystemExit as error:
        return {"exit": error.code}


def next_port() -> None:
    """Use another port for each process group, because the previous one may still be in use."""
    port, _, rest = os.environ["JOB_PORTS"].partition(",")
    os.environ["MASTER_PORT"], os.environ["JOB_PORTS"] = port, rest


# --- gradients ------------------------------------------------------------------------------------------------------

# Objects per image of a step, and images per pass.
CASES = {
    "mixed": ([2, 1, 5, 0], 2),
    "one rank empty": ([2, 1, 0, 0], 2),
    "all empty": ([0, 0, 0, 0], 2),
    "fewer boxes than ranks": ([1, 0], 2),
    "uneven last batch": ([2, 1, 3], 2),
    "no image on one rank": ([2], 2),
    "accumulation": ([2, 0, 1, 4, 0, 0, 3], 2),
    "accumulation with an empty pass": ([1, 2, 0, 3, 1], 2),
}


def gradient_config(**train: Any) -> Any:
    """Return a config with every loss, and norms that do not depend on the rest of the batch."""
    model = {
        "backbone_norm": "frozen",
        "class_aware_proposals": True,
        "query_init": "encoder",
        "look_forward_twice": True,
        "masks": True,
    }
    changes = {"num_denoising": 20, "class_loss": "mal", **train}
    return tiny_config().updated({"model": model, "train": changes})


def copy_gradients(stepper: TrainStep) -> dict[str, torch.Tensor]:
    values = {}
    for module in filter(None, (stepper.model, stepper.denoising)):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                shape = parameter.shape
                values[name] = torch.zeros(shape) if grad is None else grad.detach().clone()
    return values


def max_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@job
def gradients(folder: Path) -> dict[str, Any]:
    """Compare the gradients of several processes with those of one, for each case and with deliberate mistakes."""
    torch.set_default_dtype(torch.float64)
    config = gradient_config()
    torch.manual_seed(0)
    model = DeformableDETR(config.model).train()
    next_port()
    results: dict[str, Any] = {}
    with DistributedContext("cpu") as context:
        steppers = {}
        torch.manual_seed(1)  # for the label embedding of denoising
        steppers["one"] = TrainStep(copy.deepcopy(model), config.train)
        torch.manual_seed(1)
        steppers["ddp"] = TrainStep(copy.deepcopy(model), config.train, context)

        for name, (sizes, batch_size) in CASES.items():
            generator = torch.Generator().manual_seed(len(name))
            targets = random_targets(sizes, 3, generator, masks=True)
            images = [torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8) for _ in sizes]
            samples: list[tuple[torch.Tensor, Target]] = list(zip(images, targets, strict=True))
            full_batch = [collate(samples)]
            steppers["one"].backward(full_batch, 0, BatchStats.combine([count_objects(full_batch)]))
            expected = copy_gradients(steppers["one"])

            options = LoaderOptions(
                batch_size, total_batch_size=len(sizes), rank=context.rank, world_size=context.world_size
            )
            sampler = DistributedBatchSampler(len(sizes), options)
            keys = [[key.index for key in batch] for batch in sampler]
            passes = [collate([samples[n] for n in part]) if part else (full_batch[0][0], []) for part in keys]
            totals = BatchStats.combine(context.all_gather(count_objects(passes)), context.rank)
            mistakes = {
                "local num_boxes": replace(totals, objects=count_objects(passes)[1] * context.world_size),
                "local num_masks": replace(totals, masks=count_objects(passes)[3] * context.world_size),
                "halved": replace(totals, objects=max(totals.objects, context.world_size)),
                "local noise": replace(totals, max_objects=max(count_objects(passes)[2], 1), first_image=0),
            }
            results[name] = {"size": max(float(value.abs().max()) for value in expected.values())}
            steppers["ddp"].backward(passes, 0, totals)
            results[name]["ddp"] = max_difference(copy_gradients(steppers["ddp"]), expected)
            for mistake, wrong in mistakes.items():
                if mistake == "local noise" and not totals.objects:
                    continue
                steppers["ddp"].backward(passes, 0, wrong)
                results[name][mistake] = max_difference(copy_gradients(steppers["ddp"]), expected)
            results[name]["passes"] = [len(targets) for _, targets in passes]
    return results


# --- complete runs ----------------------------------------------------------------------------------------------------


def run_config(**train: Any) -> Any:
    return tiny_config(batch_size=2, total_batch_size=4, base_batch_size=4, **train).updated(
        {
            "model": {"backbone_norm": "frozen", "resize": "fixed"},
            "data": {"check": "off", "train_scales": (1.0, 1.5)},  # every step has a size of its own
            "train": {"num_denoising": 10, "ema_decay": 0.9},
        }
    )


def train(data: Path, out: Path, config: Any, resume: bool = False) -> dict[str, Any]:
    from deformable_detr.training.trainer import train_model

    next_port()
    metrics = train_model(data, out, config, resume=resume)
    return {name: metrics[name] for name in ("AP", "step", "epoch", "images_seen", "seconds")}


@job
def runs(folder: Path) -> dict[str, Any]:
    """Train on 7 images of `folder`/data in two processes, in several ways."""
    data = folder / "data"
    return {
        "ddp": outcome(lambda: train(data, folder / "ddp", run_config())),
        "one resumed": outcome(lambda: train(data, folder / "one", run_config(epochs=2), resume=True)),
    }


@job
def evaluations(folder: Path) -> dict[str, Any]:
    """Evaluate in one process and in all, on five images of several sizes and on one image."""
    from deformable_detr.data.dataset import open_dataset
    from deformable_detr.data.transforms import EvalTransform
    from deformable_detr.evaluation.evaluator import evaluate_dataset, evaluate_distributed

    torch.manual_seed(0)
    config = tiny_config().model.replace(class_names=("red", "green", "blue"), category_ids=(10, 20, 30))
    model = DeformableDETR(config)
    next_port()
    results = {}
    with DistributedContext("cpu") as context:
        for name in ("five", "one"):
            dataset = open_dataset(folder / name, "val", transform=EvalTransform(ShortestEdge(64, 128)))
            distributed = evaluate_distributed(model, dataset, 2, 0, context)
            single = evaluate_dataset(model, dataset, 2, 0, progress=False).metrics
            results[name] = {"distributed": distributed, "single": single, "images": len(dataset)}
    return results


@job
def failures(folder: Path) -> dict[str, Any]:
    """A signal, an unreadable image and a NaN, each in the second process only."""
    data, original, second = folder / "data", TrainStep.step, os.environ["RANK"] == "1"
    results = {}

    def signalled(self: TrainStep, micro_batches: Any, global_step: int, *rest: Any) -> Any:
        if global_step == 1 and second:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, micro_batches, global_step, *rest)

    def poisoned(self: TrainStep, micro_batches: Any, global_step: int, *rest: Any) -> Any:
        if global_step == 2 and second:
            micro_batches[0][1][0].boxes[0, 0] = float("nan")
        return original(self, micro_batches, global_step, *rest)

    for name, step in (("signal", signalled), ("nan", poisoned)):
        TrainStep.step = step
        results[name] = outcome(lambda name=name: train(data, folder / name, run_config()))
        TrainStep.step = original
    results["image"] = outcome(lambda: train(folder / "broken", folder / "image", run_config()))
    results["resumed"] = outcome(lambda: train(data, folder / "signal", run_config(), resume=True))
    return results


@job
def crash(folder: Path) -> dict[str, Any]:
    """SIGKILL the second process in the third step."""
    original = TrainStep.step

    def step(self: TrainStep, micro_batches: Any, global_step: int, *rest: Any) -> Any:
        if global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, micro_batches, global_step, *rest)

    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        TrainStep.step = step
    return {"run": outcome(lambda: train(folder / "data", folder / "crash", run_config()))}


@job
def stuck(folder: Path) -> dict[str, Any]:
    """Rank 0 waits for a collective that rank 1 never joins."""
    if os.environ["RANK"] == "0":
        next_port()
        with DistributedContext("cpu") as context:
            context.all_gather([1.0])
    time.sleep(10_000)
    return {}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    results = JOBS[name](folder)
    (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(results))
