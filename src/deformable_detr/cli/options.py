"""What several verbs share: options by name, and how figures and complaints are printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

Flag = Parameter(negative=())
Preset = Literal["single-scale", "single-scale-dc5", "multi-scale", "refine", "two-stage", "small"]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, mps; auto: the fastest there is")]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="file for the results")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="any key of the config, such as train.lr=1e-4; may be repeated"),
]


def complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def summary(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(metrics[name])}" for name in ("AP", "AP50") if name in metrics)


def table(metrics: dict[str, Any]) -> str:
    """The figures in two columns: the set's, then each class's AP."""
    rows = [(name, value) for name, value in metrics.items() if isinstance(value, float) or value is None]
    classes = [(f"AP of {name}", value) for name, value in metrics.get("per_class", {}).items()]
    width = max((len(name) for name, _ in rows + classes), default=0)
    return "\n".join(f"{name:<{width}}  {_figure(value)}" for name, value in rows + classes)


def _figure(value: float | None) -> str:
    return "  —" if value is None else f"{value:.3f}"
