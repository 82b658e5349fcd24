"""Where a set keeps its files: the annotation file of a split, and the folder of its images."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path, PurePath
from urllib.parse import unquote

from ..config.schema import DataConfig
from ..utils.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
ALIASES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
ROBOFLOW = "_annotations.coco.json"
DEFAULT = "instances_default.json"  # what CVAT and Datumaro call a set that is not divided


def is_hidden(path: str | PurePath) -> bool:
    """Whether a name, or a folder in the path, starts with a dot: what systems and editors leave beside the images.

    path: from a set's own folder on, so that a set may lie in a hidden folder.
    """
    return any(part.startswith(".") and part != ".." for part in PurePath(path).parts)


def is_image(path: str | PurePath) -> bool:
    """Whether a set's file is an image by its ending, and not hidden; path: as `is_hidden` takes it."""
    return PurePath(path).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)


def find_annotations(root: Path, split: str, data: DataConfig) -> Path:
    """The COCO JSON of one split of the set at `root`.

    In this order: `data.annotations` (`data.val_annotations` for the validation split); `root` itself where it is a
    JSON file; `<split>/_annotations.coco.json`; `annotations/instances_*.json` or `<split>.json` whose name says the
    split; `_annotations.coco.json` in `root` itself, or in a folder of the split's name in capitals;
    `annotations/instances_default.json`, or the only file there. `val`, `valid` and `validation` are one split, and
    likewise `train`/`training` and `test`/`testing`. A file or folder that names no split serves for any; one that
    names another split for none. A folder's only JSON file counts as its `_annotations.coco.json`.
    """
    if not root.exists():
        raise UserError(f"{root}: no such data set; give its folder or its COCO JSON file")
    option = _option(split, data)
    given = getattr(data, option) if option else None
    if given is not None:
        return _given(root, given, f"data.{option}")
    if option and getattr(data, option.replace("annotations", "images")) is not None:
        raise UserError(f"data.{option.replace('annotations', 'images')} is given without data.{option}; give both")

    mend = f"; or give data.{option.replace('annotations', 'images')} and data.{option}" if option else ""
    if root.is_file():
        if names_other_split(root, split):
            raise UserError(
                f"{root} is no '{split}' split by its name; give the folder that holds both, or another split{mend}"
            )
        return root

    names = split_aliases(split)
    for name in names:
        if found := _in_folder(root / name):
            return found
    for folder in (root / "annotations", root):
        matches = sorted(path for path in folder.glob("instances_*.json") if _says(path.stem, names))
        matches = matches or [path for name in names if (path := folder / f"{name}.json").is_file()]
        if len(matches) > 1:
            listed = ", ".join(path.name for path in matches)
            raise UserError(f"{folder}: several files may be the '{split}' split: {listed}; keep one{mend}")
        if matches:
            return matches[0]
    if (found := _in_folder(root)) and not names_other_split(found, split):
        return found
    for name in sorted(_listing(root)):
        if name.lower() in names and (found := _in_folder(root / name)):
            return found
    default = root / "annotations" / DEFAULT
    found = default if default.is_file() else _only((root / "annotations").glob("*.json"))
    if found and (found == default or not found.stem.startswith("instances_")) and not names_other_split(found, split):
        return found
    raise UserError(
        f"{root}: no '{split}' split; looked for {'|'.join(names)}/{ROBOFLOW}, annotations/instances_{names[0]}*.json "
        f"and {ROBOFLOW}; rename what you have{mend}"
    )


def label_file(folder: Path, stem: str, ending: str) -> Path:
    """`folder/stem.ending`; where there is only one with its ending in capitals, that one."""
    path = folder / f"{stem}.{ending}"
    capitals = path.with_name(f"{stem}.{ending.upper()}")
    return capitals if not os.path.lexists(path) and os.path.lexists(capitals) else path


def find_images(annotations: Path, root: Path, split: str, data: DataConfig, names: Sequence[str]) -> Path:
    """The folder to which the file names `names` of an annotation file are relative.

    `data.images` (`data.val_images`) where given. Else, of the file's own folder and `images`, `images/<split>`,
    `<split>` there or beside `annotations/`, the one that holds most of the images.

    Folders are listed, files are not opened. Raises `UserError` where an image is in none of them.
    """
    folders = _candidates(annotations, root, split, data)
    best, lacking, _ = _best_folder(folders, names)
    missing = list(lacking)
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if spelled := next((name for name in missing if lacking[name]), None):
        raise UserError(
            f"{annotations}: image {spelled!r}{more} is missing in {best}, which has {lacking[spelled]!r}; "
            "write the names so, as deformable-detr check --fix does"
        )
    if missing and len(missing) == len(set(names)):
        option = (_option(split, data) or "").replace("annotations", "images")
        looked = ", ".join(map(str, folders))
        mend = f"; put the images there or give data.{option}" if option else "; put the images there"
        raise UserError(f"{annotations}: image {missing[0]!r} and all others are missing; looked in {looked}{mend}")
    if missing:
        raise UserError(
            f"{annotations}: image {missing[0]!r}{more} is missing in {best}; add the file or remove its record"
        )
    return best


def best_image_folder(
    annotations: Path, root: Path, split: str, data: DataConfig, names: Sequence[str]
) -> tuple[Path, dict[str, str], list[str]]:
    """`find_images` that goes on: the folder, `_best_folder`'s names that it lacks, and the images without a name."""
    best, missing, listed = _best_folder(_candidates(annotations, root, split, data), names)
    own = {os.path.basename(missing.get(name) or name) for name in names}
    return best, missing, sorted(name for name in listed if is_image(name) and name not in own)


def _candidates(annotations: Path, root: Path, split: str, data: DataConfig) -> list[Path]:
    option = (_option(split, data) or "").replace("annotations", "images")
    given = getattr(data, option) if option else None
    if given is None:
        return _image_folders(annotations, split)
    folder = _given(root, given, f"data.{option}")
    if not folder.is_dir():
        raise UserError(f"data.{option}: {folder} is no folder; give the folder of the images")
    return [folder]


def _best_folder(folders: Sequence[Path], names: Sequence[str]) -> tuple[Path, dict[str, str], frozenset[str]]:
    """The folder with the most of the images, the names that it lacks, and its listing.

    With each name, how the file that is meant is called there, or "" where there is none.
    """
    listing = cache(_listing)  # each folder is listed once, however many files it is asked for
    grouped: dict[str, list[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        grouped.setdefault(head, []).append(tail)
    counts = {folder: _present(grouped, folder, listing) for folder in folders}
    best = max(folders, key=counts.__getitem__)
    if counts[best] == len(names):
        return best, {}, listing(best)
    if not counts[best]:
        best = max(folders, key=lambda folder: len(_spelled_otherwise(names, names, folder, listing)))
    missing = [name for name in names if os.path.basename(name) not in listing(best / os.path.dirname(name))]
    # A file system that ignores case or spells accents otherwise finds files that its listing does not show.
    missing = [name for name in missing if not _is_file(best / name)]
    return best, dict.fromkeys(missing, "") | _spelled_otherwise(missing, names, best, listing), listing(best)


def _spelled_otherwise(
    missing: Sequence[str], names: Sequence[str], folder: Path, listing: Callable[[Path], frozenset[str]]
) -> dict[str, str]:
    """Names with \\ for /, with %20 for a space, with a path that is not here, with other capitals or accents, or
    without their ending → those of their files in `folder`.

    Only where no other record has that file, and no other file is meant as well.
    """

    @cache
    def alike(head: str) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for file in filter(is_image, listing(folder / head)):
            for key in (file, os.path.splitext(file)[0]):
                files.setdefault(_folded(key), []).append(file)
        return files

    found: dict[str, str] = {}
    for name in dict.fromkeys(missing):
        path = name.replace("\\", "/")
        ways = (path, unquote(path), os.path.basename(path), os.path.basename(unquote(path)))
        meant = [way for way in ways if way != name and os.path.basename(way) in listing(folder / os.path.dirname(way))]
        for way in () if meant else dict.fromkeys(ways):
            head, tail = os.path.split(way)
            files = alike(head).get(_folded(tail), [])
            meant += [os.path.join(head, file) for file in files] if len(files) == 1 else []
        if meant:
            found[name] = meant[0]
    uses = Counter([*names, *found.values()])
    return {name: way for name, way in found.items() if uses[way] == 1}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_file(path: Path) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a name with a zero byte
        return False


def given_annotations(split: str, data: DataConfig) -> str | None:
    """What the settings name as the annotation file of `split`; also where only its images are named."""
    option = _option(split, data)
    if option is None:
        return None
    return getattr(data, option) or getattr(data, option.replace("annotations", "images"))


def _option(split: str, data: DataConfig) -> str | None:
    """The setting that names the annotation file of `split`, where there is one."""
    if split in split_aliases(data.train_split):
        return "annotations"
    return "val_annotations" if split in split_aliases(data.val_split) else None


def _given(root: Path, value: str, option: str) -> Path:
    """A path from the settings: relative to the set, or to where we are."""
    base = root if root.is_dir() else root.parent
    for path in (base / Path(value).expanduser(), Path(value).expanduser()):
        if path.exists():
            return path
    raise UserError(f"{option}: {value} is neither in {base} nor here; give a path that exists")


def split_aliases(split: str) -> tuple[str, ...]:
    """The names of one split, the given one first."""
    for names in ALIASES:
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def _says(text: str, names: Iterable[str]) -> bool:
    """Whether a name such as 'instances_val2017' holds one of the words; 'trainval' holds none."""
    for name in names:
        end = "(?![a-z0-9])" if name[-1:].isdigit() else "(?![a-z])"
        if re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}{end}", text.lower()):
            return True
    return False


def names_other_split(path: Path, split: str) -> bool:
    """Whether a file says by a word of its name, or else by its folder's whole name, that it is another split."""
    folder = re.sub(r"\d+$", "", os.path.basename(os.path.dirname(os.path.realpath(path))))
    for text, says in ((path.stem, _says), (folder.lower(), lambda text, names: text in names)):
        if says(text, split_aliases(split)):
            return False
        if any(says(text, names) for names in ALIASES if split not in names):
            return True
    return False


def _in_folder(folder: Path) -> Path | None:
    refuse_unreadable(folder)
    if (folder / ROBOFLOW).is_file():
        return folder / ROBOFLOW
    return _only(folder.glob("*.json"))


def _only(files: Iterable[Path]) -> Path | None:
    seen = [path for path in files if not is_hidden(path.name)]
    return seen[0] if len(seen) == 1 else None


def _image_folders(annotations: Path, split: str) -> list[Path]:
    own = annotations.parent
    base = own.parent if own.name == "annotations" else own
    stem = annotations.stem.removeprefix("instances_")
    splits = (stem, *(name for name in split_aliases(split) if name != stem))
    folders = [own, own / "images"]
    folders += [base / "images" / name for name in splits] + [base / name for name in splits]
    folders += [base / "images", base / "data", base]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]  # False below what may not be read


def refuse_unreadable(folder: Path, needed: int = os.R_OK | os.X_OK) -> None:
    """Raises UserError for a folder whose files the user may not see: it would be taken for an empty one."""
    if os.path.isdir(folder) and not os.access(folder, needed):
        raise unreadable(folder, os.strerror(errno.EACCES))


def unreadable(folder: Path | str, reason: str | None) -> UserError:
    return UserError(f"{folder}: {reason}; make the folder readable")


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except PermissionError as error:
        raise unreadable(folder, error.strerror) from None
    except (OSError, ValueError):  # no such folder, or a name that can be none: nothing is in it
        return frozenset()


def _present(grouped: dict[str, list[str]], folder: Path, listing: Callable[[Path], frozenset[str]]) -> int:
    count = 0
    for head, tails in grouped.items():
        names = listing(folder / head)
        count += sum(tail in names for tail in tails)
    return count
