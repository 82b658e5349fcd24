"""What the formats share whose objects name their class instead of a category id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..structures import Category
from ..utils.errors import UserError
from .issues import Issue
from .source import AnnotationCache, ParsedAnnotations, Source, category_ids_by_name, coco_dict


@dataclass(frozen=True)
class NamedSource(Source):
    """One split in a format whose objects name their class; see `Source`. A subclass only parses.

    Category ids are numbers from 1 in the order of the names, or those of the model's classes with these names.

    Attributes:
        others: The dataset's other splits; these formats have no list of classes, so theirs are listed too.
    """

    others: tuple[NamedSource, ...] = field(default=(), compare=False, kw_only=True)

    def to_coco(
        self, parsed: ParsedAnnotations, categories: Sequence[Category] | None, cache: AnnotationCache
    ) -> dict[str, Any]:
        """Return the COCO dict; without `categories`, it lists the classes of all splits."""
        names = {item["class"] for item in parsed.content["objects"]}
        if categories is None:
            names.update(*({item["class"] for item in other} for other in self.objects_of_others(cache)))
        if not names and categories is None:
            if any(issue.objects for issue in parsed.issues):
                raise UserError(f"{self.file}: none of its objects can be read; see the other errors of this dataset")
            hint = "label some first (mask images are not read)"
            raise UserError(f"{self.file}: none of its files has an object, so there is no class; {hint}")
        ordered = sorted(names, key=_by_number)
        ids = dict(zip(ordered, category_ids_by_name(ordered, categories, first=1), strict=True))
        listed = [{"id": ids[name], "name": name} for name in ordered]
        listed += [{"id": c.id, "name": c.name} for c in categories or () if c.name not in ids]
        return coco_dict(parsed, ids, listed)

    def objects_of_others(self, cache: AnnotationCache) -> list[list[dict[str, Any]]]:
        """Return the objects of each other split; their issues are reported when that split itself is read."""
        objects = []
        for source in self.others:
            try:
                objects.append(cache.parse(source).content["objects"])
            except UserError:
                objects.append([])
        return objects


def with_others(sources: Sequence[NamedSource | None]) -> NamedSource | None:
    """Return the first source, with the other splits in it; None if there is no first."""
    first, *rest = sources
    if first is None:
        return None
    others = {other.file: other for other in rest if other is not None and other.file != first.file}
    return replace(first, others=tuple(others.values()))


def _by_number(name: str) -> tuple[bool, int, str]:
    """Sort classes that are named by numbers as numbers."""
    number = name.isascii() and name.isdigit()
    return (not number, int(name) if number else 0, name)


def rotated_extent(bbox: Sequence[float], degrees: float) -> list[float]:
    """Return the xywh extent of an xywh box that is rotated about its center."""
    x, y, w, h = bbox
    if not degrees:
        return list(bbox)  # corners in another order keep their sign
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = abs(w) * cos + abs(h) * sin, abs(w) * sin + abs(h) * cos
    return [x + (w - width) / 2, y + (h - height) / 2, width, height]


def rotated_boxes(count: int, file: Path) -> Issue:
    """Return the issue of a file with rotated boxes."""
    return Issue(
        "box-rotated", file, "", f"has {count} rotated box{'es' * (count > 1)}: the upright box around each is used"
    )
