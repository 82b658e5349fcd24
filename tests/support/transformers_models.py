"""Small detectors of transformers with random weights, two configurations per family."""

from typing import Any

import torch
from PIL import Image

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
# Settings of the image processor: (its class, height and width), of the family's own kind.
SIZES = {"lw_detr": 128, "rf_detr": 128, "rf_detr odd": 112}


def random_network(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model with random weights whose choice of queries does not hang on rounding."""
    family = name.split()[0]
    side = SIZES.get(name, SIZES.get(family, 96))
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    for seed in range(50):
        network = _random_network(name, seed)
        with torch.no_grad():
            outputs, moved = network(pixels), network(pixels + 1e-4 * torch.rand_like(pixels))
        proposals = outputs.get("enc_topk_logits", outputs.get("enc_outputs_class"))
        if family == "deformable_detr":  # one stage has no proposals; of two, column 0 scores them
            proposals = outputs.logits if proposals is None else proposals[..., :1]
        ties = any(len(scores.amax(-1).unique()) < scores.shape[0] for scores in proposals)
        if not ties and (outputs.pred_boxes - moved.pred_boxes).abs().max() < 1e-2:
            return network.to(dtype)
    raise AssertionError(f"{name}: every random network has ties among its proposals")


def _random_network(name: str, seed: int) -> Any:
    import transformers

    family = name.split()[0]
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {text: label for label, text in enumerate(NAMES)}}
    config = transformers.CONFIG_MAPPING[family].from_dict({**CONFIGS[name], **labels})
    torch.manual_seed(seed)
    network = transformers.AutoModelForObjectDetection.from_config(config)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.dim() > 1 and "sampling_offsets" not in key:
                value.add_(0.15 * torch.randn_like(value) * value.std().nan_to_num(1).clamp(min=0.1))
            elif value.is_floating_point() and value.numel() > 1 and "num_points_scale" not in key:
                value.add_(0.05 * torch.randn_like(value))
    return network.eval()


def write_repository(folder: Any, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Save a random network with its image processor; return both."""
    import transformers

    family = name.split()[0]
    network = random_network(name, dtype)
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
