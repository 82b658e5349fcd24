"""What several verbs share: options by name, and how figures and complaints are printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ..utils.errors import UserError

Flag = Parameter(negative=())
Preset = Literal["single-scale", "single-scale-dc5", "multi-scale", "refine", "two-stage", "small", "small-portable"]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, mps; auto: the fastest there is")]
Precision = Literal["fp32", "bf16"]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="file for the results")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="any key of the config, such as train.lr=1e-4; may be repeated"),
]

DataOverrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="a key of the data, such as data.val_images=photos; may be repeated"),
]


def at_least_one(**values: int | Sequence[int] | None) -> None:
    """`at_least` 1."""
    at_least(1, **values)


def at_least(bound: int, /, **values: int | Sequence[int] | None) -> None:
    """`UserError` for a number under the bound, by the name of its option."""
    for name, value in values.items():
        numbers = () if value is None else (value,) if isinstance(value, int) else value
        if (low := min(numbers, default=bound)) < bound:
            raise UserError(f"--{name.replace('_', '-')} {low}: must be {bound} or more")


def complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def summary(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(metrics[name])}" for name in ("AP", "AP50") if name in metrics)


def table(metrics: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The figures in two columns: the set's, then each class's AP. With another model's: A, B and B − A."""
    rows = _rows(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    if other is None:
        return "\n".join(f"{name:<{width}}  {_figure(value)}" for name, value in rows)
    beside = dict(_rows(other))
    lines = [f"{'':<{width}}  {'A':<6} {'B':<6}  B − A"]
    for name, value in rows:
        second = beside.get(name)
        difference = "" if value is None or second is None else f"  {second - value:+.3f}"
        lines.append(f"{name:<{width}}  {_figure(value):<6} {_figure(second):<6}{difference}".rstrip())
    return "\n".join(lines)


def _rows(metrics: dict[str, Any]) -> list[tuple[str, float | None]]:
    rows = [(name, value) for name, value in metrics.items() if isinstance(value, float) or value is None]
    return rows + [(f"AP of {name}", value) for name, value in metrics.get("per_class", {}).items()]


def _figure(value: float | None) -> str:
    return "  —" if value is None else f"{value:.3f}"
