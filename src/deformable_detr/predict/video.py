"""Videos and cameras: frames in, an annotated video and a JSON line a frame out; never more in memory than a batch."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from ..structures import Detections
from ..utils.errors import UserError
from ..utils.files import temporary_path
from ..visualize.draw import draw_on, enlargement
from .predictor import predict_iter

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)
ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {}, "mpeg4": {"qscale": "3"}}
CLOCK = 60000  # ticks a second in the videos written; MPEG-4 has 65535 at most
RATE = Fraction(25)  # frames a second where a source does not say
MISSING = 0.02  # of its length that a video may lack at its end before that is told


def is_video(path: Path) -> bool:
    """By the name's ending."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def load_av() -> ModuleType:
    """PyAV. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'deformable-detr[video]'") from None
    return av


@dataclass(frozen=True, eq=False)
class Frame:
    """number from 0; seconds from the video's beginning; pixels (H, W, 3) uint8 RGB, upright."""

    number: int
    seconds: float
    pixels: np.ndarray


class Video:
    """The frames of a file or a camera. Raises UserError where it cannot be opened or holds no pictures.

    source: a file, or the number of a camera. total: frames, where the file says. trouble: once all frames were read,
    a line about what was wrong with the file, or None.
    """

    def __init__(self, source: Path | int) -> None:
        av = self._av = load_av()
        self.name = str(source) if isinstance(source, Path) else f"camera {source}"
        self.trouble: str | None = None
        try:
            if isinstance(source, Path):
                if not source.is_file():
                    raise UserError(f"{source}: no such video")
                self._container = av.open(str(source))
            else:
                place, kind = _camera(source)
                self._container = av.open(place, format=kind)
        except (av.FFmpegError, OSError, ValueError) as error:
            hint = "damaged, cut off or no video" if isinstance(source, Path) else "is there a camera, and is it free?"
            raise UserError(f"{self.name} cannot be opened: {_reason(error)}; {hint}") from None
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{self.name}: there are no pictures in it")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.total: int | None = self._stream.frames or None
        self.rate: Fraction = self._stream.average_rate or self._stream.guessed_rate or RATE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        number, damaged, start, seconds, cut = 0, 0, None, -1.0, None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (self._av.FFmpegError, OSError) as error:
                cut = _reason(error)
                break
            try:
                decoded = packet.decode()
            except self._av.FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                now = number / float(self.rate) if frame.time is None else frame.time
                start = now if start is None else start
                seconds = now - start
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                yield Frame(number, seconds, np.ascontiguousarray(pixels))
                number += 1
        self.trouble = self._judge(number, damaged, seconds, cut)

    def _judge(self, frames: int, damaged: int, seconds: float, cut: str | None) -> str | None:
        """What to say of a file that ended after so many frames, the last one at `seconds`."""
        length = self._length()
        early = length is not None and seconds + 2 / float(self.rate) < length * (1 - MISSING)
        few = self.total is not None and frames < self.total * (1 - MISSING) - 1
        if cut or early or few:
            whole = f" of {self.total}" if self.total else "" if length is None else f" of {length:.1f} seconds"
            done = f"{frames} frames" if self.total or length is None else f"{max(seconds, 0):.1f}"
            return f"{self.name}: damaged or cut off after {done}{whole}{f' ({cut})' if cut else ''}"
        if damaged:
            return f"{self.name}: {damaged} damaged parts were left out"
        return None

    def _length(self) -> float | None:
        """Seconds that the file says the pictures last; other streams of it may last longer."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None and len(container.streams) == 1:
            return container.duration / self._av.time_base
        return None


class VideoWriter:
    """An H.264 file (MPEG-4 where there is no such encoder) of pictures at given times, all of the first one's size.

    The file is there when the writer is closed, and whole; without a picture there is none.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        self._av = load_av()
        self._temporary = temporary_path(path)
        self._container: Any = None
        self._ticks = -1

    def add(self, picture: Image.Image, seconds: float) -> None:
        """Raises UserError where the file cannot be written."""
        try:
            if self._container is None:
                self._open(picture.size)
            if picture.size != self._size:
                picture = picture.resize(self._size, Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
            pixels = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
            frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
            self._ticks = max(self._ticks + 1, round(seconds * CLOCK))
            frame.pts, frame.time_base = self._ticks, Fraction(1, CLOCK)
            self._container.mux(self._stream.encode(frame))  # pyright: ignore[reportOptionalMemberAccess]
        except (self._av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None

    def close(self) -> None:
        """Finishes the file and puts it in place."""
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._temporary, self.path)
        except (self._av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None
        finally:
            self._container = None
            self._temporary.unlink(missing_ok=True)

    def _open(self, size: tuple[int, int]) -> None:
        name = next((name for name in ENCODERS if name in self._av.codecs_available), None)
        if name is None:
            raise UserError(f"{self.path}: this PyAV has none of the encoders {', '.join(ENCODERS)}")
        self._size = size
        self._container = self._av.open(str(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream(name, rate=self.rate, options=ENCODERS[name])
        self._stream.width, self._stream.height = (side + side % 2 for side in size)  # 4:2:0 needs even sides
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, CLOCK)


@dataclass(frozen=True)
class Summary:
    """What came of a video: its frames, how many objects of each name were drawn in all, and what was wrong with it."""

    frames: int
    found: Counter[str]
    trouble: str | None


def predict_video(
    model: Any, source: Path | int, video: Path, lines: Path, threshold: float = 0.5, batch_size: int = 4
) -> Summary:
    """Finds objects in every frame; writes the annotated `video` and a JSON line a frame to `lines`.

    A line: {"video", "frame" from 0, "time" in seconds, "height", "width", "detections"}, the last as in
    `Detections.to_dict`. A progress bar goes to standard error where that is a terminal.

    A camera runs until Ctrl-C. Where a file turns out to be cut off, and where it is interrupted, what was done until
    then is kept: both files are whole. Raises UserError for a source that cannot be opened and for what cannot be
    written.
    """
    from tqdm import tqdm

    found: Counter[str] = Counter()
    frames = 0
    with ExitStack() as stack:
        opened = stack.enter_context(Video(source))
        writer = VideoWriter(video, opened.rate)
        stack.callback(writer.close)
        text = stack.enter_context(_Lines(lines))
        bar = stack.enter_context(tqdm(total=opened.total, unit="frame", desc=opened.name, disable=None))
        waiting: deque[Frame] = deque()

        def pixels() -> Iterator[np.ndarray]:
            for frame in opened:
                waiting.append(frame)
                yield frame.pixels

        try:
            for detections in predict_iter(model, pixels(), threshold, batch_size=batch_size):
                frame = waiting.popleft()
                writer.add(_drawn(frame.pixels, detections), frame.seconds)
                text.add({"video": opened.name, "frame": frame.number, "time": round(frame.seconds, 4)}, detections)
                found.update(detections.names)
                frames += 1
                bar.update()
        except KeyboardInterrupt:
            if isinstance(source, Path):
                raise
        trouble = opened.trouble if frames else opened.trouble or f"{opened.name}: there are no pictures in it"
    return Summary(frames, found, trouble)


class _Lines:
    """A file of JSON lines, put in place when it is closed and has any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        self._written = False

    def add(self, facts: dict[str, Any], detections: Detections) -> None:
        record = detections.to_dict()
        del record["image"]
        try:
            self._written = True
            self._file.write(json.dumps({**facts, **record}, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None

    def __enter__(self) -> Self:
        try:
            self._file = open(self._temporary, "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {_reason(error)}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self._file.close()
            if self._written:  # else what an earlier run left stays, as its video does
                os.replace(self._temporary, self.path)
        except OSError as problem:
            raise UserError(f"{self.path} cannot be written: {_reason(problem)}") from None
        finally:
            self._temporary.unlink(missing_ok=True)


def _drawn(pixels: np.ndarray, detections: Detections) -> Image.Image:
    """Every frame of a video is enlarged alike."""
    picture = Image.fromarray(pixels)
    factor = enlargement(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return draw_on(picture, detections, factor) if len(detections) else picture


def _camera(number: int) -> tuple[str, str]:
    """What FFmpeg calls the camera, and by which of its devices."""
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        return f"video_device_number={number}", "vfwcap"
    return f"/dev/video{number}", "v4l2"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
