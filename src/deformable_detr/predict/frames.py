"""The frames of video files."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ..utils.errors import UserError
from ..utils.packages import need

VIDEO_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".webm", ".wmv"}
)
DEFAULT_FRAME_RATE = Fraction(25)
MAX_MISSING = 0.02  # fraction of a video that may be missing at its end without a report
OPEN_TIMEOUT, READ_TIMEOUT = 10.0, 5.0  # seconds without an answer or data from an address


def is_address(source: Path | str) -> bool:
    """Return whether a source is the address of an RTSP or HTTP stream."""
    return isinstance(source, str) and re.match(r"(?i)(rtsps?|https?)://", source) is not None


def public_name(source: Path | str) -> str:
    """Return a path, or an address without user, password and query, which may be secret."""
    name = str(source)
    return re.sub(r"//[^/]*@", "//", name).partition("?")[0] if is_address(source) else name


class Frame(NamedTuple):
    """A frame of a video."""

    number: int  # from 0
    seconds: float  # since the first frame
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, upright


class Video:
    """Iterate over the frames of a file.

    Args:
        source: Path or address of the file.

    Attributes:
        name: The source, without user, password and query of an address.
        rate: Frames per second.
        total: Number of frames, if the file states it.
        problem: After the iteration: one line about damage to the file, or None.

    Raises:
        UserError: The source cannot be opened or has no video stream.
    """

    live, dropped = False, 0

    def __init__(self, source: Path | str) -> None:
        av = self._av = need("av", "video")
        self.name = public_name(source)
        self.problem: str | None = None
        address = is_address(source)
        if not address and not Path(source).is_file():
            raise UserError(f"{source}: no such video")
        try:
            self._container = av.open(str(source), timeout=(OPEN_TIMEOUT, READ_TIMEOUT) if address else None)
        except (av.FFmpegError, OSError, ValueError) as error:
            message = f"{self.name} cannot be opened: {reason(error)}; it is damaged or not a video"
            raise UserError(message) from None
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
        number, damaged, start, seconds, read_error, matrix = 0, 0, None, -1.0, None, None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (self._av.FFmpegError, OSError) as error:
                read_error = reason(error)
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
                matrix = display_matrix(frame) if number == 0 else matrix
                yield Frame(number, seconds, upright(frame, matrix))
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


def display_matrix(frame: Any) -> np.ndarray | None:
    """Return how a PyAV frame is rotated and mirrored: (a, b, _, c, d) with x' = ax + cy, y' = bx + dy.

    Ask the first frame of a video only: `side_data` is a reference cycle, which keeps the frame's buffer in memory.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32, 5).astype(int)


def upright(frame: Any, matrix: np.ndarray | None) -> np.ndarray:
    """Return the RGB pixels of a PyAV frame, rotated and mirrored by a display matrix."""
    pixels = frame.to_ndarray(format="rgb24")
    if matrix is not None:
        a, b, _, c, d = matrix
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def reason(error: BaseException) -> str:
    """Return why PyAV failed, in one line and without the file name."""
    if type(error).__name__ == "ExitError":  # PyAV's name of its time limits
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
