"""One model, or two on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.schema import DataConfig
from ..utils.failures import explain_machine_errors
from .evaluator import Evaluated, dataset_for, detect_dataset


def evaluate_models(
    models: Sequence[Path],
    data: Path,
    data_config: DataConfig | None = None,
    split: str = "val",
    batch_size: int = 4,
    workers: int = 2,
    limit: int | None = None,
    device: str = "auto",
    precision: str | None = None,
) -> list[tuple[str, Evaluated]]:
    """(name, what was found) of each model; options as in `evaluation.evaluate`.

    precision: see `load_detector`.

    The name is the last part of the path that tells the models apart. What is wrong with any of them is said before the
    first is evaluated.
    """
    from ..detector import load_detector

    detectors = [load_detector(model, device, precision) for model in models]
    sets = [dataset_for(detector, data, split, data_config) for detector in detectors]
    with explain_machine_errors(batch_size, workers):
        found = [
            detect_dataset(detector, dataset, batch_size, workers, limit)
            for detector, dataset in zip(detectors, sets, strict=True)
        ]
    return list(zip(_names(models), found, strict=True))


def outcome(evaluated: Sequence[tuple[str, Evaluated]]) -> dict[str, Any]:
    """The first model's metrics; with a second one's under "compare", and what B − A is under "difference"."""
    first, *others = [one.metrics for _, one in evaluated]
    if not others:
        return first
    return {**first, "compare": others[0], "difference": _difference(first, others[0])}


def _difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """second − first of every figure of both; None where one of them has none."""
    differences: dict[str, Any] = {}
    for name, value in first.items():
        other = second.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            differences[name] = _difference(value, other)
        elif name in second and not isinstance(value, int):
            differences[name] = None if value is None or other is None else other - value
    return differences


def _names(models: Sequence[Path]) -> list[str]:
    """Such as "cards" of runs/cards, or "a/run" and "b/run"; a path itself where nothing tells them apart."""
    paths = [model.resolve() for model in models]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]
