"""Videos and cameras: frames in, an annotated video and one JSON line per frame out, in constant memory."""

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from ..structures import Detections
from ..utils.errors import UserError
from ..utils.files import temporary_path
from ..utils.packages import need
from ..visualize.draw import draw_on, enlargement
from .predictor import predict_iter
from .track import Tracker

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".webm", ".wmv"}
)
ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {}, "mpeg4": {"qscale": "3"}}
TICKS_PER_SECOND = 60000  # of written videos; MPEG-4 allows at most 65535
DEFAULT_FRAME_RATE = Fraction(25)
MAX_MISSING = 0.02  # fraction of a video that may be missing at its end without a report


def is_video(source: Path | int) -> bool:
    """Return whether a source is a camera or has the suffix of a video."""
    return isinstance(source, int) or source.suffix.lower() in VIDEO_SUFFIXES


class Frame(NamedTuple):
    """A frame of a video."""

    number: int  # from 0
    seconds: float  # since the first frame
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, upright


class Video:
    """Iterate over the frames of a file or a camera.

    Args:
        source: Video file, or number of a camera.

    Attributes:
        total: Number of frames, if the file states it.
        problem: After the iteration: one line about damage to the file, or None.

    Raises:
        UserError: The source cannot be opened or has no video stream.
    """

    def __init__(self, source: Path | int) -> None:
        av = self._av = need("av", "video")
        self.name = str(source) if isinstance(source, Path) else f"camera {source}"
        self.problem: str | None = None
        try:
            if isinstance(source, Path):
                if not source.is_file():
                    raise UserError(f"{source}: no such video")
                self._container = av.open(str(source))
            else:
                device, input_format = _camera(source)
                self._container = av.open(device, format=input_format)
        except (av.FFmpegError, OSError, ValueError) as error:
            hint = "it is damaged or not a video" if isinstance(source, Path) else "is it connected and not in use?"
            raise UserError(f"{self.name} cannot be opened: {_reason(error)}; {hint}") from None
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{self.name}: contains no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.total: int | None = self._stream.frames or None
        self.rate: Fraction = self._stream.average_rate or self._stream.guessed_rate or DEFAULT_FRAME_RATE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        number, damaged, start, seconds, read_error = 0, 0, None, -1.0, None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (self._av.FFmpegError, OSError) as error:
                read_error = _reason(error)
                break
            try:
                decoded = packet.decode()
            except self._av.FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                time = number / float(self.rate) if frame.time is None else frame.time
                start = time if start is None else start
                seconds = time - start
                yield Frame(number, seconds, _upright(frame))
                number += 1
        self.problem = self._describe_damage(number, damaged, seconds, read_error)

    def _describe_damage(self, frames: int, damaged: int, seconds: float, read_error: str | None) -> str | None:
        """Describe what was wrong with a file that ended after `frames` frames, the last one at `seconds`."""
        duration = self._duration()
        too_short = duration is not None and seconds + 2 / float(self.rate) < duration * (1 - MAX_MISSING)
        if read_error or too_short:
            total = "" if duration is None else f" of {duration:.1f}"
            position = f"{frames} frames, {max(seconds, 0):.1f}{total} seconds"
            return f"{self.name}: damaged or cut off after {position}{f' ({read_error})' if read_error else ''}"
        if damaged:
            return f"{self.name}: skipped {damaged} damaged packets"
        return None

    def _duration(self) -> float | None:
        """Return the duration of the video stream in seconds, if the file states it."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None and len(container.streams) == 1:
            return container.duration / self._av.time_base
        return None


def _upright(frame: Any) -> np.ndarray:
    """Return the RGB pixels of a PyAV frame, rotated and mirrored by its display matrix."""
    pixels, side_data = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if side_data is not None:
        a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32, 5).astype(int)  # x' = ax + cy, y' = bx + dy
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


class VideoWriter:
    """Write an H.264 file, or MPEG-4 without such an encoder, with frames at given times.

    All frames get the size of the first one. Without frames, no file is written.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        self._av = need("av", "video")
        self._container: Any = None
        self._stream: Any = None
        self._ticks = -1

    def add(self, image: Image.Image, seconds: float) -> None:
        """Append a frame."""
        if self._container is None:
            self._open(image.size)
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        pixels = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._ticks = max(self._ticks + 1, round(seconds * TICKS_PER_SECOND))
        frame.pts, frame.time_base = self._ticks, Fraction(1, TICKS_PER_SECOND)
        self._container.mux(self._stream.encode(frame))  # pyright: ignore[reportOptionalMemberAccess]

    def close(self) -> None:
        """Finish the file."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def _open(self, size: tuple[int, int]) -> None:
        encoder = next((name for name in ENCODERS if name in self._av.codecs_available), None)
        if encoder is None:
            raise UserError(f"{self.path}: this PyAV has none of the encoders {', '.join(ENCODERS)}")
        self._size = size
        self._container = self._av.open(str(self.path), "w", format="mp4")
        self._stream = self._container.add_stream(encoder, rate=self.rate, options=ENCODERS[encoder])
        self._stream.width, self._stream.height = (side + side % 2 for side in size)  # 4:2:0 needs even sides
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)


class VideoSummary(NamedTuple):
    """The result of a video."""

    frames: int
    counts: Counter[str]  # drawn objects per class, over all frames
    problem: str | None  # one line about damage to the source
    most: int = 0  # largest number of objects in a frame
    tracks: int | None = None  # number of tracked objects; None: no tracking


def predict_video(
    model: Any,
    source: Path | int,
    video: Path,
    lines: Path,
    threshold: float = 0.5,
    batch_size: int = 4,
    top_k: int = 100,
    track: bool = False,
) -> VideoSummary:
    """Detect objects in every frame; write an annotated video and one JSON line per frame.

    A line is {"video", "frame" from 0, "time" in seconds, "height", "width", "detections"}, see `Detections.to_dict`.
    Both files are complete up to the last readable frame, also after an interruption. A camera runs until Ctrl-C.

    Args:
        source: Video file, or number of a camera.
        video: Path of the annotated video.
        lines: Path of the JSON lines.
        threshold: Minimum score, 0..1.
        batch_size: Frames per batch.
        top_k: Maximum number of detections per frame.
        track: Follow objects from frame to frame: each detection has a "track_id", see `Tracker`.

    Raises:
        UserError: The source cannot be opened or an output cannot be written.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    num_frames = most = 0
    with (
        Video(source) as reader,
        _output_files(video, lines) as (temporary_video, temporary_lines),
        open(temporary_lines, "w", encoding="utf-8") as file,
        closing(VideoWriter(temporary_video, reader.rate)) as writer,
        tqdm(total=reader.total, unit="frame", desc=reader.name, disable=None) as progress,
    ):
        pending: deque[Frame] = deque()
        tracker = Tracker(threshold, reader.rate) if track else None
        min_score = threshold if tracker is None else tracker.min_score

        def images() -> Iterator[np.ndarray]:
            for frame in reader:
                pending.append(frame)
                yield frame.pixels

        try:
            for detections in predict_iter(model, images(), min_score, top_k, batch_size):
                frame = pending.popleft()
                if tracker is not None:
                    detections = tracker.update(detections, frame.seconds)
                writer.add(_draw(frame.pixels, detections), frame.seconds)
                record = {"video": reader.name, "frame": frame.number, "time": round(frame.seconds, 4)}
                record |= detections.to_dict()
                del record["image"]
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                counts.update(detections.names)
                most = max(most, len(detections))
                num_frames += 1
                progress.update()
        except KeyboardInterrupt:
            if isinstance(source, Path):
                raise
        problem = reader.problem if num_frames else reader.problem or f"{reader.name}: contains no frames"
    return VideoSummary(num_frames, counts, problem, most, tracker and tracker.count)


@contextmanager
def _output_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield temporary paths. Files written there replace the outputs, also after an interruption, if not empty."""
    temporaries = [temporary_path(path) for path in paths]
    write_errors = (OSError, need("av", "video").FFmpegError)
    try:
        complete = True
        try:
            yield temporaries
        except write_errors:
            complete = False
            raise
        finally:
            for temporary, path in zip(temporaries, paths, strict=True):
                if complete and temporary.exists() and temporary.stat().st_size:
                    os.replace(temporary, path)
    except write_errors as error:
        raise UserError(f"{' or '.join(map(str, paths))} cannot be written: {_reason(error)}") from None
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _draw(pixels: np.ndarray, detections: Detections) -> Image.Image:
    """Draw the detections; every frame is enlarged by the same factor, also without detections."""
    image = Image.fromarray(pixels)
    factor = enlargement(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return draw_on(image, detections, factor) if len(detections) else image


def _camera(number: int) -> tuple[str, str]:
    """Return FFmpeg's name of a camera and its input format."""
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        return f"video_device_number={number}", "vfwcap"
    return f"/dev/video{number}", "v4l2"


def _reason(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
