"""A detector of transformers with the calls of this package's detectors."""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..config.detector import AdapterConfig
from ..predict.predictor import Detector
from ..utils.errors import UserError, first_line
from ..utils.files import FileContent, json_text, read_json, write_files
from ..utils.packages import need, quiet_transformers
from ..weights.checkpoint import coco_labels
from ..weights.files import check_finite
from ..weights.hub import upload
from ..weights.image_processor import (
    PREPROCESSOR,
    PROCESSOR,
    processor_fields,
    read_settings,
    updated_settings,
    write_processor,
)
from ..weights.model_card import ModelCardData, card_file
from .config_checks import check_config, check_timm
from .families import FAMILIES, Family, box_network, refusal, scores_objects
from .objective import AdapterObjective
from .optimize import OptimizedAdapter, TraceableNetwork, inference_copy
from .sampling import run_recorded

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OWN = "deformable_detr"  # key in config.json of what transformers does not store
_QUERIES = "num_queries", "two_stage_num_proposals"
_NOT_ARCHITECTURE = {
    "id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "transformers_version",
    "_name_or_path", "use_pretrained_backbone", OWN, *_QUERIES,
}  # fmt: skip
OVERRIDABLE = ("image_size", "image_width", "max_size", "class_names", "category_ids", "pixel_mean", "pixel_std")


class TransformersDetector(Detector):
    """RT-DETR, D-FINE, RF-DETR and their relatives: transformers' network, this package's everything else.

    Build it from an `AdapterConfig` (random weights), or with `from_pretrained`. `network` is transformers' model.

    Raises:
        UserError: transformers is not installed, too old for the family, or rejects the config.
    """

    explains = True
    backbone_parameters = re.compile(r"network\.(model\.)+(backbone|conv_encoder)\.(backbone|model)\.")  # no projectors
    config: AdapterConfig

    def __init__(self, config: AdapterConfig) -> None:
        _processor_settings(config)  # not an error after the training
        self._assemble(config, build_network(config))

    def _assemble(self, config: AdapterConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.network = network
        for name, parameter in network.named_parameters():
            if name.endswith("mask_token"):  # used in pre-training only
                parameter.requires_grad_(False)
        if (tokens := _encoded_tokens(box_network(network).model)) is not None:
            check = partial(_check_positions, family_of(config).title, config.num_queries)
            tokens.register_forward_hook(check)
        dtype = next(network.parameters()).dtype
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean, dtype=dtype), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std, dtype=dtype), persistent=False)

    def forward(
        self, pixels: Tensor, padding_mask: Tensor | None = None, *, return_attention: bool = False
    ) -> dict[str, Any]:
        """Return `pred_logits` (B, Q, K) and `pred_boxes` (B, Q, 4); see `Detector`. With masks, also `pred_masks`.

        With `return_attention`, in evaluation mode, also the outputs of `DeformableDETRNetwork.forward` about each
        decoder layer, without masks. `encoder_attention` is empty except for Deformable DETR: other encoders have no
        such layers.
        """
        mask = None
        if padding_mask is not None:
            pixels, mask = pixels.masked_fill(padding_mask[:, None], 0.0), (~padding_mask).long()
        if return_attention:
            return run_recorded(box_network(self.network), pixels, mask)
        outputs = self.network(pixel_values=pixels, pixel_mask=mask)
        masks = {"pred_masks": outputs.pred_masks} if self.config.masks else {}
        return {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes, **masks}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """Load a transformers repository in evaluation mode, in float64 if it was saved so, else in float32.

        Args:
            source: A folder, as transformers or `save_pretrained` wrote it.
            **overrides: Fields of `AdapterConfig` to change, of `OVERRIDABLE`.

        Raises:
            UserError: The folder is of another model type or damaged, or an override is not possible.
        """
        folder = Path(source)
        unknown = [name for name in overrides if name not in OVERRIDABLE]
        if unknown:
            raise UserError(f"{source}: {unknown[0]} cannot be overridden; these can: {', '.join(OVERRIDABLE)}")
        with torch.random.fork_rng(devices=[]):
            config, network = read_config(folder), read_network(folder)
        model = cls.__new__(cls)
        model._assemble(config.replace(**overrides) if overrides else config, network)
        return model.eval()

    def training_objective(self) -> nn.Module:
        """Return the network's own loss, with its denoising queries."""
        return AdapterObjective(self)

    def optimize(self, precision: str = "fp32", compile: bool = False) -> Detector:
        """Return a faster copy for inference; see `OptimizedAdapter`. `compile` also uses `torch.compile`."""
        with torch.random.fork_rng(devices=[]):  # new layers start from random weights, which are replaced
            return OptimizedAdapter(self, precision, compile)

    def proposal_scores(self, pixels: Tensor, padding_mask: Tensor | None = None) -> Tensor | None:
        """Return the encoder's scores (B, S): the highest of all classes; of Deformable DETR with two stages column 0.

        None for Deformable DETR with one stage.
        """
        logits: list[Any] = []
        config: Any = self.network.config
        if not getattr(config, "two_stage", True):
            return None
        name = family_of(self.config).proposal_head.format(**vars(config))
        head = box_network(self.network).model.get_submodule(name)
        hook = head.register_forward_hook(lambda _, inputs, output: logits.append(output))
        try:
            self(pixels, padding_mask)
        finally:
            hook.remove()
        return logits[0][..., 0] if scores_objects(config) else logits[0].amax(-1)

    def export_config(self) -> AdapterConfig:
        """Return the config, which has all that a file needs."""
        return self.config

    def export_module(self) -> nn.Module:
        """Return a copy that runs this package's attention, with folded batch norms and RepVGG branches."""
        return TraceableNetwork(inference_copy(self))

    def save_pretrained(self, folder: str | os.PathLike[str], card_data: ModelCardData | None = None) -> None:
        """Write a repository with a model card that `from_pretrained` and transformers' `Auto` classes load.

        Raises UserError if it cannot be written.
        """
        config, folder = self.config, Path(folder)
        with tempfile.TemporaryDirectory() as staging, quiet_transformers():
            cast(Any, self.network).save_pretrained(staging, max_shard_size=2**62)
            own = {"category_ids": config.category_ids}
            values = read_json(Path(staging) / CONFIG) | _labels(config) | {OWN: own}
            card = replace(card_data or ModelCardData(), library="transformers", title=family_of(config).title)
            files: dict[str, FileContent | None] = {
                WEIGHTS: partial(shutil.copyfile, Path(staging) / WEIGHTS),
                PREPROCESSOR: json_text(_processor_settings(config)),
                PROCESSOR: None,  # which transformers would prefer
                **card_file(folder, config, card),
                CONFIG: json_text(values),
            }
            write_files(folder, files)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, and return the address.

        Args:
            repo_id: "owner/name"; created if missing.
            **options: Visibility, token and card of `weights.hub.upload`.

        Raises:
            UserError: The hub refuses the upload.
        """
        return upload(self.save_pretrained, repo_id, **options)


def family_of(config: AdapterConfig) -> Family:
    """Return the family of a config. Raises UserError if there is none of that name."""
    if config.family not in FAMILIES:
        raise UserError(f"model family {config.family!r} is not supported; these are: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def _encoded_tokens(model: Any) -> nn.Module | None:
    """Return the layer whose output are the tokens that the queries are chosen from; None if they are learned."""
    layer = getattr(model, "enc_output_norm", None) or getattr(model, "enc_output", None)
    return layer[0] if isinstance(layer, nn.ModuleList) else layer


def _check_positions(title: str, queries: int, layer: nn.Module, inputs: Any, tokens: Tensor) -> None:
    """Raise UserError if there are fewer tokens (B, S, C) than queries."""
    if (count := tokens.shape[1]) < queries:
        raise UserError(
            f"this {title} has {queries} queries, but an input of this size has only {count} positions for them; "
            f"use a larger image size, or train with --set model.num_queries={count} or less"
        )


def build_network(config: AdapterConfig) -> nn.Module:
    """Build transformers' model with random weights. Raises UserError if transformers rejects the config."""
    title = family_of(config).title
    transformers = need("transformers", "hub")
    if config.masks and not family_of(config).has_masks:
        raise UserError(f"model.masks: transformers' {title} has no masks; set model.masks=false")
    values = copy.deepcopy(config.network) | _labels(config)
    try:
        described = transformers.CONFIG_MAPPING[config.family].from_dict(values)
        described.use_pretrained_backbone = False
        for name in filter(partial(hasattr, described), _QUERIES):
            setattr(described, name, config.num_queries)
        with quiet_transformers():
            return _auto_class(transformers, config.masks).from_config(described)
    except KeyError:
        raise UserError(f"transformers {transformers.__version__} has no {title}; install a newer release") from None
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise UserError(f"transformers cannot build this {title}: {first_line(error)}") from None


def _auto_class(transformers: Any, masks: bool) -> Any:
    return transformers.AutoModelForInstanceSegmentation if masks else transformers.AutoModelForObjectDetection


def has_mask_head(values: Mapping[str, Any]) -> bool:
    """Return whether a config.json of transformers is of a network for instance segmentation."""
    return any("InstanceSegmentation" in str(name) for name in values.get("architectures") or ())


def _labels(config: AdapterConfig) -> dict[str, Any]:
    """Return the classes as transformers' config has them."""
    names = config.class_names or tuple(f"LABEL_{label}" for label in range(config.num_classes))
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def _processor_settings(config: AdapterConfig) -> dict[str, Any]:
    """Return the settings of transformers' image processor: those of the source, as far as they still apply."""
    family = family_of(config)
    if config.processor:
        fields = processor_fields(config.processor, Path("model.processor"), family.processor)
        return updated_settings(config.processor, fields, config)
    return {**write_processor(config, config.pixel_mean, config.pixel_std), **family.saved}


def read_config(source: str | os.PathLike[str]) -> AdapterConfig:
    """Read the config and image processor of a repository. Raises UserError if they are damaged or not supported."""
    folder = Path(source)
    transformers = need("transformers", "hub")
    path = folder / CONFIG
    values = read_json(path)
    if (model_type := str(values.get("model_type"))) not in FAMILIES:
        raise refusal(path, model_type)
    check_config(values, path)
    family = FAMILIES[model_type]
    processor_path, settings = read_settings(folder)
    processor = processor_fields(settings, processor_path, family.processor)
    try:
        described = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise UserError(f"{path} cannot be read by transformers: {first_line(error)}") from None
    check_timm(getattr(described, "backbone_config", None), path)
    names = tuple(str(described.id2label[label]) for label in range(described.num_labels))
    names, category_ids = coco_labels(names)
    network = json.loads(described.to_json_string(use_diff=True))
    own = values.get(OWN)
    return AdapterConfig.from_dict(
        {
            "family": model_type,
            "network": architecture(network),
            "num_classes": len(names),
            "num_queries": described.two_stage_num_proposals if scores_objects(described) else described.num_queries,
            "class_names": names,
            "category_ids": own.get("category_ids", ()) if isinstance(own, dict) else category_ids,
            "masks": has_mask_head(values),
            "size_divisor": family.divisor(described),
            "processor": settings,
            **processor,
            **family.fields,
        },
        str(path),
    )


def architecture(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config of transformers, also of its backbone, without what does not describe the network."""
    return {
        key: architecture(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _NOT_ARCHITECTURE
    }


def read_network(folder: Path) -> nn.Module:
    """Read the network of a repository. Raises UserError if a tensor is missing, left over or of another shape."""
    transformers = need("transformers", "hub")
    values = read_json(folder / CONFIG)
    dtype = torch.float64 if "float64" in (values.get("dtype"), values.get("torch_dtype")) else torch.float32
    try:
        with quiet_transformers():
            network, info = _auto_class(transformers, has_mask_head(values)).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=dtype
            )
    except Exception as error:  # from transformers' config, safetensors or torch.load
        raise UserError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(name) for name in info[problem])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: {problem.replace('_', ' ')} in the weights: {names[0]}{more}")
    check_finite(network.state_dict(), folder)
    return network
