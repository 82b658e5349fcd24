"""`deformable-detr export`."""

from pathlib import Path
from typing import Annotated, Literal

from ..utils.terminal import echo
from .options import Flag, Positive, PyTorchModel, Split


def export(
    model: PyTorchModel,
    *,
    to: Literal["onnx", "openvino", "torch"],
    out: Path,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    image_size: str = "dynamic",
    post_processing: Annotated[bool, Flag] = False,
    sampling: Literal["grid_sample", "gather"] = "grid_sample",
    data: Path | None = None,
    split: Split = "val",
    limit: Positive | None = None,
) -> None:
    """Export a model for another runtime, unless the file's outputs (fp32) or AP (fp16, int8) differ too much.

    Args:
        to: onnx, openvino (.xml with a .bin beside it) or torch (.pt2).
        out: File to write.
        precision: fp16 and int8 halve the file; int8 is slightly faster in OpenVINO. Both require --data and may lower
            AP by at most 0.005.
        image_size: H,W for a fixed input size, or dynamic. The batch size is always dynamic. A model that stretches all
            images to one size keeps it.
        post_processing: Also output boxes in pixels, scores and labels of the 100 best detections.
        sampling: gather for runtimes without a correct GridSample.
        data: Dataset for measuring AP; int8 is calibrated on its training split.
        limit: Use only the first images of the split.
    """
    from ..detector import load_model
    from ..export import ExportOptions, export_model
    from ..export.graph import parse_size

    options = ExportOptions(precision, parse_size(image_size), post_processing, sampling, data, split, limit)
    export_model(load_model(model), out, to, options, report=echo, progress=True)
    echo(f"{out} is verified. Next: deformable-detr predict {out} IMAGE --out pictures")
