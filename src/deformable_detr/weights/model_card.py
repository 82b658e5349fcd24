"""The model card: README.md beside the weights, in the form that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config.schema import Config, ModelConfig

FILE = "README.md"
_MARK = "<!-- written by deformable-detr; delete this line to keep your changes -->"
_PLAIN = ModelConfig()
_LISTED = 100  # classes named in a card; the rest are in config.json


@dataclass(frozen=True)
class ModelCardData:
    """What a card tells beyond the model's own config.

    data: name of the training set, or what is known of it. figures: metrics such as {"AP": 0.46}, None where there is
    none. settings: the run's whole config. license: an identifier of the hub's list, such as "apache-2.0".
    repository: hub id, for the lines on how to load. library: "deformable-detr" or "transformers".
    """

    data: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    settings: Config | None = None
    license: str = "unknown"
    repository: str | None = None
    library: str = "deformable-detr"


def card_writer(folder: Path, config: ModelConfig, facts: ModelCardData) -> dict[str, str]:
    """The card's name and text, for `write_files`; nothing where the folder has a card of somebody's own."""
    if somebodys_own(folder):
        return {}
    return {FILE: card(config, facts)}


def somebodys_own(folder: Path) -> bool:
    """Whether the folder has a card that is not ours to write over."""
    path = folder / FILE
    return path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace")


def card(config: ModelConfig, facts: ModelCardData) -> str:
    """The card as Markdown, with the hub's fields in YAML before it."""
    figures = {name: value for name, value in facts.figures.items() if isinstance(value, int | float)}
    fields: dict[str, Any] = {
        "license": facts.license,
        "library_name": facts.library,
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "deformable-detr"],
    }
    if figures:
        results = [{"type": name, "name": name, "value": round(float(value), 4)} for name, value in figures.items()]
        task = {"type": "object-detection", "name": "Object detection"}
        dataset = {"type": "custom", "name": facts.data or "custom data"}
        fields["model-index"] = [
            {"name": "Deformable DETR", "results": [{"task": task, "dataset": dataset, "metrics": results}]}
        ]
    parts = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n{_MARK}",
        "# Deformable DETR",
        _summary(config),
        f"## Data\n\n{_line(facts.data) if facts.data else 'Not said.'}",
        f"## Figures\n\n{_table(figures) if figures else 'None measured.'}",
        f"## Classes\n\n{_classes(config)}",
        f"## Settings\n\n{_settings(config, facts.settings)}",
        f"## License\n\n{_licence(facts.license)}",
        f"## How to load\n\n{_loading(facts)}",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(config: ModelConfig) -> str:
    kinds = [
        name for name, there in (("iterative box refinement", config.refine), ("two-stage", config.two_stage)) if there
    ]
    levels = "1 feature level" if config.num_feature_levels == 1 else f"{config.num_feature_levels} feature levels"
    extras = f", {' and '.join(kinds)}" if kinds else ""
    return (
        f"Finds objects of {config.num_classes} classes in images. Backbone {_line(config.backbone)}, {levels}, "
        f"{config.num_queries} queries{extras}; images are resized to a short side of {config.image_size} and a long "
        f"side of at most {config.long_side} pixels."
    )


def _classes(config: ModelConfig) -> str:
    names = config.class_names or [f"class {label}" for label in range(config.num_classes)]
    ids = config.category_ids or range(config.num_classes)
    rows = [f"| {label} | {_line(name)} | {id} |" for label, (name, id) in enumerate(zip(names, ids, strict=True))]
    more = f"\n\nand {len(rows) - _LISTED} more, in `config.json`." if len(rows) > _LISTED else ""
    return "\n".join(["| label | name | category id |", "|---|---|---|", *rows[:_LISTED]]) + more


def _settings(config: ModelConfig, settings: Config | None) -> str:
    hidden = {"class_names", "category_ids", "num_classes"}
    model = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name not in hidden and value != getattr(_PLAIN, name)
    }
    sections: dict[str, Any] = {"model": model}
    if settings is not None:
        sections |= {"preset": settings.preset, "train": settings.train.model_dump(mode="json", exclude_defaults=True)}
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    return f"What differs from the defaults:\n\n```yaml\n{text.replace('```', '` ` `')}```"


def _licence(license: str) -> str:
    if license == "unknown":
        return (
            "Not said: set `license` at the top of this card. That of the training images, and of the weights that the "
            "training started from, may bind you."
        )
    return f"`{_line(license)}`"


def _loading(facts: ModelCardData) -> str:
    source = repr(facts.repository or "path/to/this/folder")
    if facts.library == "transformers":
        code = (
            "from transformers import AutoImageProcessor, AutoModelForObjectDetection\n\n"
            f"processor = AutoImageProcessor.from_pretrained({source})\n"
            f"model = AutoModelForObjectDetection.from_pretrained({source})"
        )
    else:
        code = (
            "from deformable_detr import DeformableDETR\n\n"
            f"model = DeformableDETR.from_pretrained({source})\n"
            'detections = model.predict("image.jpg")'
        )
    return f"```python\n{code}\n```"


def _table(figures: Mapping[str, Any]) -> str:
    rows = [f"| {_line(name)} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _line(text: str) -> str:
    """Text that stays inside a line, a table cell and plain Markdown, whatever is in it."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
