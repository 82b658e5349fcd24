"""Find the annotation file of a split and the folder of its images."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import NoReturn

from ..config.schema import DataConfig
from ..utils.errors import UserError
from ..utils.files import open_regular
from .matching import IMAGE_SUFFIXES, UNREAD_SUFFIXES, match_names

SPLIT_ALIASES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
ROBOFLOW = "_annotations.coco.json"
DEFAULT = "instances_default.json"  # CVAT's and Datumaro's name for a dataset without splits
HEAD = 4096  # bytes of a file that decide its format
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin"}
OTHER_COCO = (".", "captions_", "panoptic_", "image_info_", "stuff_")  # start of COCO files without boxes of objects
LABEL_FOLDERS = ("annotations", "annotation", "labels", "label", "json", "jsons", "xml")

Listing = Callable[[Path], frozenset[str]]


@dataclass(frozen=True)
class ImageFolder:
    """Where the images of a split are.

    Attributes:
        path: The folder that file names are relative to.
        missing: File names without a file → a file that is likely meant, or ''.
        unlisted: Images in the folder that no record names.
        searched: Folders that were searched.
        option: The setting that names the folder, if the split has one.
        hint: What to do about missing files, if more is known.
    """

    path: Path
    missing: dict[str, str] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    searched: tuple[Path, ...] = ()
    option: str = ""
    hint: str = ""


def is_hidden(path: str | PurePath) -> bool:
    """Return whether a path relative to the dataset is one of editors and systems: with a dot, or __MACOSX."""
    parts = PurePath(path).parts
    return any((part.startswith(".") and part != "..") or part.lower() in SYSTEM_FOLDERS for part in parts)


def is_image(path: str | PurePath) -> bool:
    """Return whether a path relative to the dataset has the suffix of an image and is not hidden."""
    return PurePath(path).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)


def is_unread_image(path: str | PurePath) -> bool:
    """Return whether a path relative to the dataset has the suffix of an image format that is not read."""
    return PurePath(path).suffix.lower() in UNREAD_SUFFIXES and not is_hidden(path)


def describe_unread(names: Sequence[str]) -> str:
    """Return one line about files in formats that are not read."""
    text = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"left out {files} in formats that are not read ({text}); convert to JPEG or PNG"


def find_annotations(root: Path, split: str, data: DataConfig) -> Path:
    """Find the COCO JSON file of one split.

    Searched in this order: `data.annotations` (`data.val_annotations` for the validation split); `root` itself if it
    is a JSON file; `<split>/_annotations.coco.json`; `annotations/instances_*.json` or `<split>.json` with the split's
    name; `_annotations.coco.json` in `root`, or in a folder with the split's name in capitals;
    `annotations/instances_default.json`, or the only file there. `val`, `valid` and `validation` are the same split,
    and likewise `train`/`training` and `test`/`testing`. A file or folder that names no split matches any split. The
    only JSON file of a folder counts as its `_annotations.coco.json`.

    Raises:
        UserError: There is no such split, or several files may be it.
    """
    if not root.exists():
        raise UserError(f"{root}: no such dataset; give its folder or its COCO JSON file")
    option, images_option = _options(split, data)
    configured = getattr(data, option) if option else None
    if configured is not None:
        return _configured_path(root, configured, f"data.{option}")
    if option and getattr(data, images_option) is not None:
        raise UserError(f"data.{images_option} is set without data.{option}; set both")

    hint = f"; or set data.{images_option} and data.{option}" if option else ""
    if root.is_file():
        if names_other_split(root, split):
            raise UserError(
                f"{root} is not the '{split}' split by its name; give the folder with both, or another split{hint}"
            )
        return root
    path = _named_annotations(root, split, hint) or _unnamed_annotations(root, split)
    if path is None:
        names = split_aliases(split)
        raise UserError(
            f"{root}: no '{split}' split; searched {'|'.join(names)}/{ROBOFLOW}, "
            f"annotations/instances_{names[0]}*.json, {ROBOFLOW}, data.yaml, classes.txt and Annotations; "
            f"rename your files{hint}"
        )
    return path


def _named_annotations(root: Path, split: str, hint: str) -> Path | None:
    """Find the annotation file whose path names the split."""
    names = split_aliases(split)
    for folder in (root / name / inside for name in names for inside in ("", "annotations")):
        if path := _annotations_in(folder):
            return path
    for folder in (root / "annotations", root):
        matches = sorted(path for path in folder.glob("instances_*.json") if names_split(path.stem, names))
        matches = matches or [path for name in names if (path := folder / f"{name}.json").is_file()]
        # person_keypoints_train2017.json, lvis_v1_train.json
        others = (path for path in folder.glob("*.json") if not path.stem.startswith(OTHER_COCO))
        matches = matches or sorted(path for path in others if names_split(path.stem, names))
        if len(matches) > 1:
            files = ", ".join(path.name for path in matches)
            raise UserError(f"{folder}: several files may be the '{split}' split: {files}; merge or keep one{hint}")
        if matches:
            return matches[0]
    return None


def _unnamed_annotations(root: Path, split: str) -> Path | None:
    """Find an annotation file that names no split, or a split folder in capitals."""
    if (path := _annotations_in(root)) and not names_other_split(path, split):
        return path
    for name in sorted(_listing(root)):
        if name.lower() in split_aliases(split) and (path := _annotations_in(root / name)):
            return path
    path = _annotations_in(root / "annotations")
    named = path and path.stem.startswith("instances_") and path.name != DEFAULT
    if path and not named and not names_other_split(path, split):
        return path
    return None


def label_file(folder: Path, stem: str, suffix: str) -> Path:
    """Return `folder/stem.suffix`, or the file with the suffix in capitals if only that one exists."""
    path = folder / f"{stem}.{suffix}"
    upper = path.with_name(f"{stem}.{suffix.upper()}")
    return upper if not os.path.lexists(path) and os.path.lexists(upper) else path


def find_image_folder(annotations: Path, root: Path, split: str, data: DataConfig, names: Sequence[str]) -> ImageFolder:
    """Find the folder that the file names of an annotation file are relative to.

    That is `data.images` (`data.val_images`) if set. Otherwise it is the one with the most images among the file's own
    folder and `images`, `images/<split>`, `<split>` in it or beside `annotations/`. Folders are listed; no file is
    opened.
    """
    _, option = _options(split, data)
    listing = cache(_listing)
    configured = getattr(data, option) if option else None
    if configured is None:
        folders = _candidate_folders(annotations, split, listing)
    else:
        folders = [_configured_path(root, configured, f"data.{option}")]
        if not folders[0].is_dir():
            raise UserError(f"data.{option}: {folders[0]} is not a folder; give the folder of the images")

    unique = set(names)
    heads = {os.path.dirname(name) for name in names}
    counts = {
        folder: len(unique.intersection(os.path.join(head, file) for head in heads for file in listing(folder / head)))
        for folder in folders
    }
    best = max(folders, key=counts.__getitem__)
    missing: dict[str, str] = {}
    if counts[best] < len(unique):
        likely = _likely_files(unique, best)
        for folder in folders if not counts[best] else ():
            if len(other := _likely_files(unique, folder)) > len(likely):
                best, likely = folder, other
        # All images may be in one more folder.
        heads = {file.removesuffix(name) if file.endswith(f"/{name}") else "" for name, file in likely.items()}
        if len(likely) == len(unique) and len(heads) == 1 and (head := heads.pop()):
            best, likely = best / head, {}
        # A file system that ignores case or normalizes accents opens files that its listing does not show.
        absent = [name for name in unique if not os.path.isfile(best / name)]
        missing = {name: likely.get(name, "") for name in absent}
    used = {os.path.basename(missing.get(name) or name) for name in names}
    unlisted = sorted(name for name in listing(best) if is_image(name) and name not in used)
    return ImageFolder(best, missing, unlisted, tuple(folders), option)


def _likely_files(names: set[str], folder: Path) -> dict[str, str]:
    """Map names without a file to images below the folder that no name means exactly; see `match_names`."""
    files = {str(file) for path in walk_folder(folder) if is_image(file := path.relative_to(folder))}
    return match_names(names - files, files - names)


def configured_annotations(split: str, data: DataConfig) -> str | None:
    """Return the annotation file of `split` from the settings, or its image folder if only that is set."""
    option, images_option = _options(split, data)
    return (getattr(data, option) or getattr(data, images_option)) if option else None


def _options(split: str, data: DataConfig) -> tuple[str, str]:
    """Return the settings with the annotation file and the image folder of `split`; empty if it has none."""
    if split in split_aliases(data.train_split):
        return "annotations", "images"
    return ("val_annotations", "val_images") if split in split_aliases(data.val_split) else ("", "")


def _configured_path(root: Path, value: str, option: str) -> Path:
    """Resolve a path from the settings: relative to the dataset, or to the working directory."""
    base = root if root.is_dir() else root.parent
    for path in (base / Path(value).expanduser(), Path(value).expanduser()):
        if path.exists():
            return path
    raise UserError(f"{option}: {value} is neither in {base} nor in the working directory; give an existing path")


def split_aliases(split: str) -> tuple[str, ...]:
    """Return all names of a split, `split` first."""
    for names in SPLIT_ALIASES:
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def split_of(subset: str) -> str | None:
    """Return the first name of the split that a subset of a file is, None if it is none."""
    name = {"validate": "val"}.get(subset.lower(), subset.lower())  # Google's tables
    return next((names[0] for names in SPLIT_ALIASES if name in names), None)


def names_split(text: str, names: Iterable[str]) -> bool:
    """Return whether a file name such as 'instances_val2017' contains one of the words; 'trainval' contains none."""
    for name in names:
        end = "(?![a-z0-9])" if name[-1:].isdigit() else "(?![a-z])"
        if re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}{end}", text.lower()):
            return True
    return False


def split_folders(root: Path) -> dict[str, Path]:
    """Find the folders named after splits: images/train, train/images, obj_train_data, train; also Train2017."""
    words = {name for names in SPLIT_ALIASES for name in names}
    folders: dict[str, Path] = {}
    for parent in (root / "images", root):
        ensure_readable(parent)
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            name = re.fullmatch(r"(?:obj_)?([a-z]+?)(?:_data)?\d*", path.name.lower())
            if name and name[1] in words and path.is_dir():
                folders.setdefault(name[1], path / "images" if (path / "images").is_dir() else path)
    return folders


def has_inner_splits(root: Path, depth: int = 3) -> bool:
    """Return whether a folder in a folder has folders with the names of two splits: a dataset of its own."""
    ensure_readable(root)
    with os.scandir(root) as entries:
        inner = [Path(entry.path) for entry in entries if not is_hidden(entry.name) and entry.is_dir()]
    return any(len(split_folders(path)) > 1 or (depth > 1 and has_inner_splits(path, depth - 1)) for path in inner)


def names_other_split(path: Path, split: str) -> bool:
    """Return whether a word of the file name, or otherwise the name of its folder, is that of another split."""
    folder = re.sub(r"\d+$", "", os.path.basename(os.path.dirname(os.path.realpath(path))))
    for text, matches in ((path.stem, names_split), (folder.lower(), lambda text, names: text in names)):
        if matches(text, split_aliases(split)):
            return False
        if any(matches(text, names) for names in SPLIT_ALIASES if split not in names):
            return True
    return False


def _annotations_in(folder: Path) -> Path | None:
    ensure_readable(folder)
    for name in (ROBOFLOW, DEFAULT):
        if (folder / name).is_file():
            return folder / name
    if (path := _single_file(folder.glob("*.json"))) is None:
        anonymous = [
            path for path in folder.glob("*.json") if not any(names_split(path.stem, n) for n in SPLIT_ALIASES)
        ]
        several = sorted(path.name for path in anonymous if not is_hidden(path.name) and is_coco(path))
        if len(several) > 1:
            raise UserError(f"{folder}: has several annotation files: {', '.join(several[:5])}; merge them or keep one")
    return path


def is_coco(path: Path) -> bool:
    """Return whether a file begins like COCO JSON."""
    with suppress(OSError), open_regular(path) as file:
        return (
            re.match(rb'\s*\{.*"(images|annotations|categories|licenses)"\s*:\s*\[', file.read(4096), re.DOTALL)
            is not None
        )
    return False


def other_annotations(file: Path, split: str) -> list[Path]:
    """Return the JSON files beside one that do not have the name of another split."""
    paths = sorted(path for path in file.parent.glob("*.json") if path != file and not is_hidden(path.name))
    return [path for path in paths if path.is_file() and not names_other_split(path, split)]


def _single_file(paths: Iterable[Path]) -> Path | None:
    visible = [path for path in paths if not path.name.startswith(OTHER_COCO)]
    return visible[0] if len(visible) == 1 else None


def _candidate_folders(annotations: Path, split: str, listing: Listing) -> list[Path]:
    parent = annotations.parent
    named = parent.name.lower() in split_aliases(split)
    folder = parent.parent if named else parent
    base = folder.parent if folder.name.lower() in LABEL_FOLDERS else parent
    stem = annotations.stem.removeprefix("instances_").lower()
    splits = (stem, *(name for name in split_aliases(split) if name != stem))
    folders = [
        parent,
        parent / "images",
        *(child for top in (base / "images", base) for child in child_folders(top, splits, listing)),
    ]
    folders += [base / "images", base / "data", base]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]  # Path.is_dir may raise


def child_folders(folder: Path, names: Sequence[str], listing: Listing | None = None) -> list[Path]:
    """Return the folders in a folder with one of these names, in any case, in the order of the names."""
    found = [
        name for name in sorted((listing or _listing)(folder)) if name.lower() in names and (folder / name).is_dir()
    ]
    return [folder / name for name in sorted(found, key=lambda name: names.index(name.lower()))]


def ensure_readable(folder: Path, mode: int = os.R_OK | os.X_OK) -> None:
    """Raise `UserError` for a folder without read permission, which would look empty."""
    if os.path.isdir(folder) and not os.access(folder, mode):
        raise _unreadable_folder(folder, os.strerror(errno.EACCES))


def walk_folder(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder. Raise `UserError` for an unreadable folder, which would look empty."""

    def fail(error: OSError) -> NoReturn:
        raise _unreadable_folder(error.filename, error.strerror)

    visited: set[str] = set()  # links may form a loop
    for head, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(head)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (Path(head, name) for name in names)


def _unreadable_folder(folder: Path | str, reason: str | None) -> UserError:
    return UserError(f"{folder}: {reason}; make the folder readable")


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except PermissionError as error:
        raise _unreadable_folder(folder, error.strerror) from None
    except (OSError, ValueError):  # no such folder
        return frozenset()
