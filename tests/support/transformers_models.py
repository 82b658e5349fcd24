"""Small detectors of transformers with random weights, two configurations per family."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from deformable_detr.adapters.families import FAMILIES, box_network

NAMES = ("cat", "dog", "a b/ü")
_RESNET = {
    "model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8,
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_HGNET = {
    "model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 24, 32, 40], "hidden_sizes": [16, 24, 32, 40],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_HYBRID = {
    "encoder_hidden_dim": 32, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "decoder_layers": 2, "num_queries": 12, "hidden_size": 32, "num_denoising": 8,
}  # fmt: skip
_RT = _HYBRID | {"encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32], "backbone_config": _RESNET}
_DF = _HYBRID | {"encoder_in_channels": [24, 32, 40], "decoder_in_channels": [32, 32, 32], "backbone_config": _HGNET}
_VIT = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [2, 4], "patch_size": 16,
}  # fmt: skip
_GROUPS = {
    "d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4, "num_queries": 12, "group_detr": 3,
}  # fmt: skip
_DEFORMABLE = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "num_queries": 12, "two_stage_num_proposals": 12,
}  # fmt: skip
_SWIN = {
    "model_type": "swin", "image_size": 96, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "window_size": 3, "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "rt_detr": _RT,
    "rt_detr odd": _RT | {"decoder_n_points": 3, "num_queries": 7},
    "rt_detr_v2": _RT | {"num_queries": 6},
    "rt_detr_v2 odd": _RT | {"decoder_n_points": 2, "decoder_offset_scale": 0.7, "num_queries": 5},
    "d_fine": _DF,
    "d_fine odd": _DF | {"decoder_n_points": [3, 6, 2], "max_num_bins": 16, "num_queries": 9, "eval_idx": -1},
    "deimv2": _DF,
    "deimv2 odd": _DF | {"decoder_n_points": [2, 4, 2], "num_queries": 9},
    # What this package's own network lacks: Swin of transformers, other numbers of heads, maps and layer widths.
    "deformable_detr": _DEFORMABLE
    | {"with_box_refine": True, "two_stage": True, "backbone_config": _SWIN, "decoder_attention_heads": 2},
    "deformable_detr odd": _DEFORMABLE
    | {
        "num_queries": 9,
        "num_feature_levels": 3,
        "decoder_attention_heads": 4,
        "encoder_n_points": 3,
        "decoder_ffn_dim": 40,
        "position_embedding_type": "learned",
        "activation_function": "tanh",
        "backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [1, 3]},
    },
    "lw_detr": _GROUPS
    | {
        "projector_scale_factors": [1.0],
        "backbone_config": _VIT
        | {"model_type": "lw_detr_vit", "window_block_indices": [0, 2], "num_windows": 4, "image_size": 128},
    },
    "lw_detr odd": _GROUPS
    | {
        "projector_scale_factors": [2.0, 0.5],
        "decoder_n_points": 3,
        "backbone_config": _VIT
        | {"model_type": "lw_detr_vit", "window_block_indices": [1], "num_windows": 16, "image_size": 128},
    },
    "rf_detr": _GROUPS
    | {"backbone_config": _VIT | {"model_type": "rf_detr_dinov2", "num_windows": 2, "image_size": 128}},
    "rf_detr odd": _GROUPS
    | {
        "decoder_n_points": 3,
        "backbone_config": _VIT
        | {"model_type": "rf_detr_dinov2", "num_windows": 4, "patch_size": 14, "image_size": 112},
    },
}
MASKS = {
    "rf_detr masks": CONFIGS["rf_detr"] | {"intermediate_size": 40},
    "rf_detr masks odd": CONFIGS["rf_detr odd"]
    | {"intermediate_size": 24, "mask_downsample_ratio": 7, "decoder_layers": 3, "mask_point_sample_ratio": 4},
}
# Settings of the image processor: (its class, height and width), of the family's own kind.
SIZES = {"lw_detr": 128, "rf_detr": 128, "rf_detr odd": 112, "rf_detr masks odd": 112}


def random_network(name: str, dtype: torch.dtype = torch.float32, names: Sequence[str] = NAMES) -> Any:
    """Return transformers' model with random weights whose outputs depend on the image, but not on rounding.

    Skips the test if the installed release lacks the family.
    """
    import transformers

    family = name.split()[0]
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    side = SIZES.get(name, SIZES.get(family, 96))
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    for seed in range(50):
        network = _random_network(name, seed, names)
        with torch.no_grad(), _proposal_scores(network, family) as scores:
            outputs, moved = network(pixels), network(pixels + 1e-4 * torch.rand_like(pixels))
        sensitive = any((outputs[key] - moved[key]).abs().max() > 3e-3 for key in ("logits", "pred_boxes"))
        assert (outputs.logits[0] - outputs.logits[1]).abs().mean() > 0.02, "the network ignores the image"
        if not sensitive and all(_gap(proposals, network.config.num_queries) > 1e-3 for proposals in scores):
            return network.to(dtype)
    raise AssertionError(f"{name}: rounding selects the queries of every random network")


@contextmanager
def _proposal_scores(network: Any, family: str) -> Iterator[list[torch.Tensor]]:
    """Collect the scores (B, S) from which the queries are selected; none if they are learned."""
    scores: list[torch.Tensor] = []
    if family == "deformable_detr" and not network.config.two_stage:
        yield scores
        return
    head = FAMILIES[family].proposal_head.format(**network.config.to_dict())
    classes = slice(1) if family == "deformable_detr" else slice(None)  # its column 0 scores the proposals
    hook = (
        box_network(network)
        .model.get_submodule(head)
        .register_forward_hook(lambda _, __, logits: scores.append(logits[..., classes].amax(-1)))
    )
    yield scores
    hook.remove()


def _gap(scores: torch.Tensor, count: int) -> float:
    """Return the smallest difference between the last selected and the first rejected score; inf: all are selected."""
    if scores.shape[1] <= count:
        return float("inf")
    top = scores.topk(count + 1, dim=1).values
    return float((top[:, count - 1] - top[:, count]).min())


def _random_network(name: str, seed: int, names: Sequence[str]) -> Any:
    import transformers

    family = name.split()[0]
    labels = {"id2label": dict(enumerate(names)), "label2id": {text: label for label, text in enumerate(names)}}
    config = transformers.CONFIG_MAPPING[family].from_dict({**copy.deepcopy((CONFIGS | MASKS)[name]), **labels})
    torch.manual_seed(seed)
    kind = "InstanceSegmentation" if name in MASKS else "ObjectDetection"
    network = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    kinds = {f"{key}.weight": module for key, module in network.named_modules() if "sampling_offsets" not in key}
    with torch.no_grad():
        for key, value in network.state_dict().items():
            module = kinds.get(key)
            if key.endswith("running_var") or isinstance(module, nn.BatchNorm2d):  # transformers sets some to about 0
                value.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Conv2d | nn.Linear):  # its own weights would fade the image out
                value.normal_(0, (1.4 if value.dim() == 4 else 0.8) / value[0].numel() ** 0.5)
            elif value.is_floating_point() and value.numel() > 1 and "num_points_scale" not in key:
                value.add_(0.05 * torch.randn_like(value))
    return network.eval()


def write_repository(
    folder: Any, name: str, dtype: torch.dtype = torch.float32, names: Sequence[str] = NAMES
) -> tuple[Any, Any]:
    """Save a random network with its image processor; return both."""
    import transformers

    family = name.split()[0]
    network = random_network(name, dtype, names)
    network.save_pretrained(folder)
    side = SIZES.get(name, SIZES.get(family, 96))
    size = {"height": side, "width": side}
    if family == "rf_detr":
        processor = transformers.RfDetrImageProcessor(size=size)
    elif family == "deformable_detr":
        processor = transformers.DeformableDetrImageProcessor(size={"shortest_edge": side, "longest_edge": 160})
    elif family == "lw_detr":
        processor = transformers.DeformableDetrImageProcessor(size=size)
    else:
        processor = transformers.RTDetrImageProcessor(size=size)
    processor.save_pretrained(folder)
    return network, processor


def pictures(count: int = 3) -> list[Image.Image]:
    """Return smooth random images of different sizes."""
    generator = torch.Generator().manual_seed(3)
    images = []
    for index in range(count):
        coarse = torch.randint(0, 256, (6, 7, 3), generator=generator, dtype=torch.uint8)
        images.append(Image.fromarray(coarse.numpy()).resize((120 + 40 * index, 150 - 30 * index)))
    return images
