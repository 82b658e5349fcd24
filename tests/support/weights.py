"""Tiny models with random weights, ours and transformers', and helpers for their files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR, UserError
from deformable_detr.config import presets
from deformable_detr.weights import official_format
from tests.support.parity import randomized, transformers, transformers_config

TINY_FIELDS = {
    "backbone": "test_resnet", "backbone_weights": "none", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48,
    "encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "num_classes": 3,
    "class_names": ("cat", "dog", "cow"), "category_ids": (3, 1, 90),
}  # fmt: skip


def tiny_model(preset=presets.two_stage, **changes) -> DeformableDETR:
    torch.manual_seed(0)
    return randomized(DeformableDETR(preset(**{**TINY_FIELDS, **changes})))


def tiny_transformers_model(variant="two-stage", **changes):
    return randomized(transformers.DeformableDetrForObjectDetection(transformers_config(variant, 4, **changes)))


def equal_weights(a: DeformableDETR, b: DeformableDETR) -> bool:
    """Return whether all weights and statistics are equal bit for bit, step counters of batch norms excluded."""
    first, second = (
        {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
        for model in (a, b)
    )
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})


def load_error(source) -> str:
    """Assert that loading fails with a one-line error; return it."""
    with pytest.raises(UserError) as caught:
        DeformableDETR.from_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def official_values(path: Path) -> dict:
    """Return the contents of an official checkpoint as the official code writes it."""
    values = torch.load(path, weights_only=False)
    values.pop(official_format.OWN_CONFIG, None)
    return values
