"""The model card: README.md beside the weights, with the metadata that the hub reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub import ModelCardData as CardData

from ..config.detector import DetectorConfig
from ..config.schema import Config

FILE = "README.md"
_MARK = "<!-- written by deformable-detr; delete this line to keep your changes -->"
_LISTED_CLASSES = 100
_UNKNOWN_LICENSE = """\
Unknown: set `license` at the top of this card. The licenses of the training images and of the weights that training
started from may apply."""
_LOADING = {
    "deformable-detr": """\
from deformable_detr import DeformableDETR

model = DeformableDETR.from_pretrained({source})
detections = model.predict("image.jpg"{tile})""",
    "transformers": """\
from transformers import AutoImageProcessor, AutoModelFor{head}

processor = AutoImageProcessor.from_pretrained({source})
model = AutoModelFor{head}.from_pretrained({source})

# Or with deformable-detr:
from deformable_detr import load_detector

detections = load_detector({source}).predict("image.jpg"{tile})""",
}


@dataclass(frozen=True)
class ModelCardData:
    """What a model card states beside the model's own config.

    Attributes:
        dataset: Name or description of the training data.
        metrics: Such as {"AP": 0.46}; None values are left out.
        config: The config of the training run.
        license: An identifier from the hub's list, such as "apache-2.0".
        repo_id: Hub id, for the example of how to load the model.
        library: "deformable-detr" or "transformers".
        title: Name of the model family.
    """

    dataset: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None
    license: str = "unknown"
    repo_id: str | None = None
    library: str = "deformable-detr"
    title: str = "Deformable DETR"


def card_file(folder: Path, config: DetectorConfig, data: ModelCardData) -> dict[str, str]:
    """Return the card's name and text for `write_files`, or nothing if the folder has a user's own, unmarked card."""
    path = folder / FILE
    is_users = path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace")
    return {} if is_users else {FILE: model_card(config, data)}


def model_card(config: DetectorConfig, data: ModelCardData) -> str:
    """Return the card as Markdown, with the hub's metadata in YAML before it."""
    metrics = {name: value for name, value in data.metrics.items() if isinstance(value, int | float)}
    license = f"`{_inline(data.license)}`" if data.license != "unknown" else _UNKNOWN_LICENSE
    head = "InstanceSegmentation" if config.masks else "ObjectDetection"
    tile = None if data.config is None else data.config.data.tile
    option, trained = ("", "") if tile is None else (f", tile={tile}", f" Trained on tiles of {tile} pixels.")
    source = repr(data.repo_id or "path/to/this/folder")
    loading = _LOADING[data.library].format(source=source, head=head, tile=option)
    metric_rows = [f"| {_inline(name)} | {value:.4g} |" for name, value in metrics.items()]
    task = "image-segmentation" if config.masks else "object-detection"
    kind = "classes of objects and their masks" if config.masks else "classes of objects"
    sections = [
        f"---\n{_metadata(task, metrics, data)}\n---\n{_MARK}",
        f"# {data.title}",
        f"Detects {config.num_classes} {kind}. {_inline(config.summary)} Images are {config.resize_rule}.{trained}",
        f"## Data\n\n{_inline(data.dataset) if data.dataset else 'Not stated.'}",
        f"## Metrics\n\n{_table('| metric | value |', metric_rows) if metrics else 'Not measured.'}",
        f"## Classes\n\n{_class_table(config)}",
        f"## Config\n\n{_config(config, data.config)}",
        f"## License\n\n{license}",
        f"## How to load\n\n```python\n{loading}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(task: str, metrics: Mapping[str, float], data: ModelCardData) -> str:
    dataset = data.dataset or "custom data"
    card = CardData(license=data.license, library_name=data.library, pipeline_tag=task, tags=[task, "deformable-detr"])
    if metrics:
        card.model_name = data.title
        card.eval_results = [
            EvalResult(task, "custom", dataset, metric_type=metric, metric_value=round(value, 4), metric_name=metric)
            for metric, value in metrics.items()
        ]
    return card.to_yaml()


def _class_table(config: DetectorConfig) -> str:
    names = config.class_names or [f"class {label}" for label in range(config.num_classes)]
    ids = config.category_ids or range(config.num_classes)
    rows = [f"| {label} | {_inline(name)} | {id} |" for label, (name, id) in enumerate(zip(names, ids, strict=True))]
    more = f"\n\nand {len(rows) - _LISTED_CLASSES} more, in `config.json`." if len(rows) > _LISTED_CLASSES else ""
    return _table("| label | name | category id |", rows[:_LISTED_CLASSES]) + more


def _table(header: str, rows: list[str]) -> str:
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows])


def _config(model: DetectorConfig, config: Config | None) -> str:
    listed = {"class_names", "category_ids", "num_classes", "network"}  # above, or in config.json
    sections: dict[str, Any] = {"model": model.model_dump(mode="json", exclude_defaults=True, exclude=listed)}
    if config is not None:
        sections |= {"preset": config.preset, "train": config.train.model_dump(mode="json", exclude_defaults=True)}
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).replace("```", "` ` `")
    return f"Changes from the defaults:\n\n```yaml\n{text}```"


def _inline(text: str) -> str:
    """Escape text so that it stays inside a line or table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
