"""`deformable-detr evaluate`."""

from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.terminal import echo, printable_name
from ..utils.tiles import DEFAULT_OVERLAP
from .options import (
    DataOverrides,
    Dataset,
    Device,
    JsonFile,
    Model,
    NonNegative,
    Positive,
    Precision,
    Split,
    Tile,
    TileOverlap,
)
from .options import format_metric as fmt


def evaluate(
    model: Model,
    data: Dataset,
    *,
    split: Split = "val",
    report: Path | None = None,
    compare: Path | None = None,
    batch_size: Positive = 4,
    workers: NonNegative = 2,
    device: Device = "auto",
    precision: Precision | None = None,
    tile: Tile = None,
    tile_overlap: TileOverlap = DEFAULT_OVERLAP,
    set_: DataOverrides = None,
    json: JsonFile = None,
) -> None:
    """Evaluate a model on a dataset: the twelve COCO metrics and the AP of each class, of boxes and masks.

    Args:
        report: HTML file for precision-recall curves, error types, calibration and the worst images.
        compare: Second model to evaluate and compare with.
        batch_size: Images or tiles per batch.
        workers: Processes that load images; 0: load in the main process.
        precision: fp32 or bf16 of the optimized model, as in predict. Default: the model as trained.
    """
    from ..config.resolve import resolve_config
    from ..evaluation.evaluator import compare_metrics, evaluate_models
    from ..utils.files import prepare_files, write_json

    if report is not None and report.suffix.lower() not in {".html", ".htm"}:
        raise UserError(f"--report {report}: must end in .html")
    prepare_files({"--report": report, "--json": json})
    if override := next((item for item in set_ or () if not item.startswith("data.")), None):
        raise UserError(f"--set {override}: only data keys, such as data.val_images, can be set here")
    models = [model] if compare is None else [model, compare]
    data_config = resolve_config(overrides=set_ or ()).data
    results = evaluate_models(
        models, data, split, data_config, device, precision, batch_size=batch_size, workers=workers, tile=tile,
        tile_overlap=tile_overlap,
    )  # fmt: skip
    if compare is not None:
        echo(", ".join(f"{letter}: {result.name}" for letter, result in zip("AB", results, strict=True)))
    echo(metrics_table(*(result.metrics for result in results)))
    if json is not None:
        write_json(json, compare_metrics(results))
    if report is not None:
        from ..evaluation.report import write_report
        from ..utils.progress import stage_bar

        with stage_bar("report", 1) as bar:
            bar.stage(f"write {report.name}")
            write_report(report, results, data.resolve().name, split)
        echo(f"report: {report}")


def metrics_table(metrics: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """Format metrics and per-class AP in columns; with the metrics of a second model: A, B and B − A."""
    rows = _rows(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    if other is None:
        return "\n".join(f"{name:<{width}}  {fmt(value)}" for name, value in rows)
    others = dict(_rows(other))
    lines = [f"{'':<{width}}  {'A':<6} {'B':<6}  B − A"]
    for name, value in rows:
        second = others.get(name)
        difference = "" if value is None or second is None else f"  {second - value:+.3f}"
        lines.append(f"{name:<{width}}  {fmt(value):<6} {fmt(second):<6}{difference}".rstrip())
    return "\n".join(lines)


def _rows(metrics: dict[str, Any]) -> list[tuple[str, float | None]]:
    rows = [(name, value) for name, value in metrics.items() if isinstance(value, float) or value is None]
    rows += [(f"AP of {printable_name(name)}", value) for name, value in metrics.get("per_class", {}).items()]
    masks = _rows(metrics["segm"]) if "segm" in metrics else []
    return rows + [(f"mask {name}", value) for name, value in masks]
