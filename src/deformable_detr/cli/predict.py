"""`deformable-detr predict`: images, videos and cameras."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..utils.errors import UserError
from ..utils.files import prepare_files, prepare_folder, write_json
from ..utils.packages import need
from ..utils.terminal import echo, printable_name
from ..utils.tiles import DEFAULT_OVERLAP, Tiling, check_tiling
from .options import (
    Device,
    Flag,
    JsonFile,
    Model,
    NonNegative,
    Positive,
    Precision,
    Split,
    Threshold,
    Tile,
    TileOverlap,
    print_error,
)

if TYPE_CHECKING:
    from ..predict.predictor import Detector
    from ..structures import Detections

log = logging.getLogger(__name__)

Source = Path | str | int  # an image or video file, the address of a video or stream, or the number of a camera


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
        out: Folder for the images and videos with drawn boxes and masks. Default: videos are written to the current
            folder as NAME-detected.mp4 with NAME-detected.jsonl, which has one line per frame; images are not drawn.
        json: JSON file for the detections of all sources.
        batch_size: Video frames or tiles per batch.
        camera: Number of a camera, from 0. Press Ctrl-C to stop.
        track: Follow objects through a video: each gets a number and a color.
        top_k: Maximum number of detections per image, or per tile. Default: the model's number of queries, at least
            100.
        coco: JSON file for COCO results, which pycocotools reads with `loadRes`. If SOURCES is one dataset (folder or
            COCO JSON), the images are those of --split with their ids; else they are numbered and named in the file.
        split: Split of a dataset, for --coco. Default: val.
    """

    out: Path | None = None
    json: JsonFile = None
    threshold: Threshold | None = None
    batch_size: Positive = 4
    camera: NonNegative | None = None
    track: Annotated[bool, Flag] = False
    top_k: Positive | None = None
    coco: Annotated[Path | None, Parameter(name="--coco")] = None
    split: Split | None = None
    tile: Tile = None
    tile_overlap: TileOverlap = DEFAULT_OVERLAP

    @property
    def tiling(self) -> Tiling | None:
        """How larger images are cut."""
        return check_tiling(self.tile, self.tile_overlap, self.batch_size)

    @property
    def min_score(self) -> float:
        """`threshold`. Default: 0.5, or 0 for COCO results, because AP needs the low scores too."""
        return self.threshold if self.threshold is not None else 0.0 if self.coco else 0.5


def predict(
    model: Model,
    sources: Annotated[list[str] | None, Parameter(negative=())] = None,
    /,
    *,
    options: Annotated[PredictOptions | None, Parameter(name="*")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Detect objects in images, videos, a live stream or a camera.

    Args:
        sources: Image and video files, folders of them, or the address of a stream: rtsp://… or http://….
        precision: fp32, or bf16 if the processor or GPU supports it.
    """
    from ..detector import load_detector

    options = options or PredictOptions()
    if not sources and options.camera is None:
        raise UserError("nothing to predict: name images, videos or folders, or a camera with --camera")
    from .predict_split import find_dataset, predict_split

    one = Path(sources[0]) if options.coco is not None and sources and len(sources) == 1 else None
    if one is not None and find_dataset(one, options.split):
        predict_split(load_detector(model, device, precision), one, options)
        return
    if options.split is not None:
        raise UserError(f"--split {options.split}: is for one dataset with --coco; name its folder or annotation file")
    files = find_sources(sources or [])
    if predict_files(load_detector(model, device, precision), files, options):
        sys.exit(2)


def find_sources(sources: Sequence[Path | str]) -> list[Path | str]:
    """Return the given files and addresses, and the images and videos directly inside the given folders, each once.

    Raises:
        UserError: A source does not exist, a folder has no images or videos, or an address is that of an image.
    """
    from ..data.matching import IMAGE_SUFFIXES
    from ..predict.frames import VIDEO_SUFFIXES, is_address, public_name
    from ..predict.predictor import folder_images
    from ..utils.images import refuse_address

    files: list[Path | str] = []
    for source in sources:
        if is_address(source) and Path(public_name(source)).suffix.lower() not in IMAGE_SUFFIXES:
            files.append(source)
            continue
        source = Path(source)
        if not os.path.exists(source):  # Path.exists raises for a name that is too long
            refuse_address(os.fspath(source))
            raise UserError(f"{source}: no such image, video or folder")
        is_folder = source.is_dir()
        files += folder_images(source, IMAGE_SUFFIXES | VIDEO_SUFFIXES, "images or videos") if is_folder else [source]
    return list(dict.fromkeys(files))


def predict_files(
    model: Detector,
    files: Sequence[Path | str],
    options: PredictOptions,
    report: Callable[[str], None] = echo,
    report_error: Callable[[str], None] = print_error,
) -> int:
    """Detect objects in images and videos, draw them, and write the detections as JSON.

    The JSON file is a list with one entry per source: `Detections.to_dict` of an image, or {"video", "frames",
    "annotated", "lines"} of a video. A source that cannot be read is reported and skipped; of a damaged video, the
    readable frames are kept.

    Args:
        report: Called with one line per source.
        report_error: Called with one line per source that is skipped or incomplete.

    Returns:
        The number of sources that were skipped or are incomplete.

    Raises:
        UserError: An output cannot be written or would overwrite a source, or PyAV is missing. Raised before the
            first source.
    """
    from ..predict.predictor import default_top_k, predict_each
    from ..utils.progress import progress_bar

    sources: list[Source] = [*files] if options.camera is None else [*files, options.camera]
    videos = {source for source in sources if _is_video(source)}
    if len(live := [source for source in sources if not isinstance(source, Path)]) > 1:
        raise UserError(f"{len(live)} streams or cameras: run one command for each, because they do not end")
    if videos:
        if option := next((name for name in ("coco", "tile") if getattr(options, name) is not None), None):
            raise UserError(f"--{option} is for images: leave out videos and --camera")
        need("av", "video")
        if options.track:
            need("trackers", "track")
    elif options.track:
        raise UserError("--track is for videos: name one, or a camera with --camera")
    folder = None if options.out is None else prepare_folder(options.out, "--out")
    outputs = _output_paths([source for source in sources if folder or source in videos], videos, folder)
    _reject_overwriting(files, [*outputs.values(), *(_lines_path(outputs[video]) for video in videos)], options)
    prepare_files({"--json": options.json, "--coco": options.coco})
    top_k = options.top_k or default_top_k(model)
    images = [source for source in sources if source not in videos]
    results = predict_each(model, images, options.min_score, top_k, 1, folder is not None, options.tiling)
    records: list[dict[str, Any]] = []
    failures, full = 0, []  # full: sources with the maximum of detections, so that some may be missing
    with progress_bar(len(sources), "files", "predict", show=len(sources) > 1, keep=False) as bar:
        for source in sources:
            try:
                if source in videos:
                    record, line, problem, most = _predict_video(model, source, outputs[source], options, top_k)
                else:
                    record, line, problem, most = _predict_image(results, source, outputs.get(source))
            except UserError as error:
                record, line, problem, most = None, None, str(error), 0
            if problem is not None:
                failures += 1
                report_error(problem)
            if record is not None:
                records.append(record)
                report(f"{_name(source)}: {line}")
            full += [source] * (most == top_k and options.tile is None)
            bar.update()
    _write_results(options, records, report)
    _warn_of_limit(model, [] if options.coco else full, top_k)
    return failures


def _write_results(options: PredictOptions, records: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    if options.json is not None:
        write_json(options.json, records)
    if options.coco is not None:
        write_json(options.coco, _coco_results(records))
        report(f"{options.coco}: images are numbered from 1 in this order; each detection has its file_name")


def _warn_of_limit(model: Detector, full: Sequence[Source], top_k: int) -> None:
    if full and top_k < model.config.num_queries * model.config.num_classes:
        others = f" and {len(full) - 1} more" if full[1:] else ""
        log.warning("%s%s: %d detections, the maximum; allow more with --top-k", _name(full[0]), others, top_k)


def _coco_results(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": number, "file_name": record["image"], "category_id": detection["category_id"],
            "bbox": [x1, y1, x2 - x1, y2 - y1], "score": detection["score"],
            **({"segmentation": detection["mask"]} if "mask" in detection else {}),
        }
        for number, record in enumerate(records, start=1)
        for detection in record["detections"]
        for x1, y1, x2, y2 in [detection["box"]]
    ]  # fmt: skip


def _is_video(source: Source) -> bool:
    """Return whether a source is an address, a camera or a file with the suffix of a video."""
    from ..predict.frames import VIDEO_SUFFIXES

    return not isinstance(source, Path) or source.suffix.lower() in VIDEO_SUFFIXES


# JSON record, summary, problem, largest number of detections in an image
Outcome = tuple[dict[str, Any] | None, str | None, str | None, int]


def _predict_image(results: Iterator[Detections | UserError], source: Source, out: Path | None) -> Outcome:
    """Take the next result, which belongs to `source`, and draw it on the pixels that it was computed from."""
    detections = next(results)
    if isinstance(detections, UserError):
        raise detections
    problem = None
    if out is not None:
        try:
            detections.save(out)
        except UserError as error:
            problem = str(error)
    scores = zip(detections.names, detections.scores.tolist(), strict=True)
    best = _first_entries([f"{printable_name(name)} {score:.2f}" for name, score in scores])
    line = f"{len(detections)} objects: {best}" if len(detections) else "no objects"
    return replace(detections, image=source).to_dict(), line, problem, len(detections)


def _predict_video(model: Detector, source: Source, out: Path, options: PredictOptions, top_k: int) -> Outcome:
    from ..predict.video import predict_video

    lines = _lines_path(out)
    summary = predict_video(model, source, out, lines, options.min_score, options.batch_size, top_k, options.track)
    if not summary.frames:
        return None, None, summary.problem, 0
    record = {"video": _name(source), "frames": summary.frames, "annotated": str(out), "lines": str(lines)}
    problem = None if summary.problem is None else f"{summary.problem}; the readable frames are in {out}"
    counts = (
        _first_entries([f"{printable_name(name)} {count}×" for name, count in summary.counts.most_common()])
        or "no objects"
    )
    tracks = "" if summary.tracks is None else f" in {summary.tracks} track{'s' * (summary.tracks != 1)}"
    dropped = f" ({summary.dropped} dropped)" if summary.dropped else ""
    line = f"{summary.frames} frames{dropped}, {counts}{tracks}; {out}, {lines.name}"
    return record, line, problem, summary.most


def _name(source: Source) -> str:
    from ..predict.frames import public_name

    return str(source) if isinstance(source, int) else public_name(source)


def _first_entries(entries: list[str], limit: int = 5) -> str:
    return ", ".join(entries[:limit] + ["…"] * (len(entries) > limit))


def _lines_path(video: Path) -> Path:
    return video.with_suffix(".jsonl")


def _output_paths(sources: Sequence[Source], videos: Set[Source], out: Path | None) -> dict[Source, Path]:
    """Return the path of each drawn image or video; names that occur twice get a number."""
    paths: dict[Source, Path] = {}
    used: set[Path] = set()
    for source in sources:
        stem = source.stem if isinstance(source, Path) else _stream_stem(source)
        stem += "-detected" if out is None else ""
        jpeg = isinstance(source, Path) and source.suffix.lower() in {".jpg", ".jpeg"}
        suffix = ".mp4" if source in videos else ".jpg" if jpeg else ".png"
        path, number = (out or Path()) / f"{stem}{suffix}", 1
        while path in used:
            number += 1
            path = path.with_name(f"{stem}-{number}{suffix}")
        paths[source] = path
        used.add(path)
    return paths


def _stream_stem(source: str | int) -> str:
    """Return a file name for a camera or an address: host and path."""
    if isinstance(source, int):
        return f"camera-{source}"
    return re.sub(r"[^\w.-]+", "-", _name(source).partition("//")[2]).strip("-.")[:80]


def _reject_overwriting(files: Sequence[Path | str], outputs: Sequence[Path], options: PredictOptions) -> None:
    """Raise UserError if an output is the same file as a source."""
    inputs: dict[tuple[int, int], Path] = {}
    for file in files:
        if isinstance(file, str):
            continue
        with suppress(OSError):  # reported when it is read
            status = os.stat(file)
            inputs[status.st_dev, status.st_ino] = file
    for option, paths in {"--out": outputs, "--json": [options.json], "--coco": [options.coco]}.items():
        for path in filter(None, paths):
            with suppress(OSError):
                status = os.stat(path)
                if source := inputs.get((status.st_dev, status.st_ino)):
                    raise UserError(f"{option}: {path} would overwrite the source {source}; choose another path")
