"""The image files of the splits: is each there, whole, of the size that its record says, and in one split only?"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ...utils.errors import UserError
from ...utils.images import TRANSPOSED_ORIENTATIONS, read_header, read_image
from .annotations import ImageRecord, Split
from .issues import Findings

Depth = Literal["auto", "full"]
# What `auto` looks at: every header and so many whole images, spread over the set, each for so many seconds at most.
AUTO_IMAGES = 2000
AUTO_SECONDS = 20.0
DIM = 4096  # values of 12 bits, as medical and industrial cameras write them into 16
CHUNK = 64  # images between two looks at the clock

Task = tuple[Split, ImageRecord]


@dataclass
class Coverage:
    """How many images there are, of how many the header was read, and how many were decoded as a whole."""

    images: int = 0
    headers: int = 0
    decoded: int = 0


def check_pictures(splits: Sequence[Split], depth: Depth, found: Findings, progress: bool = False) -> Coverage:
    """Fills in what the files say about the pictures, and adds what is wrong with them."""
    tasks = [(split, picture) for split in splits for picture in split.pictures if not picture.missing]
    coverage = Coverage(images=sum(len(split.pictures) for split in splits))
    seconds = AUTO_SECONDS if depth == "auto" else None
    whole = tasks if depth == "full" else _spread(tasks, AUTO_IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on files that are reported here or that it reads all the same
        for (split, picture), (error, _) in _each(tasks, _look, seconds, progress, "headers"):
            coverage.headers += 1
            if error is not None:
                _unreadable(split, picture, error, found)
        good = [task for task in whole if not task[1].broken]
        for (split, picture), (error, digest) in _each(good, _decode, seconds, progress, "images"):
            coverage.decoded += 1
            picture.digest = digest
            if picture.dim:
                what = f"has 16 bits, but values up to {picture.dim} of 65535 only: it is read almost black"
                found.add("image-dim", picture.path, "", what, split=split.name, section="images",
                          position=picture.position, image=picture.path)  # fmt: skip
            if error is not None:
                _unreadable(split, picture, error, found)
    for split, picture in tasks:
        _compare_size(split, picture, found)
    _find_copies(tasks, found)
    for split in splits:
        if split.unlisted:
            names = ", ".join(split.unlisted[:3]) + (", …" if len(split.unlisted) > 3 else "")
            what = f"has no record of {len(split.unlisted)} images in {split.folder}: {names}"
            found.add("images-unlisted", split.file, "", what, split=split.name)
    return coverage


def _each(
    tasks: Sequence[Task],
    work: Callable[[ImageRecord], tuple[str | None, bytes | None]],
    seconds: float | None,
    progress: bool,
    unit: str,
) -> Iterator[tuple[Task, tuple[str | None, bytes | None]]]:
    """Each task with its result, in order, until the time is over; decoders let several threads work at once."""
    from tqdm import tqdm

    end = None if seconds is None else time.monotonic() + seconds
    rest = iter(tasks)
    bar = tqdm(total=len(tasks), unit="image", desc=f"check {unit}", disable=None if progress else True, leave=False)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, bar:
        while chunk := list(islice(rest, CHUNK)):
            yield from zip(chunk, pool.map(work, (picture for _, picture in chunk)), strict=True)
            bar.update(len(chunk))
            if end is not None and time.monotonic() > end:
                return


def _look(picture: ImageRecord) -> tuple[str | None, bytes | None]:
    try:
        picture.size, picture.orientation = read_header(picture.path)
    except UserError as error:
        return str(error), None
    return None, None


def _decode(picture: ImageRecord) -> tuple[str | None, bytes | None]:
    """What is wrong with the file, or the digest of its upright RGB pixels."""
    try:
        pixels = read_image(picture.path)
    except UserError as error:
        return str(error), None
    if int(pixels.max()) <= DIM // 256:
        picture.dim = _dim(picture.path)
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.numpy().data)
    return None, digest.digest()


def _dim(path: Path) -> int:
    """The highest value of a gray picture of 16 bits that uses 12 of them or fewer; 0 for all others."""
    with Image.open(path) as image:
        highest = int(np.asarray(image).max()) if image.mode.startswith("I") else 0
    return highest if 0 < highest < DIM else 0


def _unreadable(split: Split, picture: ImageRecord, error: str, found: Findings) -> None:
    picture.broken = True
    what, _, mend = error.removeprefix(f"{picture.path}: ").rpartition("; ")
    found.add(
        "image-unreadable", picture.path, "", what or mend, mend if what else "",
        split=split.name, section="images", position=picture.position, image=picture.path,
    )  # fmt: skip


def _compare_size(split: Split, picture: ImageRecord, found: Findings) -> None:
    if picture.size is None or picture.declared is None or picture.size == picture.declared:
        return
    (height, width), (own_height, own_width) = picture.size, picture.declared
    place = {"split": split.name, "section": "images", "position": picture.position, "image": picture.path}
    record = f"images[{picture.position}] ({picture.name!r})"
    if picture.orientation in TRANSPOSED_ORIENTATIONS and picture.declared == picture.size[::-1]:
        what = f"is {own_width} × {own_height} in its record, but {width} × {height} once turned upright as EXIF says"
        found.add("image-rotated", split.file, record, what, **place)
    else:
        what = f"is {own_width} × {own_height} in its record, but {width} × {height} pixels in the file"
        found.add("image-size", split.file, record, what, **place)


def _find_copies(tasks: Sequence[Task], found: Findings) -> None:
    """Files with the same bytes, by size and then checksum; and pictures with the same pixels, where decoded."""
    sizes: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        try:
            sizes[os.stat(task[1].path).st_size].append(task)
        except OSError:
            continue  # reported as missing or unreadable
    same: dict[tuple[str, bytes], list[Task]] = defaultdict(list)
    for group in sizes.values():
        if len(group) > 1:
            for task in group:
                if (digest := _file_digest(task[1].path)) is not None:
                    same["bytes", digest].append(task)
    for task in tasks:
        if task[1].digest is not None:
            same["pixels", task[1].digest].append(task)
    told: set[tuple[str, int]] = set()
    for (kind, _), group in same.items():
        _tell_copies(kind, group, told, found)


def _tell_copies(kind: str, group: list[Task], told: set[tuple[str, int]], found: Findings) -> None:
    """A finding for each picture that is also in a later split, or that is a copy of an earlier one of its own."""
    order = list(dict.fromkeys(split.name for split, _ in group))  # training comes first
    for place, (split, picture) in enumerate(group):
        later = [task for task in group if order.index(task[0].name) > order.index(split.name)]
        earlier = [task for task in group[:place] if task[0] is split and task[1].path != picture.path]
        key = (split.name, picture.position)
        if key in told or not (later or earlier):
            continue
        told.add(key)
        other_split, other = (later or earlier)[0]
        what = f"holds the same {kind} as {other.path} (of {other_split.name}, images[{other.position}])"
        found.add(
            "leak" if later else "image-copy", picture.path, f"(of {split.name}, images[{picture.position}])", what,
            split=split.name, section="images", position=picture.position, image=picture.path, other=other.path,
        )  # fmt: skip


def _file_digest(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """At most `count` of them, evenly spread, in an order that covers the whole set early."""
    step = max(1, -(-len(tasks) // count))
    chosen = tasks[::step]
    order: Iterable[Task] = (task for start in range(8) for task in chosen[start::8])
    return list(order)
