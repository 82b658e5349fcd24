"""From a data set to a model: train, check, split, demo."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..utils.errors import UserError
from .app import app
from .options import DataOverrides, Flag, JsonFile, Overrides, Preset, summary


@app.command
def train(
    data: Path | None = None,
    *,
    out: Path | None = None,
    preset: Preset | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    total_batch_size: int | None = None,
    patience: int | None = None,
    backbone: str | None = None,
    backbone_weights: str | None = None,
    weights: str | None = None,
    lr: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    device: str | None = None,
    workers: int | None = None,
    seed: int | None = None,
    config: Path | None = None,
    set_: Overrides = None,
    check: Literal["auto", "full", "off"] | None = None,
    resume: Annotated[bool, Flag] = False,
    print_config: Annotated[bool, Flag] = False,
) -> None:
    """Train a detector on a data set.

    An option wins over --set, --set over --config, and all of them over the preset.

    Args:
        data: Folder of the data set: COCO JSON, YOLO (data.yaml) or Pascal VOC.
        out: Folder for the config, the metrics, the checkpoints and the model.
        preset: The variant to start from; where nothing names one, what --weights has, else small.
        epochs: Passes over the training images, at most.
        minutes: Minutes of training, at most.
        image_size: Short side of the input in pixels.
        batch_size: Images that a process has in memory at a time.
        total_batch_size: Images an optimizer step, over all passes and processes; lr scales with its square root.
        patience: Stop after so many evaluations without a better AP.
        backbone: Any timm model that gives feature maps.
        backbone_weights: hub (download), none (random) or the path of a safetensors file.
        weights: Model to fine-tune: a run or model folder, a transformers folder or hub id, an official .pth.
        lr: Learning rate.
        precision: Number format of the heavy computations.
        device: cpu, cuda, cuda:1, mps; auto: the fastest there is.
        workers: Processes that load images.
        seed: Start of all random choices.
        config: YAML file with any keys of the config.
        check: How long to look for faults in the data set first: auto, at most 40 seconds.
        resume: Go on with the run in the folder --out, with its own config.
        print_config: Print the config that would be used, and stop.
    """
    from ..config.resolve import resolve_config
    from ..distributed.launch import is_rank_zero, restarted
    from ..weights.finetune import finetune_config

    own = None if out is None else out / "config.yaml"
    begun = (resume or restarted()) and config is None and own is not None and own.is_file()
    if begun:
        config = own
    options = {
        "train.epochs": epochs,
        "train.minutes": minutes,
        "model.image_size": image_size,
        "train.batch_size": batch_size,
        "train.total_batch_size": total_batch_size,
        "train.patience": patience,
        "model.backbone": backbone,
        "model.backbone_weights": backbone_weights,
        "train.weights": weights,
        "train.lr": lr,
        "train.precision": precision,
        "train.device": device,
        "data.workers": workers,
        "data.check": check,
        "train.seed": seed,
    }
    settings = resolve_config(None if begun else preset, config, set_ or (), options, config_of_weights=finetune_config)
    if begun and preset not in (None, settings.preset):
        raise UserError(f"--preset {preset}: the run in {out} began with {settings.preset}, and keeps it")
    if print_config:
        print(settings.to_yaml(), end="")
        return
    if data is None or out is None:
        raise UserError("train needs a data set and a folder for the run: deformable-detr train DATA --out runs/NAME")

    from ..training.trainer import train_model

    metrics = train_model(data, out, settings, resume=resume)
    if not is_rank_zero():
        return
    print(f"{summary(metrics)}; the model is in {out}")
    print(f"next: deformable-detr predict {shlex.quote(str(out))} IMAGE --out pictures")


@app.command
def check(
    data: Path,
    *,
    image_size: int | None = None,
    fix: Annotated[Path | None, Parameter(help="empty folder for a repaired copy; the set itself stays")] = None,
    report: Annotated[Path | None, Parameter(help="HTML file: what was found, with pictures")] = None,
    set_: Overrides = None,
    json: JsonFile = None,
) -> None:
    """Look for everything that is wrong with a data set. Exit code 2 where training could not use it.

    Args:
        data: Folder of the data set: COCO JSON, YOLO (data.yaml) or Pascal VOC.
        image_size: Short side of the input in pixels, for which objects may be too small.
    """
    from ..config.resolve import resolve_config
    from .check import run

    settings = resolve_config(None, None, set_ or (), {"model.image_size": image_size})
    if not run(data, settings, fix, report, json):
        sys.exit(2)


@app.command
def split(
    data: Path,
    *,
    out: Annotated[Path, Parameter(help="empty folder for the divided copy; the set itself stays")],
    val: float = 0.2,
    test: float = 0.0,
    group_by: str | None = None,
    seed: int = 0,
    set_: DataOverrides = None,
) -> None:
    """Copy a data set without a validation split into one that has one, repaired as by check --fix.

    Args:
        data: Folder of the data set: COCO JSON, YOLO or Pascal VOC.
        val: Part of the images to validate on, 0 to 1.
        test: Part of the images for a test split, 0 to 1.
        group_by: Regular expression: images in whose names it matches the same text stay together, as '^[^_]+' for
            frames called VIDEO_0001.jpg.
        seed: For another division of the same set.
    """
    from ..config.resolve import resolve_config
    from ..data.split import SplitOptions
    from .check import split as run

    if not run(data, out, resolve_config(None, None, set_ or ()), SplitOptions(val, test, seed, group_by)):
        sys.exit(2)


@app.command
def demo(*, out: Path = Path("runs/demo")) -> None:
    """Make a small data set of handwritten digits on photographs, train on it, evaluate, draw what was found.

    Args:
        out: Folder for the data set, the run and the pictures.
    """
    from ..demo import run

    run(out)
