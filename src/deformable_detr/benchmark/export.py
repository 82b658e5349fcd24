"""Speed of exported files in their runtimes beside the model itself, on the CPU, in one process and in turn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..detector import DeformableDETR
from ..export import ExportOptions, export_model, load_exported
from ..utils.errors import UserError
from ..utils.files import EXPORT_SUFFIXES, write_json
from .rounds import described, in_turn


class Form(NamedTuple):
    """A way to run the model: eager, optimized, or a format of `export` with its sampling and precision."""

    runtime: str
    sampling: str = "native"
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}" + ("" if self.sampling == "native" else f", {self.sampling}")


EAGER, OPTIMIZED = Form("eager"), Form("optimized")
FORMS = tuple(Form(kind, sampling) for kind in EXPORT_SUFFIXES for sampling in ("grid_sample", "gather"))
INT8 = (Form("onnx", "grid_sample", "int8"), Form("openvino", "grid_sample", "int8"))  # with a data set


@dataclass(frozen=True)
class Row:
    """One way to run the model and one input. Milliseconds a batch; `ratio`: eager's median / its."""

    runtime: str
    sampling: str
    precision: str
    batch: int
    height: int
    width: int
    median_ms: float
    best_ms: float
    ratio: float
    mib: float | None  # of the file
    ap: tuple[float, float] | None = None  # of int8: before and after, on the data set's validation split


def measure(
    model: DeformableDETR,
    batches: Sequence[int] = (1, 4),
    size: tuple[int, int] | None = None,
    repeats: int = 7,
    forms: Iterable[Form] = FORMS,
    data: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Exports the model in each of `forms` with open sizes, and times them all in turn, beside eager and optimized.

    All use as many threads as PyTorch does here. Each round runs every one of them once on the same input, so what else
    goes on in the machine meets all of them; medians of `repeats` rounds are compared, after one that does not count.
    size: (height, width), none: a 4:3 image as the model's config resizes it.
    data: for int8, see `export_model`. A form that is refused there is reported and left out.
    """
    model = model.cpu().float().eval()
    height, width = size or (model.config.image_size, model.config.image_size * 4 // 3)
    ways: dict[Form, Any] = {EAGER: model, OPTIMIZED: model.optimize()}
    made: dict[Form, tuple[float, tuple[float, float] | None]] = {}  # MiB of the file, AP before and after
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, form in enumerate(forms):
            path = Path(folder) / f"{number}{EXPORT_SUFFIXES[form.runtime]}"
            kind, sampling, precision = form
            try:
                options = ExportOptions(precision, sampling=sampling, data=data if precision == "int8" else None)  # type: ignore[arg-type]
                export_model(model, path, kind, options, report)  # type: ignore[arg-type]
            except UserError as error:
                if precision != "int8":
                    raise
                report(f"{form}: {error}")
                continue
            ways[form] = load_exported(path, "cpu", threads=torch.get_num_threads())
            mib = sum(file.stat().st_size for file in Path(folder).glob(f"{number}.*")) / 2**20
            made[form] = mib, None
            report(f"{form}: exported and verified")
        for batch in batches:
            pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
            mask = torch.zeros(batch, height, width, dtype=torch.bool)
            calls = {str(form): partial(way, pixels, mask) for form, way in ways.items()}
            with torch.inference_mode():
                times = in_turn(calls, repeats)
            eager = times[str(EAGER)].median_ms
            for form in ways:
                found = times[str(form)]
                row = Row(*form, batch, height, width, found.median_ms, found.best_ms, eager / found.median_ms,
                          *made.get(form, (None, None)))  # fmt: skip
                rows.append(row)
        ways.clear()  # opened files cannot be deleted everywhere
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| runtime | sampling | precision | batch | input | median ms | best ms | × eager | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.runtime} | {row.sampling} | {row.precision} | {row.batch} | {row.height}×{row.width} "
        f"| {row.median_ms:.0f} | {row.best_ms:.0f} | {row.ratio:.2f} | {'' if row.mib is None else f'{row.mib:.1f}'} |"
        for row in rows
    ]
    return "\n".join(lines)


def run(
    model: DeformableDETR,
    batches: Sequence[int],
    size: tuple[int, int] | None,
    repeats: int,
    data: Path | None = None,
    json_path: Path | None = None,
) -> None:
    """Measures, prints the table, and writes JSON where asked to."""
    # First: in a process that has opened all forms, measuring the machine has crashed, by what is not known.
    machine = {} if json_path is None else described(None)
    rows = measure(model, batches, size, repeats, FORMS if data is None else (*FORMS, *INT8), data, report=print)
    if json_path is not None:
        report = {**machine, "repeats": repeats, "rows": [asdict(row) for row in rows]}
        write_json(json_path, report)
    print(table(rows))
