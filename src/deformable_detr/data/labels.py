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
# Files beside an image that are none.
OTHER_SUFFIXES = {".txt", ".xml", ".json", ".csv", ".yaml", ".yml", ".npy", ".npz", ".pkl", ".cache", ".bak", ".md"}
SHOWN = 3  # names of files in a message


@dataclass(frozen=True)
class LabelTree:
    """The files of a folder of images and of the folder of their labels, with all folders in them.

    Attributes:
        images: Images of readable formats → the label file with their name, which may be missing.
        unread: Images of other formats, and labeled files that may be such → likewise; without those that are also
            there in a readable format.
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
        trees = [(root, path, path.relative_to(root)) for root in {images, labels} for path in walk_folder(root)]
        kept = [(root, path, name) for root, path, name in trees if name.parts[0].lower() not in without]
        label_files = {path for _, path, name in kept if name.suffix.lower() == suffix and not is_hidden(name)}
        beside = {path: name for root, path, name in kept if root == images and not is_hidden(name)}
        readable = {path: label_of(path) for path in (*(path for path in beside if is_image(beside[path])), *listed)}
        others = {path: label_of(path) for path, name in beside.items() if path not in readable}
        exact = set(readable.values())

        def may_be_image(path: Path, label: Path) -> bool:
            labeled = label in label_files and path.suffix.lower() not in OTHER_SUFFIXES
            return label not in exact and (labeled or is_unread_image(path.name))

        unread = {path: label for path, label in others.items() if may_be_image(path, label)}
        return cls(readable, unread, label_files)

    def assign(
        self,
        used: Iterable[Path],
        count: Counter,
        issues: list[Issue],
        listed: bool = False,
        title: Callable[[Path], str] = lambda path: "",
    ) -> dict[Path, Path]:
        """Return the label file of each image, found by a similar name if none has the name of the image.

        Adds an issue for each label file with objects that has no image, or none of its exact name.

        Args:
            used: Images of the split; the other images only tell which label files are not the split's.
            count: Counts the objects of a label file; None for other files.
            issues: Issues of the split.
            listed: Whether a list names the images. Label files without an image are then no issue if all images of
                the list exist and have their own.
            title: Returns the image that a label file names, if the format has such.
        """
        assigned, used = dict(self.images), set(used)
        exact = set(self.images.values())
        others = sorted(set(self.labels) - exact - set(self.unread.values()))
        strays = {str(path): path for path in others if count(path) is not None}
        free = {str(path): path for path, label in self.images.items() if label not in self.labels} if strays else {}
        matches = match_names(strays, free)
        names: dict[str, str | None] = {}
        for name in strays.keys() - matches:
            text = title(strays[name])
            names[text] = None if text in names else name  # ambiguous
        unique = {text: name for text, name in names.items() if name is not None}
        pairs = match_names(unique, free.keys() - set(matches.values()))
        matches |= {unique[text]: image for text, image in pairs.items()}
        missing = any(issue.code == "image-missing" for issue in issues)
        unlabeled = set(free.values()) - {free[image] for image in matches.values()}
        complete = listed and not missing and used.isdisjoint(unlabeled)
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
        issues += self._unread_images(count, listed)
        return assigned

    def _unread_images(self, count: Counter, listed: bool) -> Iterator[Issue]:
        """Report the images of unread formats, with the objects of their label files unless a list leaves them out."""
        if not self.unread:
            return
        labels = [label for label in self.unread.values() if label in self.labels]
        names = sorted(path.name for path in self.unread)
        text = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        message = f"is one of {len(names)} files in formats that are not read ({text}), {len(labels)} of them labeled"
        if len(names) == 1:
            message = f"has a format that is not read; it is {'labeled' if labels else 'not labeled'}"
        objects = 0 if listed else sum(count(label) or 0 for label in labels)
        yield Issue("image-format", min(self.unread), "", message, objects=objects)


def label_trees(images: Path) -> tuple[Path, Path]:
    """Return a folder of images and that of its labels, which has the same sub-folders.

    The last `images` in the path becomes `labels`, in any case. If that is not a folder, the labels are in the nearest
    folder above it; if there is none up to `labels`, they are beside the images.
    """
    for index, part in reversed(list(enumerate(images.parts))):
        for name in LABEL_FOLDERS if part.lower() == "images" else ():
            root = Path(*images.parts[:index], name)
            ensure_readable(root.joinpath(*images.parts[index + 1 :]).parent, os.X_OK)
            for end in range(len(images.parts), index, -1):
                if _may_have_labels(folder := root.joinpath(*images.parts[index + 1 : end])):
                    return Path(*images.parts[:end]), folder
    return images, images


def _may_have_labels(folder: Path) -> bool:
    """Return whether a folder has folders or label files. LabelImg leaves a folder with only the classes."""
    ensure_readable(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.endswith((".txt", ".TXT")) and name != "classes.txt" for name in names) or any(
        os.path.isdir(folder / name) for name in names
    )
