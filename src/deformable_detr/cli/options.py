"""Options and output that several commands share."""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import Parameter
from cyclopts.validators import Number

from ..config import presets
from ..config.resolve import DEFAULT_PRESET
from ..utils.terminal import above_bars, printable
from ..utils.tiles import MAX_OVERLAP, MIN_TILE

Flag = Parameter(negative=())
Model = Annotated[
    Path,
    Parameter(
        help="Run or model folder, name (see models), transformers folder or hub id, .pth, exported .onnx, .xml, .pt2."
    ),
]
PyTorchModel = Annotated[
    Path, Parameter(help="Run or model folder, name (see models), transformers folder or hub id, .pth.")
]
Dataset = Annotated[Path, Parameter(help="Dataset folder: COCO JSON, YOLO (data.yaml) or Pascal VOC.")]
Split = Annotated[str, Parameter(help="Split of the dataset.")]
Preset = Literal[
    "single-scale", "single-scale-dc5", "multi-scale", "refine", "two-stage", "dino", "dino-5scale", "dino-swin-l",
    "small", "small-masks", "small-portable",
]  # fmt: skip
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1 or mps; auto: cuda, else mps, else cpu.")]
Precision = Literal["fp32", "bf16"]
Threshold = Annotated[float, Parameter(validator=Number(gte=0, lte=1), help="Minimum score of a detection, 0 to 1.")]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
NonNegative = Annotated[int, Parameter(validator=Number(gte=0))]
Tile = Annotated[
    int | None,
    Parameter(
        validator=Number(gte=MIN_TILE),
        help="Cut larger images into tiles of this many pixels to find small objects, beside the whole image.",
    ),
]
TileOverlap = Annotated[
    float,
    Parameter(
        validator=Number(gte=0, lte=MAX_OVERLAP), help="Minimum overlap of neighboring tiles as a share of their side."
    ),
]
JsonFile = Annotated[Path | None, Parameter(name="--json", help="JSON file for the results.")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="Any config key, such as train.lr=1e-4. May be repeated."),
]
DataOverrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="A data key, such as data.val_images=photos. May be repeated."),
]


def config_options(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per config field instead of its parameter `settings`.

    Name, type, help and default of an option come from the config field. The command receives the options that the
    user set as `settings`, for example {"train.epochs": 3}.

    Args:
        *keys: Dotted config keys, such as "train.epochs".
    """
    defaults = presets.config(DEFAULT_PRESET)
    names = {key.partition(".")[2]: key for key in keys}

    def option(name: str, key: str) -> inspect.Parameter:
        section = getattr(defaults, key.partition(".")[0])
        field, default = type(section).model_fields[name], getattr(section, name)
        shown = False if default is None else lambda _: default
        annotation = Annotated[
            _without_constraints(field.annotation) | None, Parameter(help=field.description, show_default=shown)
        ]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*arguments: Any, **values: Any) -> None:
            settings = {key: values.pop(name) for name, key in names.items() if name in values}
            command(*arguments, settings=settings, **values)

        signature = inspect.signature(command, eval_str=True)
        parameters = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
        options = [option(name, key) for name, key in names.items()]
        run.__signature__ = signature.replace(parameters=parameters + options)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def _without_constraints(annotation: Any) -> Any:
    """Strip pydantic's constraints from a type: the config checks them, with errors that name the config key."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    plain = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    return Union[tuple(plain)]  # noqa: UP007


def print_error(message: str) -> None:
    """Print an error as one line to standard error."""
    with above_bars():
        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)


def format_metric(value: float | None) -> str:
    """Format a metric for a terminal; None: not defined."""
    return "  —" if value is None else f"{value:.3f}"
