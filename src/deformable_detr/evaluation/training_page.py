"""The page of a training run: its curves and gallery so far, in one self-contained file."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..visualize.web.html import render_page
from .gallery import read_gallery, read_json_lines

PAGE = "training.html"
MAX_POINTS = 400  # per curve; more are averaged in groups
TRAIN_CURVES = (
    "loss",
    "loss_class",
    "loss_bbox",
    "loss_giou",
    "loss_mask",
    "loss_dice",
    "lr",
    "images_per_second",
    "grad_norm",
)
EVALUATION_CURVES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "best_AP")


def write_training_page(run_dir: Path) -> Path:
    """Write training.html in the folder of a run, from its metrics.jsonl and gallery.

    Raises UserError if the file cannot be written.
    """
    records = [record for record in read_json_lines(run_dir / "metrics.jsonl") if "step" in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    train = _average_groups([record for record in records if record.get("kind") == "train"])
    last = records[-1] if records else {}
    content = {
        "name": run_dir.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": last.get("step", 0),
        "epoch": last.get("epoch", 0),
        "seconds": last.get("seconds", 0),
        "train": {key: [[row["step"], row[key]] for row in train if row.get(key) is not None] for key in TRAIN_CURVES},
        "evaluation": {
            key: [[row["step"], _finite_or_none(row.get(key))] for row in evaluations] for key in EVALUATION_CURVES
        }
        | {"mask_AP": [[row["step"], _finite_or_none(row.get("segm", {}).get("AP"))] for row in evaluations]},
        "gallery": read_gallery(run_dir, [record["step"] for record in evaluations]),
    }
    write_text(run_dir / PAGE, render_page("training", f"Training of {content['name']}", content))
    return run_dir / PAGE


def _average_groups(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average groups of successive records, so that at most `MAX_POINTS` are left, each at its group's last step."""
    size = max(1, math.ceil(len(records) / MAX_POINTS))
    averaged = []
    for start in range(0, len(records), size):
        group = records[start : start + size]
        row: dict[str, Any] = {"step": group[-1]["step"]}
        for key in TRAIN_CURVES:
            values = [value for record in group if (value := _finite_or_none(record.get(key))) is not None]
            row[key] = float(f"{sum(values) / len(values):.5g}") if values else None
        averaged.append(row)
    return averaged


def _finite_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
