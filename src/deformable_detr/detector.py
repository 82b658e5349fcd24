"""The public model: the network with loading, saving, prediction and optimization."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from .config.detector import AdapterConfig, DetectorConfig
from .config.schema import Config, ModelConfig
from .model.network import DeformableDETRNetwork
from .predict.predictor import Detector
from .utils.errors import UserError
from .utils.files import is_exported
from .utils.terminal import echo

if TYPE_CHECKING:
    from .adapters.families import Family
    from .runtimes.fused import OptimizedDetector
    from .weights.model_card import ModelCardData


# What int8 quantizes. The rest stays fp32: the backbone's stem and first stage (timm's names; they alone cost a trained
# model 0.013 AP), the layers that locate and score boxes, normalization, softmax and sampling, and the decoder, which
# takes little time.
_FIRST_STAGE = r"body\.(conv_stem|conv1|stem|blocks\.0|layer1|stages\.0|stages_0)\b"
_ENCODER = r"encoder\.layers\.\d+\.(ffn|self_attn\.(value_proj|output_proj))\b"


class DeformableDETR(DeformableDETRNetwork, Detector):
    """Deformable DETR (Zhu et al., 2021). Build it from a `ModelConfig`; `presets` has the paper's variants."""

    explains = True
    exports_any_size = True
    int8_modules: ClassVar = {
        "backbone and encoder": re.compile(rf"backbone\.(?!{_FIRST_STAGE})|projections\b|{_ENCODER}"),
        "encoder": re.compile(_ENCODER),
    }
    config: ModelConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """Load a model in evaluation mode.

        Args:
            source: A run folder or one that `save_pretrained` wrote, a transformers repository of Deformable DETR
                (folder or hub id), a checkpoint (`.pth`) of the official code,
                IDEA-Research/DINO, detrex or mmdetection, or a short name, such as "deformable-detr-r50-refine".
            **overrides: Config fields to change, such as `image_size=640`; see `weights.load.load_pretrained`.

        Raises:
            UserError: The source is missing, foreign, damaged or unsafe to read, or an override is not possible.
        """
        from .weights.load import load_pretrained

        path, family = _locate(source)
        if family is not None and not family.is_fallback:
            raise UserError(f"{os.fspath(source)} is not a Deformable DETR but a {family.title}: use load_detector")
        try:
            with torch.random.fork_rng(devices=[]):
                return load_pretrained(path, cls, **overrides)
        except UserError as error:
            if family is None:
                raise
            raise UserError(f"{error}; load_detector uses transformers' network for it") from None

    def save_pretrained(self, folder: str | os.PathLike[str], card_data: ModelCardData | None = None) -> None:
        """Write config.json, model.safetensors and a model card into a folder, which is created if missing."""
        from .weights.native import save

        save(self, Path(folder), card_data)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model and its card to the Hugging Face hub.

        Args:
            repo_id: "owner/name"; created if missing.
            **options: Format, visibility, token and card of `weights.hub.push`.

        Returns:
            The address of the upload.

        Raises:
            UserError: The hub refuses the upload, or the format cannot express the model.
        """
        from .weights.hub import push

        return push(self, repo_id, **options)

    def optimize(self, precision: str = "fp32", compile: bool = False) -> OptimizedDetector:
        """Return a faster copy for inference that needs less memory. `pred_logits` and `pred_boxes` stay the same.

        It cannot be copied, pickled or sent to another process; send the model and optimize it there.

        Args:
            precision: "fp32", or "bf16" if the processor supports it.
            compile: Also compile with `torch.compile`. On CPUs this needs a C++ compiler.
        """
        from .runtimes.fused import OptimizedDetector

        with torch.random.fork_rng(devices=[]):  # new layers start from random weights, which are replaced
            return OptimizedDetector(self, precision, compile=compile)

    def proposal_scores(self, pixels: Tensor, padding_mask: Tensor | None = None) -> Tensor | None:
        """Return the encoder's scores (B, S) of a two-stage model."""
        if not self.config.two_stage:
            return None
        logits = self(pixels, padding_mask)["encoder_logits"]
        return logits.amax(-1) if self.config.class_aware_proposals else logits[..., 0]

    def export_config(self) -> ModelConfig:
        """Return the config with its normalization and without downloads."""
        mean, std = (self.get_buffer(name).tolist() for name in ("pixel_mean", "pixel_std"))
        return self.config.without_pretrained_backbone().replace(pixel_mean=tuple(mean), pixel_std=tuple(std))

    def export_module(self) -> Self:
        """Return a copy with folded batch norms and without unused class heads."""
        from .runtimes.fused.folding import inference_copy

        return inference_copy(self)


def load_detector(source: str | os.PathLike[str], device: str = "auto", precision: str | None = None) -> Detector:
    """Load a model or an exported file.

    Args:
        source: An exported file (.onnx, .xml, .pt2) or anything that `DeformableDETR.from_pretrained` reads,
            a transformers repository of RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR or RF-DETR, or the short name of a
            pretrained model, such as "dfine-s" (`deformable-detr models` lists them).
        device: "auto", "cpu", "cuda", "mps", or a device of the exported file's runtime.
        precision: "fp32" or "bf16" returns the model after `optimize`. Default: the model itself.

    Returns:
        A `DeformableDETR`, a `TransformersDetector`, an optimized copy of one, or an `ExportedDetector`.

    Raises:
        UserError: The source cannot be loaded, or it is an exported file and `precision` is "bf16".
    """
    if is_exported(source):
        from .runtimes.detector import load_exported

        if precision == "bf16":
            raise UserError(f"{os.fspath(source)}: an exported file has a fixed precision; only a model can use bf16")
        return load_exported(source, device)
    from .utils.device import pick_device

    model = load_model(source).to(pick_device(device))
    return model if precision is None else model.optimize(precision)


def load_model(source: str | os.PathLike[str]) -> Detector:
    """Load a `DeformableDETR` or a `TransformersDetector` on the CPU; arguments and errors as in `load_detector`."""
    path, family = _locate(source)
    if family is None:
        return DeformableDETR.from_pretrained(path)
    from .adapters.detector import TransformersDetector

    return TransformersDetector.from_pretrained(path)


def build_detector(config: DetectorConfig) -> Detector:
    """Build a detector for a `ModelConfig`, whose backbone may be pretrained, or with random weights for another."""
    if isinstance(config, ModelConfig):
        return DeformableDETR(config)
    from .adapters.detector import TransformersDetector

    return TransformersDetector(cast("AdapterConfig", config))


def finetune_config(source: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """Return the config to fine-tune a model; arguments and errors as in `weights.finetune.finetune_config`."""
    path, family = _locate(source)
    if family is None:
        from .weights import finetune

        return finetune.finetune_config(path, changes)
    from .adapters.finetune import finetune_config

    return finetune_config(path)


def load_for_finetuning(
    config: DetectorConfig, source: str | os.PathLike[str], log: Callable[[str], object] = echo
) -> Detector:
    """Build a detector and initialize it with the weights of another one that fit.

    Raises UserError if the source cannot be loaded, or is another kind of model than the config's.
    """
    path, family = _locate(source)
    if isinstance(config, ModelConfig):
        if family is not None:
            raise UserError(f"{os.fspath(source)} is a {family.title}: omit --preset to fine-tune it")
        from .weights import finetune

        return finetune.load_for_finetuning(config, path, log, DeformableDETR)
    if family is None:
        raise UserError(f"{os.fspath(source)} has this package's network, and this run's is transformers'")
    from .adapters.finetune import load_for_finetuning

    return load_for_finetuning(cast("AdapterConfig", config), path, log)


def _locate(source: str | os.PathLike[str]) -> tuple[Path, Family | None]:
    """Return the files of a model, downloaded if necessary, and its family if its network is transformers'."""
    from .adapters.families import family_of_source
    from .weights.load import locate_source

    path = locate_source(source)
    return path, family_of_source(path)
