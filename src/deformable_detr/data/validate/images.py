"""Checks of the image files: present, readable, of the declared size, and in one split only."""

import hashlib
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...utils.errors import UserError
from ...utils.images import TRANSPOSED_ORIENTATIONS, read_header, read_image
from ..problems import Problem
from .annotations import ImageRecord, Split
from .issues import Issues

Depth = Literal["auto", "full"]
# With depth "auto": the most images to decode, and the most seconds for the headers and for decoding.
AUTO_IMAGES = 2000
AUTO_SECONDS = 20.0
DIM_VALUE = 4096  # medical and industrial cameras write 12-bit values into 16 bits
CHUNK = 64  # images between two checks of the time

Task = tuple[Split, ImageRecord]


@dataclass
class Coverage:
    """How many images there are, how many headers were read, and how many images were decoded."""

    images: int = 0
    headers: int = 0
    decoded: int = 0


def check_images(splits: Sequence[Split], depth: Depth, issues: Issues, progress: bool = False) -> Coverage:
    """Read the image files, complete the image records, and add the issues of the files."""
    tasks = [(split, record) for split in splits for record in split.image_records if not record.missing]
    coverage = Coverage(images=sum(len(split.image_records) for split in splits))
    seconds = AUTO_SECONDS if depth == "auto" else None
    selected = tasks if depth == "full" else _spread(tasks, AUTO_IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about files that it can read, or that become issues
        for task, error in _run(tasks, _read_header, seconds, progress, "headers"):
            coverage.headers += 1
            _report_unreadable(task, error, issues)
        readable = [task for task in selected if not task[1].broken]
        for task, error in _run(readable, _decode, seconds, progress, "images"):
            coverage.decoded += 1
            _report_unreadable(task, error, issues)
            if dim := task[1].dim:
                message = f"has 16 bits, but its values are at most {dim} of 65535, so it is almost black"
                issues.add("image-dim", task[1].path, "", message, **_locate(*task))
    for task in tasks:
        _check_size(*task, issues)
    _check_copies(tasks, issues)
    for split in splits:
        if split.unlisted:
            names = ", ".join(split.unlisted[:3]) + (", …" if len(split.unlisted) > 3 else "")
            message = f"has no record of {len(split.unlisted)} images in {split.folder}: {names}"
            issues.add("images-unlisted", split.file, "", message, split=split.name)
    return coverage


def _run(
    tasks: Sequence[Task], work: Callable[[ImageRecord], None], seconds: float | None, progress: bool, unit: str
) -> Iterator[tuple[Task, UserError | None]]:
    """Yield each task with its error, in order, until the time is over; decoders release the GIL."""
    from tqdm import tqdm

    def attempt(task: Task) -> UserError | None:
        try:
            work(task[1])
        except UserError as error:
            return error
        return None

    end = None if seconds is None else time.monotonic() + seconds
    rest = iter(tasks)
    bar = tqdm(total=len(tasks), unit="image", desc=f"check {unit}", disable=None if progress else True, leave=False)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, bar:
        while chunk := list(islice(rest, CHUNK)):
            yield from zip(chunk, pool.map(attempt, chunk), strict=True)
            bar.update(len(chunk))
            if end is not None and time.monotonic() > end:
                return


def _read_header(record: ImageRecord) -> None:
    record.size, record.orientation = read_header(record.path)


def _decode(record: ImageRecord) -> None:
    pixels = read_image(record.path)
    if int(pixels.max()) <= DIM_VALUE // 256:
        record.dim = _dim_value(record.path)
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.numpy().data)
    record.digest = digest.digest()


def _dim_value(path: Path) -> int:
    """Return the highest value of a 16-bit gray image that uses at most 12 bits; 0 for other images."""
    with Image.open(path) as image:
        highest = int(np.asarray(image).max()) if image.mode.startswith("I") else 0
    return highest if 0 < highest < DIM_VALUE else 0


def _report_unreadable(task: Task, error: UserError | None, issues: Issues) -> None:
    if error is not None:
        split, record = task
        record.broken = True
        problem = Problem.from_error("image-unreadable", record.path, error)
        issues.add(problem.code, record.path, "", problem.message, problem.hint, **_locate(split, record))


def _check_size(split: Split, record: ImageRecord, issues: Issues) -> None:
    if record.size is None or record.declared is None or record.size == record.declared:
        return
    (height, width), (declared_height, declared_width) = record.size, record.declared
    name = f"images[{record.position}] ({record.name!r})"
    message = f"is {declared_width} × {declared_height} in its record, but {width} × {height} "
    if record.orientation in TRANSPOSED_ORIENTATIONS and record.declared == record.size[::-1]:
        message += "after the EXIF rotation"
        issues.add("image-rotated", split.file, name, message, **_locate(split, record))
    else:
        issues.add("image-size", split.file, name, f"{message}pixels in the file", **_locate(split, record))


def _check_copies(tasks: Sequence[Task], issues: Issues) -> None:
    """Find files with the same bytes, by size and checksum, and images with the same pixels, if decoded."""
    by_size: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        try:
            by_size[os.stat(task[1].path).st_size].append(task)
        except OSError:
            continue  # reported as missing or unreadable
    groups: dict[tuple[str, bytes], list[Task]] = defaultdict(list)
    for group in by_size.values():
        for task in group if len(group) > 1 else ():
            if (digest := _file_digest(task[1].path)) is not None:
                groups["bytes", digest].append(task)
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
        issues.add(code, record.path, name, message, **_locate(split, record), other=other.path)


def _file_digest(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def _locate(split: Split, record: ImageRecord) -> dict[str, Any]:
    return {"split": split.name, "section": "images", "position": record.position, "image": record.path}


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """Return at most `count` tasks, evenly spread, in an order that covers the whole dataset early."""
    selected = tasks[:: max(1, -(-len(tasks) // count))]
    return [task for start in range(8) for task in selected[start::8]]
