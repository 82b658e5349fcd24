"""A split as it lies on disk, in whichever format: where its records are and how they become one COCO dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import DataConfig
from ..structures import Category
from ..utils.errors import UserError
from .coco import is_other_json, read_json
from .discovery import (
    ROBOFLOW,
    find_annotations,
    find_images,
    given_annotations,
    names_other_split,
    refuse_unreadable,
    split_aliases,
)
from .problems import OnProblem, Source, refuse


@dataclass(frozen=True)
class CocoSource:
    """A COCO JSON file, its images in `folder` or where `layouts.find_images` finds them."""

    file: Path
    root: Path
    split: str
    data: DataConfig
    format: str = "coco"

    def read(self, categories: Sequence[Category] | None = None, complain: OnProblem = refuse) -> dict[str, Any]:
        return read_json(self.file)

    def image_folder(self, names: Sequence[str]) -> Path:
        return find_images(self.file, self.root, self.split, self.data, names)


def find_source(root: Path, split: str, data: DataConfig) -> Source:
    """One split of the set at `root`: COCO JSON, else YOLO (`data.yaml`), else Pascal VOC (XML files).

    Raises `UserError` where there is no such split.
    """
    from .voc import find_voc
    from .yolo import find_listed, find_yaml, find_yolo

    refuse_unreadable(root)
    if root.is_file() and (yaml := find_yaml(root)):
        return find_yolo(yaml, split)
    failure: UserError | None = None
    try:
        file = find_annotations(root, split, data)
        # A folder's only JSON file may be anything where the set is plainly in another format.
        certain = given_annotations(split, data) or file == root or file.name == ROBOFLOW
        if certain or file.stem.startswith("instances_"):
            return CocoSource(file, root, split, data)
    except UserError as error:
        if given_annotations(split, data) or not root.is_dir():
            raise
        file, failure = root, error
    if (yaml := find_yaml(root)) is not None:
        return find_yolo(yaml, split)
    if (voc := find_voc(root, split, (data.train_split, data.val_split, "test"))) is not None:
        return voc
    if (listed := find_listed(root, split)) is not None:
        return listed
    if failure is None and is_other_json(file):
        failure = UserError(f"{root}: no '{split}' split; {file.name} has no list 'images'; give COCO JSON")
    if failure is not None:
        raise _nearly_a_set(root, split) or failure
    return CocoSource(file, root, split, data)


def _nearly_a_set(root: Path, split: str) -> UserError | None:
    """What is missing where a folder has YOLO's or VOC's files, but not their layout."""
    from .yolo import CLASSES

    if names_other_split(root / "x", split):
        return UserError(
            f"{root}: no '{split}' split; its name says that it is another one; give the folder that holds both, or "
            "rename it"
        )
    if classes := next((name for name in CLASSES if (root / name).is_file()), None):
        places = " or ".join(str(root / place) for place in (f"images/{split}", f"{split}/images"))
        return UserError(f"{root}: no '{split}' split; {classes} is there, but no images in {places}; put them there")
    folders = [root, *(root / name for name in split_aliases(split))]
    for folder in (folder / "labels" for folder in folders):
        if any(folder.rglob("*.txt")):
            return UserError(
                f"{root}: no '{split}' split; {folder} has YOLO's label files, but data.yaml is missing; write one in "
                f"{root} with 'train' and 'val', a folder or a list of images each, and 'names', the classes, or list "
                f"the classes in classes.txt, a name a line"
            )
    for folder in (folder / name for folder in folders for name in ("annotations", "Annotations")):
        if any(folder.glob("*.xml")):
            return UserError(
                f"{root}: no '{split}' split; {folder} has Pascal VOC's XML files, but the set is in neither of its "
                f"layouts; name the folders images and annotations and put both into {split}/ or list the images in "
                f"ImageSets/Main/{split}.txt, or put images and XML files together in {split}/"
            )
    return None
