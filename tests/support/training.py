"""A model small enough to train in a test, and data for it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.config.schema import Config, ModelConfig
from deformable_detr.structures import Target
from deformable_detr.training.signals import TrainingInterrupted
from deformable_detr.training.step import TrainStep
from deformable_detr.training.trainer import train_model

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}


def tiny_config(**train: Any) -> Config:
    """Return a two-stage model of 0.4 M parameters at 64 pixels, without downloads or worker processes."""
    model = ModelConfig(
        backbone="test_resnet", backbone_weights="none", num_feature_levels=2, hidden_dim=32, num_heads=4,
        encoder_layers=1, decoder_layers=2, ffn_dim=64, dropout=0.0, num_queries=12, image_size=64,
        refine=True, two_stage=True, num_classes=3,
    )  # fmt: skip
    base = {"epochs": 2, "batch_size": 4, "log_every": 1, "device": "cpu", "lr": 1e-3, "sampling_lr_mult": 1.0,
            "backbone_lr_mult": 1.0}  # fmt: skip
    data = {"workers": 0, "crop_prob": 0.0, "train_scales": (1.0, 1.0)}
    return Config.from_dict({"preset": "small", "model": model.model_dump(), "data": data, "train": {**base, **train}})


def write_dataset(root: Path, train: int = 8, val: int = 4, seed: int = 0, empty: int = 0, mask_every: int = 0) -> Path:
    """Write colored rectangles as COCO JSON with gaps in the ids; the first `empty` images have no objects.

    Of every `mask_every` objects, the last has a mask, the polygon of its rectangle; 0: none.
    """
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("valid", val)):
        folder = root / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = random.integers(90, 150, (64, 64, 3), dtype=np.uint8)
            for _ in range(0 if number < empty else 1 + number % 2):
                color = int(random.integers(3))
                width, height = random.integers(16, 32, 2)
                x, y = int(random.integers(0, 64 - width)), int(random.integers(0, 64 - height))
                pixels[y : y + height, x : x + width] = list(COLORS.values())[color]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 100 + number, "category_id": 10 * (color + 1),
                    "bbox": [x, y, int(width), int(height)], "area": int(width * height), "iscrowd": 0,
                })  # fmt: skip
                if mask_every and len(annotations) % mask_every == 0:
                    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
                    annotations[-1]["segmentation"] = [[int(value) for corner in corners for value in corner]]
            name = f"{number}.png"
            Image.fromarray(pixels).save(folder / name)
            images.append({"id": 100 + number, "file_name": name, "width": 64, "height": 64})
        categories = [{"id": 10 * (index + 1), "name": name} for index, name in enumerate(COLORS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def random_boxes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Return (…, 4) cxcywh boxes inside the image."""
    corners = torch.rand(*shape, 2, 2, generator=generator).sort(dim=-2).values
    low, high = corners.unbind(-2)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def random_masks(size: int, generator: torch.Generator, side: int = 14) -> dict[str, torch.Tensor]:
    """Return `Target.masks` and `Target.has_mask` of this many objects; every third one has no mask."""
    noise = torch.rand(size, 1, 4, 4, generator=generator)
    masks = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")[:, 0]
    return {"masks": (masks > 0.5).to(torch.uint8) * 255, "has_mask": torch.arange(size) % 3 != 2}


def random_targets(sizes: list[int], classes: int, generator: torch.Generator, masks: bool = False) -> list[Target]:
    """Return targets with these numbers of objects."""
    return [
        Target(
            torch.randint(classes, (size,), generator=generator),
            random_boxes(size, generator=generator),
            100 + number,
            (64, 64),
            **(random_masks(size, generator) if masks else {}),
        )
        for number, size in enumerate(sizes)
    ]


def random_outputs(
    layers: int, images: int, queries: int, classes: int, generator: torch.Generator, tokens: int = 0
) -> dict[str, torch.Tensor]:
    """Return model outputs with gradients; two-stage if `tokens` is not 0."""
    outputs = {
        "layer_logits": torch.randn(layers, images, queries, classes, generator=generator) * 2,
        "layer_boxes": random_boxes(layers, images, queries, generator=generator),
    }
    if tokens:
        outputs["encoder_logits"] = torch.randn(images, tokens, classes, generator=generator)
        outputs["encoder_boxes"] = random_boxes(images, tokens, generator=generator)
    return {name: value.requires_grad_() for name, value in outputs.items()}


def train_until_signal(
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    out: Path,
    config: Config,
    stop_after: int,
    number: int = signal.SIGTERM,
) -> int:
    """Train until a signal that arrives in step `stop_after` ends it; return the exit code."""
    original, calls = TrainStep.step, []

    def step(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_after:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "step", step)
        with pytest.raises(TrainingInterrupted) as caught:
            train_model(data, out, config)
    assert len(calls) == stop_after
    return caught.value.code


def metric_lines(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind in a run's metrics.jsonl."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]
