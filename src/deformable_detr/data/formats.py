"""Detect the format of a dataset: COCO JSON, YOLO or Pascal VOC."""

import os
from pathlib import Path

from ..config.schema import DataConfig
from ..utils.errors import UserError
from .coco import CocoSource
from .discovery import ROBOFLOW, configured_annotations, ensure_readable, find_annotations
from .source import Source
from .voc import find_voc
from .yolo import find_yaml, find_yolo, find_yolo_without_yaml


def find_source(root: Path, split: str, data: DataConfig) -> Source:
    """Find one split of the dataset at `root`.

    Tried in this order: COCO JSON whose name or setting is certain, YOLO with a data.yaml, Pascal VOC, YOLO without
    one, and any other file that `find_annotations` finds.

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
    if (voc := find_voc(root, split, (data.train_split, data.val_split, "test"), data.voc_origin)) is not None:
        return voc
    if (yolo := find_yolo_without_yaml(root, split)) is not None:
        return yolo
    readable = file.is_file() and os.access(file, os.R_OK)
    if error is None and (not readable or b'"images"' in file.read_bytes()):
        return CocoSource(file, root, split, data)
    reason = f"{file.name} has no list 'images'; add COCO JSON, a data.yaml, or classes.txt and images/{split}"
    raise error or UserError(f"{root}: no '{split}' split; {reason}")
