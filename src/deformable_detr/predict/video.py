"""Videos, streams and cameras: frames in, an annotated video and one JSON line per frame out, in constant memory."""

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..structures import Detections
from ..utils.errors import UserError
from ..utils.files import temporary_path
from ..utils.packages import need
from ..utils.progress import progress_bar
from ..visualize.draw import draw_on, enlargement
from .frames import Frame, reason
from .predictor import predict_iter
from .stream import open_video
from .track import Tracker

ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {}, "mpeg4": {"qscale": "3"}}
TICKS_PER_SECOND = 60000  # of written videos; MPEG-4 allows at most 65535


class VideoWriter:
    """Write an H.264 file, or MPEG-4 without such an encoder, with frames at given times.

    All frames get the size of the first one. Without frames, no file is written. The file's index takes about 90 bytes
    of memory per frame.
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
    dropped: int = 0  # number of frames of a live stream that were not processed


def predict_video(
    model: Any,
    source: Path | str | int,
    video: Path,
    lines: Path,
    threshold: float = 0.5,
    batch_size: int = 4,
    top_k: int = 100,
    track: bool = False,
) -> VideoSummary:
    """Detect objects in every frame; write an annotated video and one JSON line per frame.

    A line is {"video", "frame" from 0, "time" in seconds, "height", "width", "detections"}, see `Detections.to_dict`.
    Both files are complete up to the last readable frame, also after an interruption. A live stream or camera runs
    until Ctrl-C; frames that the model is too slow for are dropped, see `LiveStream`.

    Args:
        source: Path or address of a video, address of a stream, or number of a camera.
        video: Path of the annotated video.
        lines: Path of the JSON lines.
        threshold: Minimum score, 0..1.
        batch_size: Frames per batch; 1 for live streams.
        top_k: Maximum number of detections per frame.
        track: Follow objects from frame to frame: each detection has a "track_id", see `Tracker`.

    Raises:
        UserError: The source cannot be opened or an output cannot be written.
    """
    counts: Counter[str] = Counter()
    num_frames = most = 0
    with (
        open_video(source) as reader,
        _output_files(video, lines) as (temporary_video, temporary_lines),
        open(temporary_lines, "w", encoding="utf-8") as file,
        closing(VideoWriter(temporary_video, reader.rate)) as writer,
        progress_bar(reader.total, "frames", reader.name) as progress,
    ):
        tracker = Tracker(threshold, reader.rate) if track else None
        results = _detect(model, reader, threshold, 1 if reader.live else batch_size, top_k, tracker)
        try:
            for frame, detections in results:
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
            if not reader.live:
                raise
        problem = reader.problem if num_frames else reader.problem or f"{reader.name}: contains no frames"
    return VideoSummary(num_frames, counts, problem, most, tracker and tracker.count, reader.dropped)


def _detect(
    model: Any, frames: Iterable[Frame], threshold: float, batch_size: int, top_k: int, tracker: Tracker | None
) -> Iterator[tuple[Frame, Detections]]:
    """Yield every frame with its detections, and their tracks if there is a tracker."""
    pending: deque[Frame] = deque()

    def images() -> Iterator[np.ndarray]:
        for frame in frames:
            pending.append(frame)
            yield frame.pixels

    min_score = threshold if tracker is None else tracker.min_score
    for detections in predict_iter(model, images(), min_score, top_k, batch_size):
        frame = pending.popleft()
        yield frame, detections if tracker is None else tracker.update(detections, frame.seconds)


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
        raise UserError(f"{' or '.join(map(str, paths))} cannot be written: {reason(error)}") from None
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
