"""Label files without an image of their name, in formats with one label file per image."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .discovery import ensure_readable, is_hidden, is_image, is_unread_image, walk_folder
from .issues import Issue
from .matching import match_names, nearest_name

Counter = Callable[[Path], int | None]
LABEL_FOLDERS = ("labels", "Labels", "LABELS")
SHOWN = 3  # names of files in a message


@dataclass(frozen=True)
class LabelTree:
    """The files of a folder of images and of the folder of their labels, with all folders in them.

    Attributes:
        images: Images of readable formats → the label file with their name, which may be missing.
        unread: Images of other formats → likewise.
        labels: All label files.
    """

    images: Mapping[Path, Path]
    unread: Mapping[Path, Path]
    labels: Collection[Path]

    @classmethod
    def scan(
        cls,
        images: Path,
        labels: Path,
        suffix: str,
        label_of: Callable[[Path], Path],
        listed: Iterable[Path] = (),
        without: Collection[str] = (),
    ) -> "LabelTree":
        """List the files.

        Args:
            images: Folder of the images.
            labels: Folder of the label files; it may be the same.
            suffix: Suffix of the label files, such as '.xml'.
            label_of: Returns the label file with the name of an image.
            listed: More images.
            without: Names of folders in `images` to leave out, in lower case.
        """
        files = [(images, path) for path in walk_folder(images)]
        files += [(labels, path) for path in walk_folder(labels)] if labels != images else []
        names = [(path, path.relative_to(root)) for root, path in files]
        names = [(path, name) for path, name in names if name.parts[0].lower() not in without]
        return cls(
            {path: label_of(path) for path in (*(path for path, name in names if is_image(name)), *listed)},
            {path: label_of(path) for path, name in names if is_unread_image(name)},
            {path for path, name in names if name.suffix.lower() == suffix and not is_hidden(name)},
        )

    def assign(
        self, used: Iterable[Path], count: Counter, issues: list[Issue], listed: bool = False
    ) -> dict[Path, Path]:
        """Return the label file of each image, found by a similar name if none has the name of the image.

        Adds an issue for each label file with objects that has no image, or none of its exact name.

        Args:
            used: Images of the split; the other images only tell which label files are not the split's.
            count: Counts the objects of a label file; None for other files.
            issues: Issues of the split.
            listed: Whether a list names the images. Label files without an image are then no issue if every image of
                the list has its own.
        """
        assigned, used = dict(self.images), set(used)
        exact = set(self.images.values())
        others = sorted(set(self.labels) - exact - set(self.unread.values()))
        strays = {str(path): path for path in others if count(path) is not None}
        free = {str(path): path for path, label in self.images.items() if label not in self.labels} if strays else {}
        matches = match_names(strays, free)
        complete = listed and used.isdisjoint(set(free.values()) - {free[image] for image in matches.values()})
        for name, path in strays.items():
            image = free[matches[name]] if name in matches else None
            if image is None and not complete and count(path):
                near = nearest_name(path.name, [image.name for image in self.images if image in used])
                message = f"belongs to no image{f'; the most similar name is {near!r}' if near else ''}"
                issues.append(Issue("label-unmatched", path, "", message, objects=count(path) or 0))
            elif image is not None:
                assigned[image] = path
                if image in used and count(path):
                    message = f"has no image of its name; its objects are read for {image.name!r}"
                    issues.append(Issue("label-name", path, "", message))
        issues += self._unread_images(count, exact)
        return assigned

    def _unread_images(self, count: Counter, exact: Collection[Path]) -> Iterator[Issue]:
        """Report the images of unread formats, with the objects of their label files."""
        if not self.unread:
            return
        labels = [label for label in self.unread.values() if label in self.labels and label not in exact]
        names = sorted(path.name for path in self.unread)
        text = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        message = f"is one of {len(names)} images in formats that are not read ({text}), {len(labels)} of them labeled"
        yield Issue("image-format", min(self.unread), "", message, objects=sum(count(label) or 0 for label in labels))


def label_trees(images: Path) -> tuple[Path, Path]:
    """Return a folder of images and that of its labels, which has the same sub-folders.

    The last `images` in the path becomes `labels`, in any case. If that is not a folder, the labels may be in another
    folder of `labels`; if there is none either, they are beside the images.
    """
    for index, part in reversed(list(enumerate(images.parts))):
        for name in LABEL_FOLDERS if part.lower() == "images" else ():
            root = Path(*images.parts[:index], name)
            folder = root.joinpath(*images.parts[index + 1 :])
            ensure_readable(folder.parent, os.X_OK)
            if _may_have_labels(folder):
                return images, folder
            if _may_have_labels(root):
                return Path(*images.parts[: index + 1]), root
    return images, images


def _may_have_labels(folder: Path) -> bool:
    """Return whether a folder has folders or label files. LabelImg leaves a folder with only the classes."""
    ensure_readable(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.endswith((".txt", ".TXT")) and name != "classes.txt" for name in names) or any(
        os.path.isdir(folder / name) for name in names
    )
