"""The records of a split for the checks: unusable records become issues, the others arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...structures import Category
from ...utils.errors import UserError
from ..issues import Issue, Issues
from ..records import ImageRecord, Records, read_records
from ..source import AnnotationCache, Source, remap_category_ids


@dataclass
class Split(Records):
    """The usable records of one split.

    Attributes:
        name: 'train', 'val', …
        remapped: Category ids of the file → those of the training split, if names decide.
    """

    name: str
    remapped: dict[int, int] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The file that identifies the split."""
        return self.source.file

    def locate(self, index: int) -> dict[str, Any]:
        """Return the arguments of `Issues.add` that locate and show an object."""
        image = self.images[self.image_indices[index]]
        box = tuple(self.boxes[index].tolist())
        return self.locate_image(image) | {"section": "annotations", "position": int(self.positions[index]), "box": box}

    def locate_image(self, image: ImageRecord) -> dict[str, Any]:
        """Return the arguments of `Issues.add` that locate and show an image."""
        return {"split": self.name, "section": "images", "position": image.position, "image": image.path}


def read_split(
    source: Source, name: str, categories: Sequence[Category] | None, issues: Issues, cache: AnnotationCache
) -> Split | None:
    """Read the usable records of a split and add their issues; None if the file cannot be read.

    `categories` are those of the training split; see `Source.read`.
    """

    def collect(issue: Issue) -> None:
        issues.append(replace(issue, split=name))

    def collect_from_reader(issue: Issue) -> None:
        if issue.code != "image-unreadable" or issue.objects:  # all images are checked later
            collect(issue)

    try:
        content = source.read(categories, collect_from_reader, cache)
    except UserError as error:
        collect(Issue.from_error("file-unreadable", source.file, error))
        return None
    split = Split(**vars(read_records(content, source, collect)), name=name)
    split.remapped = remap_category_ids(split.category_list, categories or (), set(split.category_ids.tolist()))
    if new_ids := split.remapped:
        first = next(number for number, other in new_ids.items() if number != other)
        message = (
            f"lists the training set's classes under other ids, such as {split.categories[first]!r} {first} instead "
            f"of {new_ids[first]}: names decide"
        )
        issues.add("category-renumbered", split.file, "", message, split=name)
        split.categories = {new_ids[number]: name for number, name in split.categories.items() if number in new_ids}
        split.category_ids = np.array([new_ids[number] for number in split.category_ids.tolist()], dtype=np.int64)
    return split
