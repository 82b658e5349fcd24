"""Shared by the benchmark scripts: options, random models, transformers' model with equal weights, and output."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deformable_detr import DeformableDETR
from deformable_detr.benchmark import describe_machine
from deformable_detr.config import presets
from deformable_detr.utils.device import pick_device
from deformable_detr.utils.errors import UserError
from deformable_detr.utils.files import write_json
from deformable_detr.utils.process import retain_freed_memory
from deformable_detr.weights import transformers_format

BASELINE = "transformers"


def option_parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds; medians are shown")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--allocator", choices=("default", "tuned"), default="default", help="tuned: glibc keeps freed memory"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(presets.PRESETS), default="refine")
    parser.add_argument("--config", type=json.loads, default={}, help="config fields as a JSON object")


def add_comparison_options(parser: argparse.ArgumentParser, default_size: Any, **size_options: Any) -> None:
    """Add the model, input size and precisions of a comparison with transformers."""
    add_model_options(parser)
    parser.add_argument("--image-size", type=image_size, default=default_size, metavar="H,W", **size_options)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])


def image_size(text: str) -> tuple[int, int]:
    """Parse "H,W"."""
    height, width = map(int, text.split(","))
    return height, width


def apply_options(options: argparse.Namespace) -> None:
    """Set the threads and the allocator, and check the device."""
    pick_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.allocator == "tuned" and not retain_freed_memory():
        raise UserError("--allocator tuned: needs glibc")


def finish(options: argparse.Namespace, rows: Sequence[Any], columns: dict[str, str], **results: Any) -> None:
    """Print rows as a Markdown table, and write them with the machine's description to `--json`.

    Args:
        options: The script's.
        rows: Dataclass instances.
        columns: Format of each field to print, by name.
        **results: Further entries of the JSON file.
    """
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        values = asdict(row)
        cells = ("–" if values[name] is None else format(values[name], spec) for name, spec in columns.items())
        print("| " + " | ".join(cells) + " |")
    if options.json is not None:
        command = " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        report = {
            "machine": describe_machine(options.device),
            "allocator": options.allocator,
            "repeats": options.repeats,
            "commit": revision.stdout.strip() or None,
            "command": f"python benchmarks/{Path(sys.argv[0]).name} {command}",
            **results,
            "rows": [asdict(row) for row in rows],
        }
        write_json(options.json, report)


def random_model(options: argparse.Namespace, **config: Any) -> DeformableDETR:
    """Return a preset's model in evaluation mode with the same random weights each time.

    Zero-initialized layers are random too; otherwise all tokens would sample the same points.
    """
    torch.manual_seed(0)
    base = {"backbone_weights": "none", "backbone_norm": "frozen", **options.config, **config}
    model = DeformableDETR(presets.PRESETS[options.preset](**base)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")) or "heads.boxes" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.to(options.device)


def transformers_twin(model: DeformableDETR) -> nn.Module | None:
    """Return transformers' model with the same weights, or None if not installed or not supported."""
    try:
        from transformers import AutoModelForObjectDetection
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            transformers_format.save(model, Path(folder))
        except UserError:
            return None
        twin = AutoModelForObjectDetection.from_pretrained(folder)
    return twin.eval().to(model.get_buffer("pixel_mean").device)
