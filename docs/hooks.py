"""Hooks of the docs site: generated references, and links to files outside docs/."""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

from deformable_detr.cli import app
from deformable_detr.cli.train import train
from deformable_detr.config import presets
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.config.resolve import DEFAULT_PRESET
from deformable_detr.config.schema import Config, DataConfig, ModelConfig, ResNetShape, TrainConfig

DOCS = Path(__file__).parent
_LINK_OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


def on_config(config: Any) -> Any:
    """Show ```math fences as MathML, which browsers draw without scripts."""
    fence = {"name": "math", "class": "math", "format": math_fence}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def math_fence(source: str, *_: Any, **__: Any) -> str:
    """Return LaTeX as a block of MathML."""
    return f'<div class="equation">{convert(source, display="block")}</div>'


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Fill in a generated reference, and let links such as ../src/x.py lead to the repository."""
    folder = (DOCS / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        if not target.exists():
            raise PluginError(f"docs/{page.file.src_uri} links to {match[1]}, which does not exist")
        kind, path = "tree" if target.is_dir() else "blob", target.relative_to(DOCS.parent).as_posix()
        return f"]({config.repo_url}/{kind}/main/{path}"

    markdown = _LINK_OUTSIDE.sub(link, markdown)
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: _REFERENCES[match[1]](), markdown)


def cli_reference() -> str:
    """Return the reference of all commands, in the order of `--help`."""
    names = [name for name in app if not name.startswith("-")]
    texts = [app[name].generate_docs(heading_level=2, usage_name=f"deformable-detr {name}") for name in names]
    return "\n".join(text.replace("```console", "```bash") for text in texts)


def config_reference() -> str:
    """Return the reference of all config keys."""
    sections = (
        ("Model", "model.", ModelConfig, "The network. The defaults are the paper's multi-scale model."),
        ("ResNet of any shape", "model.backbone_shape.", ResNetShape, "For weights that do not come from timm."),
        ("Models of transformers", "model.", AdapterConfig, "They have these keys instead of the network's."),
        ("Data", "data.", DataConfig, "Where the images are, how they are augmented and batched."),
        ("Training", "train.", TrainConfig, "The optimization."),
    )
    parts = ["\n".join(_entries("", Config, {"preset"}))]
    for title, prefix, section, summary in sections:
        hidden = set() if section is not AdapterConfig else AdapterConfig.model_fields.keys() & ModelConfig.model_fields
        parts.append(f"## {title}\n\n{summary}\n")
        parts.extend(_entries(prefix, section, section.model_fields.keys() - hidden))
    return "\n".join(parts)


def _entries(prefix: str, section: type[Config], names: set[str]) -> Iterator[str]:
    """Yield the entry of each key: type and range, default, value in the default preset, option, description."""
    values: Any = presets.config(DEFAULT_PRESET).model_dump(mode="json")
    for part in filter(None, prefix.split(".")):
        values = values.get(part) or {}
    options = inspect.signature(train).parameters
    for name, field in section.model_json_schema(ref_template="{model}")["properties"].items():
        if name not in names:
            continue
        facts = [describe_type(field)]
        if "default" in field:
            facts.append(f"default: {_value(field['default'])}")
            if name in values and values[name] != field["default"]:
                facts.append(f"{DEFAULT_PRESET}: {_value(values[name])}")
        if name in options and prefix != "model.backbone_shape.":
            facts.append(f"option: `--{name.replace('_', '-')}`")
        text = re.sub(r"\b(\w+_\w+)\b", r"`\1`", " ".join(field["description"].split()))
        yield f"### `{prefix}{name}` {{ #{prefix}{name} }}\n\n{text}\n\n{' · '.join(facts)}\n{{: .facts }}\n"


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return the values that a JSON schema accepts, as Markdown."""
    if "anyOf" in schema:
        return " or ".join(describe_type(member) for member in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(_value(value) for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} numbers: " + ", ".join(map(describe_type, schema["prefixItems"]))
    if "$ref" in schema:
        return "[keys](#resnet-of-any-shape)"
    if schema["type"] == "array":
        return f"list of {describe_type(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    bounds = {"from": low, "above": above, "to": high, "below": below}
    limits = "".join(f" {word} {value:g}" for word, value in bounds.items() if value is not None and abs(value) < 2**53)
    return {"null": "`null`", "object": "mapping"}.get(schema["type"], schema["type"]) + limits


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


_REFERENCES = {"cli_reference": cli_reference, "config_reference": config_reference}
