"""The model families of transformers that `TransformersDetector` runs, and how they differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import read_json

# What transformers' RTDetrImageProcessor does unless a repository says otherwise: pixels in 0..1, not normalized.
_STRETCH = {"do_normalize": False, "size": {"height": 640, "width": 640}}
_FIRST_GROUP = "enc_out_class_embed.0"  # the only group of queries outside training
_RF_DETR = {"image_processor_type": "RfDetrImageProcessor"}
_RT_DETR = {"image_processor_type": "RTDetrImageProcessor", "do_pad": False}


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
        proposal_head: The layer whose scores select the queries, in the network's `model`.
        class_heads: Parts of the names of the layers whose rows are classes.
    """

    title: str
    processor: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    divisor: Callable[[Any], int] = lambda config: 32
    proposal_head: str = "enc_score_head"
    class_heads: tuple[str, ...] = ("class_embed", "enc_score_head", "enc_out_class_embed", "denoising_class_embed")


FAMILIES = {
    "rt_detr": Family("RT-DETR", _STRETCH, _RT_DETR),
    "rt_detr_v2": Family("RT-DETRv2", _STRETCH, _RT_DETR),
    "d_fine": Family("D-FINE", _STRETCH, _RT_DETR),
    "deimv2": Family("DEIMv2", _STRETCH, _RT_DETR),
    "lw_detr": Family("LW-DETR", divisor=_window_multiple, proposal_head=_FIRST_GROUP),
    "rf_detr": Family(
        "RF-DETR", saved=_RF_DETR, fields={"antialias": False}, divisor=_window_multiple, proposal_head=_FIRST_GROUP
    ),
}


def family_of_source(path: Path) -> Family | None:
    """Return the family of the model in a folder; None if it is none of `FAMILIES`."""
    config = path / "config.json"
    return FAMILIES.get(str(read_json(config).get("model_type"))) if config.is_file() else None
