"""Speed on the user's own machine: benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from .options import JsonFile
from .program import app

benchmark = App(name="benchmark", help="Measure speed on this machine, beside other software where it is installed.")
app.command(benchmark)


Repeats = Annotated[int, Parameter(help="rounds of measuring; the median counts")]


@benchmark.command
def op(
    *,
    batches: Annotated[list[int] | None, Parameter(negative=(), help="images at once; 1 and 8 by default")] = None,
    threads: int | None = None,
    repeats: Repeats = 7,
    device: Literal["cpu", "cuda"] | None = None,
    json: JsonFile = None,
) -> None:
    """Time the attention op: all backends, beside transformers' form and the peers' kernels that are installed.

    Args:
        threads: Processor threads; as many as PyTorch takes where none is named.
        device: cpu or cuda; cuda where there is one.
    """
    from ..benchmark.op import run
    from ..inference.files import prepare_file

    if json is not None:
        prepare_file(json, "--json")
    run(tuple(batches or (1, 8)), threads, repeats, device, json)


@benchmark.command(name="export")
def exports(
    model: Path,
    *,
    batches: Annotated[list[int] | None, Parameter(negative=(), help="images at once; 1 and 4 by default")] = None,
    image_size: str | None = None,
    repeats: Repeats = 7,
    json: JsonFile = None,
) -> None:
    """Time a model in every runtime it can be exported to, beside PyTorch eager.

    Args:
        model: A run or model folder, a transformers folder or hub id, or an official .pth.
        image_size: H,W of the input; as the model resizes a 4:3 image where none is named.
    """
    from dataclasses import asdict

    from ..benchmark.export import measure, table
    from ..export.graph import parse_size
    from ..inference.files import prepare_file, write_json
    from ..model.detector import DeformableDETR

    if json is not None:
        prepare_file(json, "--json")
    size = parse_size(image_size) if image_size else None
    rows = measure(DeformableDETR.from_pretrained(model), batches or (1, 4), size, repeats, report=print)
    print(table(rows))
    if json is not None:
        write_json(json, [asdict(row) for row in rows])
