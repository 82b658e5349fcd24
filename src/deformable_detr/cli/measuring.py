"""Speed on the user's own machine: benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from .app import app
from .options import JsonFile, Precision, Preset, at_least_one

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
    from ..utils.files import prepare_files

    at_least_one(batches=batches, threads=threads, repeats=repeats)
    prepare_files({"--json": json})
    run(tuple(batches or (1, 8)), threads, repeats, device, json)


@benchmark.command(name="export")
def exports(
    model: Path,
    *,
    batches: Annotated[list[int] | None, Parameter(negative=(), help="images at once; 1 and 4 by default")] = None,
    image_size: str | None = None,
    repeats: Repeats = 7,
    data: Path | None = None,
    json: JsonFile = None,
) -> None:
    """Time a model in every runtime it can be exported to, beside PyTorch eager and the optimized model.

    Args:
        model: A run or model folder, a transformers folder or hub id, or an official .pth.
        image_size: H,W of the input; as the model resizes a 4:3 image where none is named.
        data: Data set to make int8 files with; none: no int8.
    """
    from ..benchmark.export import run
    from ..detector import DeformableDETR
    from ..export.graph import parse_size
    from ..utils.files import prepare_files

    at_least_one(batches=batches, repeats=repeats)
    prepare_files({"--json": json})
    size = parse_size(image_size) if image_size else None
    run(DeformableDETR.from_pretrained(model), batches or (1, 4), size, repeats, data, json)


Allocators = Annotated[
    Literal["both", "default", "tuned"], Parameter(help="the C library's memory settings, each in a process of its own")
]


@benchmark.command(name="model")
def models(
    preset: Preset = "refine",
    *,
    image_size: Annotated[list[str] | None, Parameter(negative=(), help="H,W; 480,640 and 800,1333 by default")] = None,
    batches: Annotated[list[int] | None, Parameter(negative=(), help="images at once; 1 by default")] = None,
    precision: Annotated[list[Precision] | None, Parameter(negative=(), help="both by default")] = None,
    also: Annotated[
        list[Literal["compiled", "graphs", "onnxruntime", "openvino"]] | None,
        Parameter(negative=(), help="more ways to run it; graphs (CUDA graphs) on a GPU only"),
    ] = None,
    threads: int | None = None,
    repeats: Repeats = 5,
    allocator: Allocators = "both",
    device: Literal["cpu", "cuda"] = "cpu",
    json: JsonFile = None,
    picture: Annotated[Path | None, Parameter(help="SVG file: time by part")] = None,
) -> None:
    """Time a preset with random weights: as it is, optimized, in bf16, beside transformers' with the same weights.

    Args:
        threads: Processor threads; as many as PyTorch takes where none is named.
        device: cpu or cuda.
    """
    from ..benchmark.model import DEFAULT_SIZES, WAYS, run
    from ..export.graph import parse_size
    from ..utils.files import prepare_files

    at_least_one(batches=batches, threads=threads, repeats=repeats)
    prepare_files({"--json": json, "--picture": picture})
    sizes = [size for text in image_size or () if (size := parse_size(text))] or DEFAULT_SIZES
    run(
        preset, sizes, batches or (1,), precision or ("fp32", "bf16"), (*WAYS, *(also or ())), threads, repeats, json,
        picture, ("default", "tuned") if allocator == "both" else (allocator,), device,
    )  # fmt: skip


@benchmark.command
def predict(
    model: Path, images: Path, *, batch_size: int = 1, precision: Precision = "fp32", json: JsonFile = None
) -> None:
    """Time the whole way from image files to detections, beside the model alone.

    Args:
        model: Folder of a run or of a saved model.
        images: Folder of images.
        batch_size: Images at once.
        precision: fp32 or bf16.
    """
    from ..benchmark.predict import run
    from ..detector import load_detector
    from ..predict.predictor import folder_images
    from ..utils.files import prepare_files

    at_least_one(batch_size=batch_size)
    prepare_files({"--json": json})
    run(load_detector(model, precision=precision), folder_images(images), batch_size, json)


@benchmark.command
def train(
    preset: Preset = "refine",
    *,
    image_size: str = "480,640",
    batch_size: int = 1,
    threads: int | None = None,
    repeats: Repeats = 3,
    dropout: float | None = None,
    allocator: Allocators = "both",
    device: Literal["cpu", "cuda"] = "cpu",
    json: JsonFile = None,
) -> None:
    """Time a training step in fp32 and bf16, beside transformers' model with the same weights.

    Args:
        image_size: H,W of the images.
        batch_size: Images a step.
        threads: Processor threads; as many as PyTorch takes where none is named.
        dropout: Of both models, in 0..1; the preset's where none is named.
        device: cpu or cuda.
    """
    from ..benchmark.train import run
    from ..export.graph import parse_size
    from ..utils.files import prepare_files

    at_least_one(batch_size=batch_size, threads=threads, repeats=repeats)
    prepare_files({"--json": json})
    size = parse_size(image_size) or (480, 640)
    allocators = ("default", "tuned") if allocator == "both" else (allocator,)
    changes = None if dropout is None else {"dropout": dropout}
    run(preset, size, batch_size, ("fp32", "bf16"), threads, repeats, json, allocators, device, changes)


@benchmark.command
def scaling(
    preset: Preset = "refine",
    *,
    precision: Precision = "fp32",
    threads: int | None = None,
    repeats: Repeats = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    json: JsonFile = None,
    picture: Annotated[Path | None, Parameter(help="SVG or PNG file: time a token")] = None,
) -> None:
    """Time the optimized model over more images, queries and pixels: whether the cost grows with the tokens alone.

    Args:
        precision: fp32 or bf16.
        threads: Processor threads; as many as PyTorch takes where none is named.
        device: cpu or cuda.
    """
    from ..benchmark.scaling import run
    from ..utils.errors import UserError
    from ..utils.files import prepare_files

    at_least_one(threads=threads, repeats=repeats)
    if picture is not None and picture.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"--picture {picture}: must end in .svg or .png")
    prepare_files({"--json": json, "--picture": picture})
    run(preset, precision, threads, repeats, json, picture, device)
