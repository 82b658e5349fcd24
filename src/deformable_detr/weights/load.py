"""Load a model from a folder, a transformers repository, the hub, a short name or a `.pth`."""

import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..model.network import DeformableDETRNetwork, NetworkT
from ..utils.errors import UserError, first_line
from ..utils.files import is_exported, read_json
from ..utils.progress import bar_class, in_notebook, write_line
from . import catalog, native, official_format, transformers_format
from .checkpoint import STATED, Checkpoint
from .resize import resize_state

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_NAME = re.compile(r"[\w.-]{1,80}(@[\w./-]+)?")
_HUB_FILES = (("*.json", "*.safetensors"), ("*.json", "pytorch_model*.bin", "*.pth"))  # pickles only as a last resort
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
# Fields that may differ from the source's because they do not change what the weights mean.
OVERRIDABLE = (
    "image_size", "max_size", "num_queries", "num_feature_levels", "dropout", "gradient_checkpointing", "class_names",
    "category_ids", "pixel_mean", "pixel_std", "frozen_stages",
)  # fmt: skip


def load_pretrained(
    source: str | os.PathLike[str], network_class: type[NetworkT] = DeformableDETRNetwork, **overrides: Any
) -> NetworkT:
    """Load a model in evaluation mode, in float32, or in float64 if all its weights are.

    Args:
        source: A run folder or one that `save_pretrained` wrote; a transformers repository of Deformable DETR as a
            folder or hub id ("owner/name", "owner/name@revision"); a checkpoint (`.pth`) of
            the official code, IDEA-Research/DINO, detrex or mmdetection; a short name of `weights.catalog`.
        network_class: The class to build.
        **overrides: Fields of `ModelConfig` to change, of `OVERRIDABLE`. `num_feature_levels`, and `num_queries` of a
            one-stage model, can only shrink: what they add would be untrained. Also the fields that a `.pth` without
            settings does not tell, such as `num_heads`.

    Raises:
        UserError: The source is missing, foreign, damaged or unsafe, or an override is not possible.
    """
    stated = {name: value for name, value in overrides.items() if name in STATED}
    checkpoint = read_checkpoint(source, stated)
    as_read = [name for name, value in stated.items() if getattr(checkpoint.config, name) == value]
    overrides = {name: value for name, value in overrides.items() if name not in as_read}
    unknown = [name for name in overrides if name not in OVERRIDABLE]
    if unknown:
        raise UserError(f"{source}: {unknown[0]} cannot be overridden; these can: {', '.join(OVERRIDABLE)}")
    for note in checkpoint.notes:
        _log.info(note)
    model, state = checkpoint.build(network_class, **{k: v for k, v in overrides.items() if k == "frozen_stages"})
    if overrides:
        config = checkpoint.config.replace(**overrides)
        for field in ("num_feature_levels",) if config.two_stage else ("num_feature_levels", "num_queries"):
            if getattr(config, field) > (trained := getattr(checkpoint.config, field)):
                raise UserError(f"{source} has {field} {trained}; to add more, fine-tune with `train --weights`")
        model = network_class(config.without_pretrained_backbone())
        state, _ = resize_state(state, checkpoint.config, model)
    if all(value.dtype == torch.float64 for value in state.values() if value.is_floating_point()):
        model = model.double()
    model.load_state_dict(state)
    return model.eval()


def read_checkpoint(source: str | os.PathLike[str], stated: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a source's config and tensors without building the network. Raises UserError as `load_pretrained` does.

    stated: Config fields, of `STATED`, that a `.pth` without settings does not tell; other sources ignore them.
    """
    path = locate_source(source)
    if not path.is_dir():
        return official_format.read(path, {**catalog.untold_fields(path), **(stated or {})})
    is_native = read_json(path / "config.json").get("format") == native.FORMAT
    return native.read(path) if is_native else transformers_format.read(path)


def locate_source(source: str | os.PathLike[str]) -> Path:
    """Return the source's folder or `.pth`; download it if the source is a short name or a hub id."""
    path = Path(source)
    if os.path.isdir(path):  # unlike Path.is_dir, False for an invalid name
        return _locate_in_folder(path)
    if os.path.isfile(path):
        if is_exported(path):
            raise UserError(f"model {path} is an exported file; give the folder of the model that it was made from")
        if path.suffix in (".safetensors", ".bin", ".json") and (path.parent / "config.json").is_file():
            return path.parent
        if path.suffix == ".safetensors":
            raise UserError(f"model {path} has no config.json beside it, which describes the network")
        return path
    hub_id = os.fspath(source)
    name, _, revision = hub_id.partition("@")
    if (pretrained := catalog.find_model(name)) is not None:
        return _download_pretrained(pretrained, revision)
    # If the parent folder exists, the source is a mistyped path, not a hub id.
    if _HUB_ID.fullmatch(hub_id) and path.suffix not in _WEIGHT_SUFFIXES and not os.path.isdir(path.parent):
        return _download(hub_id, hub_id)
    is_name = _NAME.fullmatch(hub_id) and path.suffix not in _WEIGHT_SUFFIXES
    raise UserError(f"model {hub_id[:400]}: no such folder or file{catalog.hint(name) if is_name else ''}")


def _locate_in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    checkpoints = sorted(folder.glob("*.pth"))
    if len(checkpoints) == 1:
        return checkpoints[0]
    if (folder / "config.yaml").is_file():
        raise UserError(f"model {folder}: this run has no model yet; resume it with train --resume")
    several = " and several .pth files; name one of them" if checkpoints else ""
    raise UserError(f"model {folder} has no config.json{several}")


def _download_pretrained(model: catalog.PretrainedModel, revision: str) -> Path:
    if revision and model.is_release:
        raise UserError(f"model {model.name}@{revision}: a single file has no revisions; omit @{revision}")
    if model.is_manual:
        raise UserError(
            f"model {model.name} is on Google Drive, which programs cannot download from: "
            f"download it by hand from {model.source} and pass the path of the file"
        )
    path = catalog.release_folder() / model.file
    if model.is_release and path.is_file():
        return path
    if notice := catalog.license_notice(model):
        _tell(notice)
    if not model.is_release:
        hub_id = f"{model.source}@{revision}" if revision else model.source
        return _download(hub_id, f"{model.name} ({hub_id})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_line(f"download {model.source}")
        torch.hub.download_url_to_file(model.source, str(path), progress=sys.stderr.isatty() or in_notebook())
    except Exception as error:  # from the network or the disk
        raise UserError(f"model {model.name}: the download of {model.source} failed: {first_line(error)}") from None
    return path


@cache
def _tell(notice: str) -> None:
    """Log a notice once per process: a command looks a model up several times."""
    _log.warning(notice)


def _download(hub_id: str, shown: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled

    name, _, revision = hub_id.partition("@")
    folder = Path()
    shows_own = sys.stderr.isatty() or are_progress_bars_disabled()  # the hub's client has bars for terminals only
    options: dict[str, Any] = {} if shows_own else {"tqdm_class": bar_class()}
    for patterns in _HUB_FILES:
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns), **options))
        except Exception as error:  # from the hub's client, the network or the disk
            raise UserError(f"model {shown}: no such folder, and the download failed: {first_line(error)}") from None
        if any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()):
            break
    return locate_source(folder)
