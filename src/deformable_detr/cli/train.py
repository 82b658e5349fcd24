"""`deformable-detr train`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from ..utils.errors import UserError
from ..utils.terminal import echo
from .options import Dataset, Flag, Overrides, Preset, config_options, format_metric


@config_options(
    "train.epochs",
    "train.minutes",
    "model.masks",
    "model.image_size",
    "train.batch_size",
    "train.total_batch_size",
    "train.patience",
    "model.backbone",
    "model.backbone_weights",
    "train.weights",
    "train.lr",
    "train.precision",
    "train.device",
    "data.tile",
    "data.repeat_threshold",
    "data.workers",
    "train.seed",
    "data.check",
)
def train(
    data: Dataset | None = None,
    *,
    out: Path | None = None,
    preset: Preset | None = None,
    config: Path | None = None,
    set_: Overrides = None,
    resume: Annotated[bool, Flag] = False,
    print_config: Annotated[bool, Flag] = False,
    settings: dict[str, Any],
) -> None:
    """Train a detector on a dataset.

    Options override --set, --set overrides --config, and --config overrides the preset.

    Default values are those of the preset small.

    Args:
        out: Folder for the config, metrics, checkpoints and model.
        preset: Variant to start from. Default: that of --config or --weights, else small.
        config: YAML file with any keys of the config.
        resume: Resume the run in --out with its config.
        print_config: Print the resulting config and exit.
    """
    from ..config.resolve import resolve_config
    from ..detector import finetune_config
    from ..distributed.launch import is_rank_zero, restarted

    run_config = None if out is None else out / "config.yaml"
    resumed = (resume or restarted()) and config is None and run_config is not None and run_config.is_file()
    resolved = resolve_config(
        None if resumed else preset,
        run_config if resumed else config,
        set_ or (),
        settings,
        config_of_weights=finetune_config,
    )
    if resumed and preset not in (None, resolved.preset):
        raise UserError(f"--preset {preset}: the run in {out} uses {resolved.preset}; leave --preset out to resume it")
    if print_config:
        print(resolved.to_yaml(), end="")
        return
    if data is None or out is None:
        raise UserError("train requires DATA and --out, also with --resume: deformable-detr train DATA --out runs/NAME")

    from ..training.trainer import train_model

    metrics = train_model(data, out, resolved, resume=resume)
    if not is_rank_zero():
        return
    summary = ", ".join(f"{name} {format_metric(metrics[name])}" for name in ("AP", "AP50") if name in metrics)
    if "segm" in metrics:
        summary += f", mask AP {format_metric(metrics['segm']['AP'])}"
    best = f"best {'mask AP' if 'segm' in metrics else 'AP'}, {format_metric(metrics['best_AP']).strip()}"
    echo(f"{summary} at the end; the model with the {best}, is in {out}")
    tile = "" if resolved.data.tile is None else f" --tile {resolved.data.tile}"
    echo(f"Next: deformable-detr predict {shlex.quote(str(out))} IMAGE --out pictures{tile}")
