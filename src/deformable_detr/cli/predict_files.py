"""Prediction over files: what to read, what to write, and going on after a bad image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.discovery import IMAGE_SUFFIXES
from ..detector import DeformableDETR
from ..predict.predictor import folder_images, predict_each
from ..predict.video import VIDEO_SUFFIXES, is_video, load_av, predict_video
from ..structures import Detections
from ..utils.errors import UserError
from ..utils.files import prepare_files, prepare_folder, write_json


def find_sources(sources: Sequence[Path]) -> list[Path]:
    """The images and videos named, and those directly inside the folders named, in order and each once.

    Raises UserError for a source that is not there and for a folder with neither.
    """
    found: list[Path] = []
    for source in sources:
        if not os.path.exists(source):  # Path.exists raises for a name that is too long
            raise UserError(f"{source}: no such image, video or folder")
        both = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        found += folder_images(source, both, "images or videos") if source.is_dir() else [source]
    return list(dict.fromkeys(found))


def predict_files(
    model: DeformableDETR,
    sources: Iterable[Path],
    out: Path | None = None,
    threshold: float = 0.5,
    json_file: Path | None = None,
    report: Callable[[str], None] = print,
    complain: Callable[[str], None] = print,
    camera: int | None = None,
    batch_size: int = 4,
) -> int:
    """Finds objects in each image and video, draws them into the folder `out`, writes all as a list to `json_file`.

    A record of an image is what `Detections.to_dict` gives: {"image": path, "detections": [...], …}. A video is
    written with a JSON line a frame beside it, see `video.predict_video`, in the current folder where there is no
    `out`; its record is {"video": path, "frames", "annotated": path, "lines": path}. A camera is a video that runs
    until Ctrl-C and comes last. batch_size: frames that go through the model together.

    A source that cannot be read or drawn is named through `complain`, and the others are done; of a video that is cut
    off, what was there is kept. `report` gets one line a source.

    Returns:
        The number of sources that were left out or are not complete.

    Raises:
        UserError: Before the first source, where an output cannot be written or a drawing would replace its source, or
            there are videos and PyAV is not installed.
    """
    every: list[Path | int] = [*sources, *([] if camera is None else [camera])]
    videos = [source for source in every if isinstance(source, int) or is_video(source)]
    if videos:
        load_av()
    folder = None if out is None else prepare_folder(out, "--out")
    outputs = _output_paths(every, folder)
    drawn = [path for path in outputs.values() if out is not None or path.suffix == ".mp4"]
    _refuse_to_replace(every, drawn, json_file)
    prepare_files({"--json": json_file})
    records: list[dict[str, Any]] = []
    failures = 0
    images = predict_each(model, (source for source in every if source not in videos), threshold)  # reads ahead
    for source in every:
        try:
            if source in videos:
                video, lines = outputs[source], outputs[source].with_suffix(".jsonl")
                done = predict_video(model, source, video, lines, threshold, batch_size)
                if done.trouble is not None:
                    failures += 1
                    complain(done.trouble + (f"; what was done is in {video}" if done.frames else ""))
                if done.frames:
                    written = {"annotated": str(video), "lines": str(lines)}
                    records.append({"video": str(source), "frames": done.frames, **written})
                    report(f"{source}: {done.frames} frames, {_counts(done.found)}; {video}, {lines.name}")
                continue
            detections = next(images)
            if isinstance(detections, UserError):
                raise detections
            records.append(detections.to_dict())
            if out is not None:
                detections.save(outputs[source])
        except UserError as error:
            failures += 1
            complain(str(error))
            continue
        report(f"{source}: {_in_short(detections)}")
    if json_file is not None:
        write_json(json_file, records)
    return failures


def _in_short(detections: Detections, most: int = 5) -> str:
    """Such as "3 found: cat 0.98, cat 0.91, dog 0.55"; of many, the best."""
    if not len(detections):
        return "nothing found"
    best = zip(detections.names[:most], detections.scores.tolist()[:most], strict=True)
    listed = ", ".join(f"{name} {score:.2f}" for name, score in best)
    return f"{len(detections)} found: {listed}{', …' if len(detections) > most else ''}"


def _counts(found: Counter[str], most: int = 5) -> str:
    """Such as "cat 120×, dog 3×", the most frequent."""
    if not found:
        return "nothing found"
    listed = ", ".join(f"{name} {count}×" for name, count in found.most_common(most))
    return listed + (", …" if len(found) > most else "")


def _output_paths(sources: Sequence[Path | int], out: Path | None) -> dict[Path | int, Path]:
    """Where the drawing of each source goes: its own name, numbered where two are called the same.

    Without a folder videos have a name of their own in the current one; images are not drawn then.
    """
    paths: dict[Path | int, Path] = {}
    taken: set[Path] = set()
    for source in sources:
        video = isinstance(source, int) or is_video(source)
        stem = f"camera-{source}" if isinstance(source, int) else source.stem
        if out is None:
            stem += "-detected"
        jpeg = isinstance(source, Path) and source.suffix.lower() in {".jpg", ".jpeg"}
        suffix = ".mp4" if video else ".jpg" if jpeg else ".png"
        folder = out or Path()
        path, number = folder / f"{stem}{suffix}", 1
        while path in taken:
            number += 1
            path = folder / f"{stem}-{number}{suffix}"
        taken.add(path)
        paths[source] = path
    return paths


def _refuse_to_replace(sources: Sequence[Path | int], outputs: Sequence[Path], json_file: Path | None) -> None:
    """`UserError` where anything that is to be written would take the place of anything that is to be read."""
    read: dict[tuple[int, int], Path] = {}
    for source in sources:
        if isinstance(source, Path):
            with suppress(OSError):  # who reads it says so
                found = os.stat(source)
                read[found.st_dev, found.st_ino] = source
    lines = [path.with_suffix(".jsonl") for path in outputs if path.suffix == ".mp4"]
    for path in (*outputs, *lines, *([json_file] if json_file else [])):
        with suppress(OSError):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in read:
                option = "--json" if path is json_file else "--out"
                source = read[found.st_dev, found.st_ino]
                raise UserError(f"{option}: {path} would replace {source}, which is to be read; name another place")
