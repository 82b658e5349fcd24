"""Checks of the image files: present, readable, of the declared size, and in one split only."""

import hashlib
import json
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ...utils.errors import UserError
from ...utils.files import open_regular, read_regular
from ...utils.images import TRANSPOSED_ORIENTATIONS, read_header, read_image
from ...utils.progress import progress_bar
from ..discovery import other_annotations
from ..issues import Issue, Issues
from ..records import ImageRecord
from .annotations import Split

Depth = Literal["auto", "full"]
# With depth "auto": the most images to decode, and the most seconds for the headers and for decoding.
AUTO_IMAGES = 2000
AUTO_SECONDS = 20.0
DIM_LEVEL = 16  # of 255: medical and industrial cameras, and satellites, write 12-bit values into 16 bits
CHUNK = 64  # images between two checks of the time

Task = tuple[Split, ImageRecord]


@dataclass(frozen=True)
class Coverage:
    """How many images there are, how many headers were read, and how many images were decoded."""

    images: int
    headers: int
    decoded: int


def check_images(splits: Sequence[Split], depth: Depth, issues: Issues, progress: bool = False) -> Coverage:
    """Read the image files, complete the image records, and add the issues of the files."""
    tasks = [(split, record) for split in splits for record in split.images if not record.missing]
    seconds = AUTO_SECONDS if depth == "auto" else math.inf
    selected = tasks if depth == "full" else _spread(tasks, AUTO_IMAGES)
    with warnings.catch_warnings(action="ignore"):  # Pillow warns about files that it can read, or that become issues
        headers = _run(tasks, _read_header, seconds, progress, "headers", issues)
        readable = [task for task in selected if not task[1].broken]
        decoded = _run(readable, _decode, seconds, progress, "images", issues)
    for split, record in tasks:
        _check_pixels(split, record, issues)
    _check_copies(tasks, issues)
    listed = {record.path for split in splits for record in split.images}
    for split in splits:
        if unlisted := [name for name in split.folder.unlisted if split.folder.path / name not in listed]:
            names = ", ".join(unlisted[:3]) + (", …" if len(unlisted) > 3 else "")
            message = f"has no record of {len(unlisted)} images in {split.folder.path}: {names}"
            issues.add("images-unlisted", split.file, "", message, split=split.name)
            _check_other_annotations(split, set(unlisted), issues)
    return Coverage(sum(len(split.images) for split in splits), headers, decoded)


def _check_other_annotations(split: Split, unlisted: set[str], issues: Issues) -> None:
    """Find COCO JSON files beside the one that is read, with objects of images that it does not list."""
    for path in other_annotations(split.file, split.name) if split.source.format == "coco" else ():
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            content = json.loads(read_regular(path))
            ids = {record["id"] for record in content["images"] if os.path.basename(record["file_name"]) in unlisted}
            count = sum(record["image_id"] in ids for record in content["annotations"])
            if count:
                message = f"is not read, but has {count} objects of {len(ids)} images that {split.file.name} lacks"
                issues.add("annotations-unread", path, "", message, split=split.name, objects=count)


def _run(
    tasks: list[Task], work: Callable[[ImageRecord], None], seconds: float, progress: bool, unit: str, issues: Issues
) -> int:
    """Do the work in threads until the time is over; return the number of images. Decoders release the GIL."""

    def attempt(task: Task) -> UserError | None:
        try:
            work(task[1])
        except UserError as error:
            return error
        return None

    reported = {issue.file for issue in issues if issue.code == "image-unreadable"}  # by the reader of the labels
    end = time.monotonic() + seconds
    bar = progress_bar(len(tasks), "images", f"check {unit}", progress, keep=False)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, bar:
        for start in range(0, len(tasks), CHUNK):
            chunk = tasks[start : start + CHUNK]
            for (split, record), error in zip(chunk, pool.map(attempt, chunk), strict=True):
                if error is not None:
                    record.broken = True
                    if record.path in reported:
                        continue
                    location = split.locate_image(record)
                    issues.append(Issue.from_error("image-unreadable", record.path, error, **location))
            bar.update(len(chunk))
            if time.monotonic() > end:
                return start + len(chunk)
    return len(tasks)


def _read_header(record: ImageRecord) -> None:
    record.size, record.orientation, record.bits = read_header(record.path)


def _decode(record: ImageRecord) -> None:
    pixels = read_image(record.path)
    record.brightest = int(pixels.max())
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.numpy().data)
    record.digest = digest.digest()


def _check_pixels(split: Split, record: ImageRecord, issues: Issues) -> None:
    if record.bits == 16 and record.brightest is not None and record.brightest <= DIM_LEVEL:
        message = f"has 16 bits, but its brightest pixel has the level {record.brightest} of 255, so it is almost black"
        issues.add("image-dim", record.path, "", message, **split.locate_image(record))
    if record.size is None or record.declared is None or record.size == record.declared:
        return
    (height, width), (declared_height, declared_width) = record.size, record.declared
    name = f"images[{record.position}] ({record.name!r})"
    message = f"is {declared_width} × {declared_height} in its record, but {width} × {height} "
    if record.orientation in TRANSPOSED_ORIENTATIONS and record.declared == record.size[::-1]:
        message += "after the EXIF rotation"
        issues.add("image-rotated", split.file, name, message, **split.locate_image(record))
    else:
        issues.add("image-size", split.file, name, f"{message}pixels in the file", **split.locate_image(record))


def _check_copies(tasks: Sequence[Task], issues: Issues) -> None:
    """Find files with the same bytes, by size and checksum, and images with the same pixels, if decoded."""
    by_size: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        with suppress(OSError):  # reported as missing or unreadable
            by_size[os.stat(task[1].path).st_size].append(task)
    groups: dict[tuple[str, bytes], list[Task]] = defaultdict(list)
    for group in by_size.values():
        for task in group if len(group) > 1 else ():
            with suppress(OSError), open_regular(task[1].path) as file:
                groups["bytes", hashlib.file_digest(file, "blake2b").digest()].append(task)
    for task in tasks:
        if task[1].digest is not None:
            groups["pixels", task[1].digest].append(task)
    reported: set[tuple[str, int]] = set()
    for (content, _), group in groups.items():
        _report_copies(content, group, reported, issues)


def _report_copies(content: str, group: list[Task], reported: set[tuple[str, int]], issues: Issues) -> None:
    """Add an issue per image that is also in a later split, or that copies an earlier image of its split."""
    order = list(dict.fromkeys(split.name for split, _ in group))  # the training split comes first
    for index, (split, record) in enumerate(group):
        later = [task for task in group if order.index(task[0].name) > order.index(split.name)]
        earlier = [task for task in group[:index] if task[0] is split and task[1].path != record.path]
        if (split.name, record.position) in reported or not (later or earlier):
            continue
        reported.add((split.name, record.position))
        other_split, other = (later or earlier)[0]
        name = f"(of {split.name}, images[{record.position}])"
        message = f"holds the same {content} as {other.path} (of {other_split.name}, images[{other.position}])"
        code = "leak" if later else "image-copy"
        issues.add(code, record.path, name, message, **split.locate_image(record), other=other.path)


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """Return at most `count` tasks, evenly spread, in an order that covers the whole dataset early."""
    selected = tasks[:: max(1, -(-len(tasks) // count))]
    return [task for start in range(8) for task in selected[start::8]]
