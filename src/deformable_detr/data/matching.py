"""Match file names that differ in spelling: separators, capitals, accents, suffixes, folders, and hashes of tools."""

import difflib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
UNREAD_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".nef", ".nii"}
    | {".orf", ".pef", ".psd", ".raf", ".rw2", ".srw", ".svg"}
)
MAX_DEPTH = 3  # folders above the file that paths are compared by
MAX_COMPARED = 2000  # names that the nearest one is searched among

_ENDS = " \t\r\n\"'"  # that do not count at the ends of a name
_FILE_SUFFIXES = IMAGE_SUFFIXES | UNREAD_SUFFIXES | {".txt", ".xml", ".json"}
# Blocks of hexadecimal digits, one with a decimal digit, that tools add: 3fa81c02-photo, photo_7436, photo.rf.1c02af.
# Label Studio's prefix of eight may lack one.
_HASH = r"(?=[0-9a-f-]*[0-9])[0-9a-f]{4,}(?:-[0-9a-f]{4,})*"
_PREFIX = re.compile(rf"^(?:{_HASH}[-_]+|[0-9a-f]{{8}}-)(?=.)")
_SUFFIX = re.compile(rf"(?:[._](?:jpe?g|png|webp|bmp))?(?:\.rf\.[0-9a-z]+|[-_]+{_HASH})$")


def match_names(names: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Map each name to the file that it likely means.

    Compared in this order: whole paths, their last folders, file names; each with and without suffixes; file names
    without a hash at either end; and without punctuation, or with their folders. Separators, quotes, the query of a
    URL, spaces at the ends, capitals and Unicode forms do not count. A pair counts only if neither the name nor the
    file has another partner at its level.
    """
    open_names, open_files = set(names), set(files)
    matches: dict[str, str] = {}
    for name_key, file_key in _KEYS:
        if not open_names or not open_files:
            break
        groups: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for side, key, texts in ((0, name_key, open_names), (1, file_key, open_files)):
            for text in texts:
                groups[key(text)][side].append(text)
        groups.pop("", None)
        pairs = {own[0]: other[0] for own, other in groups.values() if len(own) == len(other) == 1}
        if name_key is not file_key and not any(map(_differ_by_letters, pairs.items())):
            continue  # only decimal numbers differ: these may be counters instead of hashes
        matches |= pairs
        open_names -= pairs.keys()
        open_files -= set(pairs.values())
    return matches


def nearest_name(name: str, candidates: Collection[str]) -> str:
    """Return the most similar candidate, '' if none is similar or there are too many to compare."""
    if len(candidates) > MAX_COMPARED:
        return ""
    keys = {_stem(candidate): candidate for candidate in candidates}
    similar = difflib.get_close_matches(_stem(name), keys, n=1, cutoff=0.5)
    return keys[similar[0]] if similar else ""


def url_path(name: str, parts: int) -> str:
    """Return the last parts of the path of an address such as gs://… or http://…; other names as they are."""
    return "/".join(unquote(urlsplit(name).path).split("/")[-parts:]) if "://" in name else name


def existing_tail(path: str, folders: Iterable[str | os.PathLike[str]]) -> str | None:
    """Find what a path of another machine means here: the longest end of it that exists in one of the folders."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    candidates = (os.path.join(folder, *parts[start:]) for start in range(len(parts)) for folder in folders)
    return next((candidate for candidate in candidates if os.path.exists(candidate)), None)


def _tail(path: str, depth: int) -> str:
    """Return the last `depth` parts of a path in one spelling."""
    head, _, query = path.partition("?")
    path = head if query and os.path.splitext(head.lower())[1] in IMAGE_SUFFIXES else path
    parts = unquote(path).replace("\\", "/").split("/")
    text = "/".join(parts[-depth:]).strip(_ENDS)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _without_suffixes(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return _without_suffixes(stem.rstrip()) if stem and suffix in _FILE_SUFFIXES else path


def _stem(path: str) -> str:
    return _without_suffixes(_tail(path, 1))


def _without_prefix(path: str) -> str:
    return _PREFIX.sub("", _stem(path), count=1)


def _without_hash(path: str) -> str:
    return _SUFFIX.sub("", _stem(path), count=1)


def _plain(text: str) -> str:
    """Return a name without the characters that tools replace: my photo (1), my-photo-1, my_photo_1. Signs stay."""
    return re.sub(r"[\s!-/:-@\[-`{-~]+", "-", re.sub(r"(?<![^\W_])-(?=\d)", "−", text)).strip("-")


def _plain_stem(path: str) -> str:
    return _plain(_stem(path))


def _differ_by_letters(pair: tuple[str, str]) -> bool:
    short, long = sorted(map(_plain_stem, pair), key=len)
    return re.search("[a-z]", long.replace(short, "", 1)) is not None


def _tail_key(depth: int, suffixes: bool) -> Callable[[str], str]:
    return lambda path: _tail(path, depth) if suffixes else _without_suffixes(_tail(path, depth))


_DEPTHS = (99, *range(MAX_DEPTH, 0, -1))
# The keys of a name and of a file at each level.
_KEYS = [(key, key) for depth in _DEPTHS for key in (_tail_key(depth, True), _tail_key(depth, False))]
_KEYS += [(_plain_stem, _plain_stem)]
for _key in (_without_prefix, _without_hash, _tail_key(3, False), _tail_key(2, False)):  # cam1/7.jpg: cam1_7.txt
    _plain_key = partial(lambda key, path: _plain(key(path)), _key)
    _KEYS += [(_plain_key, _plain_stem), (_plain_stem, _plain_key)]
