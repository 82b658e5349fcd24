"""Image size and pixel statistics in the config of transformers' image processor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config.detector import AdapterConfig, DetectorConfig
from ..utils.errors import UserError
from ..utils.files import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"  # transformers prefers the latter
_MAX_SIDE = 2**15
# The settings of transformers that each group of our fields stands for.
_GROUPS = (
    (("size", "max_size"), ("resize", "image_size", "image_width", "max_size")),
    (("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"), ("pixel_mean", "pixel_std")),
)
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def read_processor(folder: Path) -> dict[str, Any]:
    """Return the fields of `DetectorConfig` of a repository's image processor; see `processor_fields`."""
    path, values = read_settings(folder)
    return processor_fields(values, path)


def processor_fields(
    values: Mapping[str, Any], path: Path, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the fields of `DetectorConfig` that an image processor states, else transformers' defaults.

    Args:
        values: Its settings.
        path: Their file.
        defaults: What the class of the image processor sets if the settings do not.

    Raises:
        UserError: A value makes no sense, or asks for something that `predict` does not do.
    """
    values = {**_IMAGENET, **defaults, **{key: value for key, value in values.items() if value is not None}}
    size = values.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": values.get("max_size") or max(1333, size)}
    if not isinstance(size, dict):
        raise UserError(f"{path}: size {size!r} must be a number of pixels, or map height and width to them")
    try:
        sides = [int(side) for side in size.values() if side is not None]
        factor = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
        mean, std = ([float(x) for x in values[key]] for key in ("image_mean", "image_std"))
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: size, rescale_factor, image_mean or image_std is not a number") from None
    if len(mean) != 3 or len(std) != 3 or not factor > 0:
        raise UserError(f"{path}: image_mean and image_std must have 3 numbers, and rescale_factor must be above 0")
    if any(not 1 <= side <= _MAX_SIDE for side in sides):
        raise UserError(f"{path}: size {size} must be 1 to {_MAX_SIDE} pixels")
    _check_steps(values, size, path)
    if not values.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    # Their statistics are for pixels × rescale_factor, ours for pixels / 255.
    scale = 1.0 if abs(factor * 255 - 1) < 1e-6 else factor * 255
    statistics = {"pixel_mean": tuple(x / scale for x in mean), "pixel_std": tuple(x / scale for x in std)}
    if size.get("height") and size.get("width"):
        height, width = int(size["height"]), int(size["width"])
        return {
            "resize": "fixed",
            "image_size": height,
            "image_width": None if width == height else width,
            **statistics,
        }
    short, long = min(sides, default=800), max(sides, default=1333)
    only_short = len(sides) == 1 and "shortest_edge" in size
    return {
        "image_size": short,
        "max_size": None if only_short or long == round(short * 1333 / 800) else long,
        **statistics,
    }


def read_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that transformers reads, and its settings of the image processor; none if there is no file."""
    path = folder / PROCESSOR
    if path.is_file() and (values := read_json(path).get("image_processor")) is not None:
        if not isinstance(values, dict):
            raise UserError(f"{path}: image_processor is not a JSON object")
        return path, values
    path = folder / PREPROCESSOR
    return path, read_json(path) if path.is_file() else {}


def _check_steps(values: Mapping[str, Any], size: Mapping[str, Any], path: Path) -> None:
    """Refuse preprocessing that `predict` does not do."""
    refused = {
        "do_resize": (True, "images are always resized"),
        "do_center_crop": (False, "images are not cropped"),
        "resample": (2, "only bilinear interpolation (2) is supported"),
        "pad_size": (None, "images are padded to the largest of a batch"),
    }
    for key, (supported, reason) in refused.items():
        if values.get(key, supported) != supported:
            raise UserError(f"{path}: {key} {values[key]} is not supported; {reason}")
    if size.get("max_height") != size.get("max_width"):
        raise UserError(f"{path}: size {dict(size)} is not supported; max_height and max_width must be equal")


def write_processor(config: DetectorConfig, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Return the config of transformers' image processor that prepares images for this model.

    mean, std: Statistics of RGB pixels in 0..1.
    """
    size = {"shortest_edge": config.image_size, "longest_edge": config.long_side}
    if config.resize == "fixed":
        size = {"height": config.image_size, "width": config.image_width or config.image_size}
    return {
        "image_processor_type": "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": any(mean) or set(std) != {1.0},
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_annotations": True,
        "do_pad": True,
    }


def updated_settings(source: Mapping[str, Any], fields: Mapping[str, Any], config: AdapterConfig) -> dict[str, Any]:
    """Return the settings of a source with those replaced whose fields are no longer the config's.

    fields: What `processor_fields` returns for the source.
    """
    written = write_processor(config, config.pixel_mean, config.pixel_std)
    settings = {key: value for key, value in source.items() if key != "auto_map"}  # the source's own code
    before = {"resize": "shortest_edge", "image_width": None, "max_size": None, **fields}
    for keys, names in _GROUPS:
        if any(before[name] != getattr(config, name) for name in names):
            settings = {key: value for key, value in settings.items() if key not in keys}
            settings |= {key: written[key] for key in keys if key in written}
    return settings
