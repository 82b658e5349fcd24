"""Detect the format of a dataset: COCO JSON, YOLO or Pascal VOC."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import DataConfig
from ..utils.errors import UserError
from .coco import CocoSource, is_other_json
from .discovery import (
    ROBOFLOW,
    configured_annotations,
    ensure_readable,
    find_annotations,
    names_other_split,
    split_aliases,
)
from .source import Source
from .voc import find_voc
from .yolo import CLASS_FILES, find_yaml, find_yolo, find_yolo_without_yaml


def find_source(root: Path, split: str, data: DataConfig) -> Source:
    """Find one split of the dataset at `root`: COCO JSON, otherwise YOLO, otherwise Pascal VOC.

    Raises:
        UserError: There is no such split.
    """
    ensure_readable(root)
    if root.is_file() and (yaml := find_yaml(root)):
        return find_yolo(yaml, split)
    error: UserError | None = None
    try:
        file = find_annotations(root, split, data)
        # The only JSON file of a folder may be anything if the dataset is clearly in another format.
        certain = configured_annotations(split, data) or file == root or file.name == ROBOFLOW
        if certain or file.stem.startswith("instances_"):
            return CocoSource(file, root, split, data)
    except UserError as coco_error:
        if configured_annotations(split, data) or not root.is_dir():
            raise
        file, error = root, coco_error
    if (yaml := find_yaml(root)) is not None:
        return find_yolo(yaml, split)
    if (voc := find_voc(root, split, (data.train_split, data.val_split, "test"))) is not None:
        return voc
    if (yolo := find_yolo_without_yaml(root, split)) is not None:
        return yolo
    if error is None and is_other_json(file):
        error = UserError(f"{root}: no '{split}' split; {file.name} has no list 'images'; give COCO JSON")
    if error is not None:
        raise _incomplete_layout(root, split) or error
    return CocoSource(file, root, split, data)


def _incomplete_layout(root: Path, split: str) -> UserError | None:
    """Explain what is missing in a folder with YOLO or VOC files but not their layout."""
    prefix = f"{root}: no '{split}' split;"
    if names_other_split(root / "x", split):
        return UserError(f"{prefix} the folder is named as another split; give the folder with both, or rename it")
    if classes := next((name for name in CLASS_FILES if (root / name).is_file()), None):
        folders = " or ".join(str(root / place) for place in (f"images/{split}", f"{split}/images"))
        return UserError(f"{prefix} {classes} exists, but there are no images in {folders}; put them there")
    folders = [root, *(root / name for name in split_aliases(split))]
    for folder in (folder / "labels" for folder in folders):
        if any(folder.rglob("*.txt")):
            return UserError(
                f"{prefix} {folder} has YOLO label files, but data.yaml is missing; write one in {root} with 'train' "
                "and 'val' (a folder or a list of images each) and 'names' (the classes), or list the classes in "
                "classes.txt, one per line"
            )
    for folder in (folder / name for folder in folders for name in ("annotations", "Annotations")):
        if any(folder.glob("*.xml")):
            return UserError(
                f"{prefix} {folder} has Pascal VOC files, but the dataset has neither VOC layout; name the folders "
                f"images and annotations and put both into {split}/ or list the images in ImageSets/Main/{split}.txt, "
                f"or put images and XML files together into {split}/"
            )
    return None
