"""The command line: one verb a function, no logic of its own. torch is imported once the verb is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from . import __version__
from .allocator import keep_large_buffers
from .errors import UserError

app = App(
    name="deformable-detr",
    help="Object detection with multi-scale deformable attention: check, train, evaluate, predict.",
    version=__version__,
    help_format="plaintext",
)

Flag = Parameter(negative=())
Preset = Literal["single-scale", "single-scale-dc5", "multi-scale", "refine", "two-stage", "small"]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, mps; auto: the fastest there is")]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="file for the results")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="any key of the config, such as train.lr=1e-4; may be repeated"),
]


@app.command
def train(
    data: Path | None = None,
    *,
    out: Path | None = None,
    preset: Preset | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    backbone: str | None = None,
    backbone_weights: str | None = None,
    weights: str | None = None,
    lr: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    device: str | None = None,
    workers: int | None = None,
    seed: int | None = None,
    config: Path | None = None,
    set_: Overrides = None,
    check: Literal["auto", "full", "off"] | None = None,
    resume: Annotated[bool, Flag] = False,
    print_config: Annotated[bool, Flag] = False,
) -> None:
    """Train a detector on a data set.

    An option wins over --set, --set over --config, and all of them over the preset.

    Args:
        data: Folder of the data set: COCO JSON, YOLO (data.yaml) or Pascal VOC.
        out: Folder for the config, the metrics, the checkpoints and the model.
        preset: The variant to start from; where nothing names one, what --weights has, else small.
        epochs: Passes over the training images, at most.
        minutes: Minutes of training, at most.
        image_size: Short side of the input in pixels.
        batch_size: Images a step.
        backbone: Any timm model that gives feature maps.
        backbone_weights: hub (download), none (random) or the path of a safetensors file.
        weights: Model to fine-tune: a run or model folder, a transformers folder or hub id, an official .pth.
        lr: Learning rate.
        precision: Number format of the heavy computations.
        device: cpu, cuda, cuda:1, mps; auto: the fastest there is.
        workers: Processes that load images.
        seed: Start of all random choices.
        config: YAML file with any keys of the config.
        check: How long to look for faults in the data set first: auto, at most 40 seconds.
        resume: Go on with the run in the folder --out, with its own config.
        print_config: Print the config that would be used, and stop.
    """
    from .settings import resolve

    if resume and config is None and out is not None and (out / "config.yaml").is_file():
        config = out / "config.yaml"
    options = {
        "train.epochs": epochs,
        "train.minutes": minutes,
        "model.image_size": image_size,
        "train.batch_size": batch_size,
        "model.backbone": backbone,
        "model.backbone_weights": backbone_weights,
        "train.weights": weights,
        "train.lr": lr,
        "train.precision": precision,
        "train.device": device,
        "data.workers": workers,
        "data.check": check,
        "train.seed": seed,
    }
    settings = resolve(preset, config, set_ or (), options)
    if print_config:
        print(settings.to_yaml(), end="")
        return
    if data is None or out is None:
        raise UserError("train needs a data set and a folder for the run: deformable-detr train DATA --out runs/NAME")

    from .training.loop import train_model

    metrics = train_model(data, out, settings, resume=resume)
    print(f"{_summary(metrics)}; the model is in {out}")
    print(f"next: deformable-detr predict {out} IMAGE --out pictures")


@app.command
def check(
    data: Path,
    *,
    image_size: int | None = None,
    fix: Annotated[Path | None, Parameter(help="empty folder for a repaired copy; the set itself stays")] = None,
    report: Annotated[Path | None, Parameter(help="HTML file: what was found, with pictures")] = None,
    set_: Overrides = None,
    json: JsonFile = None,
) -> None:
    """Look for everything that is wrong with a data set. Exit code 2 where training could not use it.

    Args:
        data: Folder of the data set: COCO JSON, YOLO (data.yaml) or Pascal VOC.
        image_size: Short side of the input in pixels, for which objects may be too small.
    """
    from .data.check.command import run
    from .settings import resolve

    settings = resolve(None, None, set_ or (), {"model.image_size": image_size})
    if not run(data, settings, fix, report, json):
        sys.exit(2)


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    split: str = "val",
    batch_size: int = 4,
    workers: int = 2,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Measure a model on a data set: COCO's twelve figures and the AP of each class.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        data: Folder of the data set.
        split: Which part of the data set.
        batch_size: Images at once.
        workers: Processes that load images.
    """
    from .evaluation import evaluate
    from .inference.files import prepare_file, write_json
    from .inference.loading import load_detector

    if json is not None:
        prepare_file(json, "--json")
    detector = load_detector(model, device)
    metrics = evaluate(detector, data, split=split, batch_size=batch_size, workers=workers)
    print(_table(metrics))
    if json is not None:
        write_json(json, metrics)


@app.command
def predict(
    model: Path,
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    threshold: float = 0.5,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Find the objects in images.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        images: Image files, and folders of them.
        out: Folder for the images with the boxes drawn on.
        threshold: Lowest score of a detection, 0 to 1.
    """
    from .inference.files import find_images, predict_files
    from .inference.loading import load_detector

    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be from 0 to 1")
    files = find_images(images)
    detector = load_detector(model, device)
    if predict_files(detector, files, out, threshold, json, complain=_complain):
        sys.exit(2)


@app.command
def explain(
    model: Path,
    image: Path,
    /,
    *,
    detection: int | None = None,
    point: str | None = None,
    layer: str = "all",
    out: Path | None = None,
    threshold: float = 0.5,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Show where the model looked: each layer's boxes and sampling points.

    Args:
        model: Folder of a run or of a saved model.
        image: Image file.
        detection: Which detection, numbered from 1, the best; without it that one.
        point: X,Y in pixels: where the encoder looked from that point, instead of a detection.
        layer: all, or one, numbered from 1.
        out: Picture (.png, .jpg), animation across the layers (.gif, .webp, .apng) or interactive page (.html);
            IMAGE-explained.png in the current folder where none is named.
        threshold: Lowest score of a detection, 0 to 1.
    """
    from .device import pick_device
    from .explanation.files import explain_file, parse_layer, parse_point
    from .model.detector import DeformableDETR

    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be from 0 to 1")
    place, number = parse_point(point), parse_layer(layer)
    detector = DeformableDETR.from_pretrained(model).to(pick_device(device))
    target = out or Path(f"{image.stem}-explained.png")
    explain_file(detector, image, target, detection, place, number, threshold, json)


@app.command
def convert(source: str, *, to: Literal["ours", "transformers", "official"], out: Path) -> None:
    """Write a model in another format, for the tools that read it.

    Args:
        source: A run or model folder, a transformers folder or hub id, or an official .pth.
        to: ours, transformers (its Auto classes) or official (the paper authors' code).
        out: Folder for the model; it must not hold one.
    """
    from .weights.convert import convert as write

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
    from .export import export_model
    from .export.graph import parse_size
    from .model.detector import DeformableDETR

    size = parse_size(image_size)
    detector = DeformableDETR.from_pretrained(model)
    export_model(detector, out, to, precision, size, post_processing, sampling, data, split, limit, report=print)
    print(f"{out} computes what {model} does; next: deformable-detr predict {out} IMAGE --out pictures")


@app.command
def demo(*, out: Path = Path("runs/demo")) -> None:
    """Make a small data set of handwritten digits on photographs, train on it, evaluate, draw what was found.

    Args:
        out: Folder for the data set, the run and the pictures.
    """
    from .demo import run

    run(out)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 the demo learnt too little, 2 a mistake in the input, 130 interrupted."""
    keep_large_buffers()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except UserError as error:
        _complain(str(error))
        sys.exit(2)
    except CycloptsError as error:
        error.verbose = False
        _complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _summary(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_figure(metrics[name])}" for name in ("AP", "AP50") if name in metrics)


def _table(metrics: dict[str, Any]) -> str:
    """The figures in two columns: the set's, then each class's AP."""
    rows = [(name, value) for name, value in metrics.items() if isinstance(value, float) or value is None]
    classes = [(f"AP of {name}", value) for name, value in metrics.get("per_class", {}).items()]
    width = max((len(name) for name, _ in rows + classes), default=0)
    return "\n".join(f"{name:<{width}}  {_figure(value)}" for name, value in rows + classes)


def _figure(value: float | None) -> str:
    return "  —" if value is None else f"{value:.3f}"
