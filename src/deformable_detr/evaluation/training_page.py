"""The page of a training run: its curves and gallery as far as it has got, in one self-contained file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..visualize.web.html import fill
from .gallery import read_gallery

PAGE = "training.html"
MOST_POINTS = 400  # a curve; more are averaged in groups
TRAIN = ("loss", "loss_class", "loss_boxes", "loss_giou", "lr", "images_per_second", "grad_norm")
EVALUATION = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "best_AP")


def write_training_page(run_folder: Path) -> Path:
    """Writes training.html in the folder of a run, from its metrics.jsonl and gallery; it is whole at any time.

    Raises UserError where it cannot be written.
    """
    records = _records(run_folder / "metrics.jsonl")
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    train = _thin([record for record in records if record.get("kind") == "train"])
    last = records[-1] if records else {}
    content = {
        "name": run_folder.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": last.get("step", 0),
        "epoch": last.get("epoch", 0),
        "seconds": last.get("seconds", 0),
        "train": {name: [[row["step"], row[name]] for row in train if row.get(name) is not None] for name in TRAIN},
        "evaluation": {name: [[row["step"], _number(row.get(name))] for row in evaluations] for name in EVALUATION},
        "gallery": read_gallery(run_folder, [record["step"] for record in evaluations]),
    }
    title = f"Training of {content['name']}"
    scripts = ["elements.js", "charts.js", "training.js"]
    text = fill("deformable_detr.visualize.web", "training.html", title, content, ["style.css"], scripts)
    write_text(run_folder / PAGE, text)
    return run_folder / PAGE


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines; the last may be cut where a process was killed or is just writing."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _thin(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many rows: means of neighbors, at the step of the last of them."""
    group = max(1, math.ceil(len(records) / MOST_POINTS))
    thinned = []
    for start in range(0, len(records), group):
        rows = records[start : start + group]
        mean: dict[str, Any] = {"step": rows[-1]["step"]}
        for name in TRAIN:
            values = [value for row in rows if (value := _number(row.get(name))) is not None]
            mean[name] = float(f"{sum(values) / len(values):.5g}") if values else None
        thinned.append(mean)
    return thinned


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
