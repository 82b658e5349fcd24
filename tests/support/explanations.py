"""A small detector with hand-set sampling offsets and attention weights."""

import sys
from unittest import mock

import torch
import torch.nn.functional as F

from deformable_detr import DeformableDETR, ModelConfig
from deformable_detr.explanation import trace
from deformable_detr.structures import ImageBatch

HEADS, LEVELS, POINTS = 2, 3, 2


def small_config(**changes):
    settings = {
        "num_classes": 3,
        "class_names": ("red", "green", "blue"),
        "category_ids": (2, 5, 9),
        "backbone": "test_resnet",
        "backbone_weights": "none",
        "num_feature_levels": LEVELS,
        "image_size": 64,
        "max_size": 160,
        "hidden_dim": 32,
        "num_heads": HEADS,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_points": POINTS,
        "decoder_points": POINTS,
        "ffn_dim": 32,
        "num_queries": 6,
    }
    return ModelConfig(**{**settings, **changes})


def random_model(seed=0, **changes):
    torch.manual_seed(seed)
    return DeformableDETR(small_config(**changes)).eval()


def set_sampling(attention, offsets, logits):
    """Give every query the offsets (M, L, P, 2) and the weights softmax(logits (M, L, P))."""
    with torch.no_grad():
        attention.sampling_offsets.weight.zero_()
        attention.sampling_offsets.bias.copy_(offsets.flatten())
        attention.attention_weights.weight.zero_()
        attention.attention_weights.bias.copy_(logits.flatten())


def random_sampling(seed):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(HEADS, LEVELS, POINTS, 2, generator=generator) * 1.5
    return offsets, torch.randn(HEADS, LEVELS, POINTS, generator=generator)


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def trace_on_canvas(model, image, canvas, **options):
    """Call `trace` with the image padded to (height, width), as in a batch with larger images."""
    module = sys.modules["deformable_detr.explanation.trace"]
    pad_images = module.pad_images

    def padded(images):
        batch = pad_images(images)
        padding = (0, canvas[1] - batch.pixels.shape[3], 0, canvas[0] - batch.pixels.shape[2])
        mask = F.pad(batch.padding_mask, padding, value=True)
        return ImageBatch(F.pad(batch.pixels, padding), mask)

    with mock.patch.object(module, "pad_images", padded if canvas else pad_images):
        return trace(model, image, **options)
