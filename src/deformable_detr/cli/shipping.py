"""A model on its way out: convert, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from .options import Flag
from .program import app


@app.command
def convert(source: str, *, to: Literal["ours", "transformers", "official"], out: Path) -> None:
    """Write a model in another format, for the tools that read it.

    Args:
        source: A run or model folder, a transformers folder or hub id, or an official .pth.
        to: ours, transformers (its Auto classes) or official (the paper authors' code).
        out: Folder for the model; it must not hold one.
    """
    from ..weights.convert import convert as write

    for line in write(source, to, out):
        print(line)


@app.command
def export(
    model: Path,
    *,
    to: Literal["onnx", "openvino", "torch"],
    out: Path,
    precision: Literal["fp32", "fp16"] = "fp32",
    image_size: str = "dynamic",
    post_processing: Annotated[bool, Flag] = False,
    sampling: Literal["grid_sample", "gather"] = "grid_sample",
    data: Path | None = None,
    split: str = "val",
    limit: int | None = None,
) -> None:
    """Write a model as a file for another runtime, verified against the model before it is put in place.

    Args:
        model: Folder of a run or of a saved model.
        to: onnx, openvino (.xml with a .bin beside it) or torch (.pt2).
        out: The file.
        precision: fp16 makes it half the size; needs --data, on which AP may fall by 0.005 at most.
        image_size: H,W for inputs of that one size, or dynamic. The batch is open either way.
        post_processing: Also give boxes in pixels, scores and labels of the best 100 detections.
        sampling: gather for runtimes that compute GridSample wrongly or lack it.
        data: Data set to measure the cost of fp16 on.
        split: Which part of the data set.
        limit: Only its first so many images.
    """
    from ..export import export_model
    from ..export.graph import parse_size
    from ..model.detector import DeformableDETR

    size = parse_size(image_size)
    detector = DeformableDETR.from_pretrained(model)
    export_model(detector, out, to, precision, size, post_processing, sampling, data, split, limit, report=print)
    print(f"{out} computes what {model} does; next: deformable-detr predict {out} IMAGE --out pictures")
