"""The model families of transformers that `TransformersDetector` runs, and how they differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from ..utils.files import read_json
from ..weights import transformers_format

# What transformers' RTDetrImageProcessor does unless a repository says otherwise: pixels in 0..1, not normalized.
_STRETCH = {"do_normalize": False, "size": {"height": 640, "width": 640}}
_FIRST_GROUP = "enc_out_class_embed.0"  # the only group of queries outside training
_RF_DETR = {"image_processor_type": "RfDetrImageProcessor"}
_RT_DETR = {"image_processor_type": "RTDetrImageProcessor"}
_PROMPT = "needs a text prompt"
_MASKS = "segments images"
_PLAIN = "has no multi-scale deformable attention"
_REFUSED = {  # other models of transformers that find objects
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino", "omdet-turbo", "owlvit", "owlv2", "florence2"), _PROMPT),
    **dict.fromkeys(("mask2former", "oneformer", "maskformer", "eomt"), _MASKS),
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "table-transformer", "yolos"), _PLAIN),
    "deta": "transformers no longer contains",
}

# Published recipes: fields of TrainConfig and DataConfig. `lr` is for `base_batch_size` images per step. Backbone
# multipliers differ by model size; these are those of the middle sizes. Constant learning rates became cosine ones.
_SSD = {"zoom_out_prob": 0.5, "crop_prob": 0.8, "color_jitter_prob": 0.5, "train_scales": (0.75, 1.25)}
# github.com/lyuwenyu/RT-DETR, rtdetr_pytorch and rtdetrv2_pytorch, configs: 16 images; backbone 0.1, of R101 0.01
_RT_DETR_TRAIN = {"lr": 1e-4, "base_batch_size": 16, "backbone_lr_mult": 0.1, "ema_decay": 0.9999}
# github.com/Peterande/D-FINE, configs/dfine/custom/objects365: 32 images; backbone S 0.5, M 0.1, L 0.05, X 0.01
_D_FINE_TRAIN = {
    "lr": 2.5e-4, "base_batch_size": 32, "backbone_lr_mult": 0.1, "weight_decay": 1.25e-4, "ema_decay": 0.9999,
}  # fmt: skip
# github.com/Intellindust-AI-Lab/DEIMv2, configs/deimv2 (COCO; none for other data): 32 images, lr 4e-4 or 5e-4;
# backbone S 0.5, M 0.1, L 0.05, X 0.01 with HGNetV2 and 0.05 to 0.02 with DINOv3. Mosaic in the first half
_DEIM_TRAIN = {"lr": 5e-4, "base_batch_size": 32, "backbone_lr_mult": 0.05, "ema_decay": 0.9999}
_DEIM = {**_SSD, "mosaic_prob": 0.5, "close_mosaic": 0.5}
# github.com/Atten4Vis/LW-DETR, scripts (Objects365 to COCO): 32 images, sizes 448 to 896. The backbone has 1.5e-4 ×
# 0.7² × 0.8 per layer from the top: 0.25 of lr on average over 10 layers
_LW_DETR_TRAIN = {"lr": 1e-4, "base_batch_size": 32, "backbone_lr_mult": 0.25, "ema_decay": 0.9997}
# github.com/roboflow/rf-detr, TrainConfig: 4 × 4 images; five windows smaller to five larger, which is 0.5 to 1.5 of
# Base and 0.77 to 1.23 of Large; backbone as LW-DETR's
_RF_DETR_TRAIN = {"lr": 1e-4, "base_batch_size": 16, "backbone_lr_mult": 0.25, "ema_decay": 0.993}
# Zhu et al. 2020, section 5: 32 images
_DEFORMABLE_TRAIN = {"lr": 2e-4, "base_batch_size": 32, "sampling_lr_mult": 0.1, "ema_decay": 0.9998}


def _window_multiple(config: Any) -> int:
    """Pixels of a patch times the windows per side: the vision transformer splits its tokens evenly."""
    backbone = config.backbone_config
    windows = getattr(backbone, "num_windows_side", None) or getattr(backbone, "num_windows", 1)
    return backbone.patch_size * windows


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        title: Name in messages.
        processor: Settings of its image processor if a repository has none.
        saved: Settings that its image processor is saved with.
        fields: Values of `AdapterConfig` that the image processor does not state.
        divisor: Returns the number of pixels that the sides of the input must be multiples of.
        proposal_head: The layer whose scores select the queries, in the network's `model`; braces name a setting.
        class_heads: Parts of the names of the layers whose rows are classes.
        is_fallback: Whether `DeformableDETRNetwork` runs the models of this family unless it lacks parts of them.
        train: Fields of `TrainConfig` of the family's published recipe.
        data: Fields of `DataConfig` of that recipe.
        has_masks: Whether transformers has a network of this family that also predicts masks.
    """

    title: str
    processor: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    divisor: Callable[[Any], int] = lambda config: 32
    proposal_head: str = "enc_score_head"
    class_heads: tuple[str, ...] = ("class_embed", "enc_score_head", "enc_out_class_embed", "denoising_class_embed")
    is_fallback: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    has_masks: bool = False


FAMILIES = {
    "rt_detr": Family("RT-DETR", _STRETCH, _RT_DETR, train=_RT_DETR_TRAIN, data=_SSD),
    "rt_detr_v2": Family("RT-DETRv2", _STRETCH, _RT_DETR, train=_RT_DETR_TRAIN, data=_SSD),
    "d_fine": Family("D-FINE", _STRETCH, _RT_DETR, train=_D_FINE_TRAIN, data=_SSD),
    "deimv2": Family("DEIMv2", _STRETCH, _RT_DETR, train=_DEIM_TRAIN, data=_DEIM),
    "deformable_detr": Family(
        "Deformable DETR",
        divisor=lambda config: 1,
        proposal_head="decoder.class_embed.{decoder_layers}",
        is_fallback=True,
        train=_DEFORMABLE_TRAIN,
    ),
    "lw_detr": Family(
        "LW-DETR",
        divisor=_window_multiple,
        proposal_head=_FIRST_GROUP,
        train=_LW_DETR_TRAIN,
        data={"train_scales": (0.7, 1.4)},
    ),
    "rf_detr": Family(
        "RF-DETR",
        saved=_RF_DETR,
        fields={"antialias": False},
        divisor=_window_multiple,
        proposal_head=_FIRST_GROUP,
        train=_RF_DETR_TRAIN,
        data={"train_scales": (0.7, 1.3)},
        has_masks=True,
    ),
}


def box_network(network: Any) -> Any:
    """Return the network that predicts boxes: one with masks is around it, others are it."""
    return network.model if hasattr(network, "segmentation_head") else network


def scores_objects(config: Any) -> bool:
    """Return whether column 0 of a head of its own scores the proposals: in Deformable DETR with two stages."""
    return getattr(config, "two_stage", False) and hasattr(config, "two_stage_num_proposals")


def refusal(path: Path, model_type: object) -> UserError:
    """Return the error about a config.json whose model type is none of `FAMILIES`."""
    reason = f", which {_REFUSED[name]}" if (name := str(model_type)) in _REFUSED else ""
    return UserError(f"{path} is of model_type {model_type!r}{reason}; these are supported: {', '.join(FAMILIES)}")


def family_of_source(folder: Path) -> Family | None:
    """Return the family of the model in a folder; None if this package's own network is to run it, or to refuse it.

    A fallback needs transformers to be installed; otherwise the error of this package's own loader names what it lacks.
    Raises UserError if the folder has another model of transformers.
    """
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    if model_type == transformers_format.MODEL_TYPE:
        try:
            transformers_format.check_network(folder)
            return None
        except UserError:
            return FAMILIES[model_type] if find_spec("transformers") else None
    if isinstance(model_type, str) and model_type not in FAMILIES:
        raise refusal(path, model_type)
    return FAMILIES.get(str(model_type))
