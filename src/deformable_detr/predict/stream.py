"""Live streams and cameras: the newest frames, however slow the model is, and a new connection after a cut."""

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..utils.errors import UserError
from ..utils.packages import need
from .frames import (
    DEFAULT_FRAME_RATE,
    OPEN_TIMEOUT,
    READ_TIMEOUT,
    Frame,
    Video,
    display_matrix,
    is_address,
    public_name,
    reason,
    upright,
)

QUEUE = 2  # decoded frames that wait for the model; a new one replaces the oldest
MAX_AGE = 0.5  # seconds when the model takes a frame; older ones are dropped, so that none is shown after a second
SETTLE = 0.5  # seconds after connecting, and after frames that came from a buffer; frames are dropped until then
CATCHING_UP = 0.05  # seconds by which the delay falls while a buffer is read faster than frames are captured
CLOCK_WINDOW = 10.0  # seconds
JUMP = 10.0  # seconds by which the times of frames may run ahead of the clock
FIRST_DELAY, MAX_DELAY = 0.5, 8.0  # seconds before connecting again; doubled at each failure
GIVE_UP = 600.0  # seconds without a frame
REPORT_INTERVAL = 5.0  # seconds between two lines about a connection
OPTIONS = {"rtsp_transport": "tcp", "analyzeduration": "2000000"}  # UDP loses packets; microseconds
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS, for example of MJPEG over HTTP: it invents times

log = logging.getLogger(__name__)


def open_video(source: Path | str | int) -> "Video | LiveStream":
    """Open a video file, the address of a file or stream, or the camera with a number.

    Raises:
        UserError: The source cannot be opened or has no video stream.
    """
    if isinstance(source, int):
        return LiveStream(source)
    if is_address(source):
        stream = LiveStream(str(source))
        if not stream.finite:
            return stream
        stream.close()
    return Video(source)


class LiveStream:
    """Iterate over the newest frames of a stream or camera, until `close` or ten minutes without a frame.

    A thread reads and decodes. Frames that the caller is too slow for are dropped, and so are frames that are older
    than half a second when the caller could take them. If the connection is lost or stalls, the thread connects again.

    Args:
        source: Address of a stream, or number of a camera.

    Attributes:
        name: The source, without user, password and query of an address.
        rate: Frames per second that the source states.
        finite: Whether it is a file rather than a live stream: it has a duration or a size.
        dropped: Number of frames that were dropped so far.
        problem: After the iteration: one line about the connection, or None.

    Raises:
        UserError: The source cannot be opened or has no video stream.
    """

    live, total = True, None

    def __init__(self, source: str | int) -> None:
        self.name = f"camera {source}" if isinstance(source, int) else public_name(source)
        self._target = _camera(source) if isinstance(source, int) else (source, None)
        try:
            self._first = _Connection(*self._target)
        except ConnectionError as error:
            hint = "is it connected and not in use?" if isinstance(source, int) else "check the address and the network"
            raise UserError(f"{self.name} cannot be opened: {error}; {hint}") from None
        self.rate, self.finite = self._first.rate, self._first.finite
        self.dropped, self.problem = 0, None
        self._queue: deque[_Arrival] = deque()
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._ended, self._failure = False, None
        self._start: float | None = None  # arrival of the first frame; `time.monotonic`, as all times here
        self._last_frame, self._last_seconds = time.monotonic(), -math.inf
        self._told, self._untold = -math.inf, 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="live-stream", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration and the connection. During a stall, this takes up to `READ_TIMEOUT` seconds."""
        self._stop.set()
        if self._thread is None:
            self._first.close()
        else:
            self._thread.join(READ_TIMEOUT + 1)

    def __iter__(self) -> Iterator[Frame]:
        number, matrix = 0, None
        while (arrival := self._next()) is not None:
            matrix = display_matrix(arrival.frame) if number == 0 else matrix
            yield Frame(number, arrival.seconds, upright(arrival.frame, matrix))
            number += 1
        if self._failure is not None:
            raise self._failure

    def _next(self) -> "_Arrival | None":
        """Wait for the oldest frame in the queue that is not too old; None at the end."""
        with self._changed:
            while True:
                while self._queue:
                    arrival = self._queue.popleft()
                    if time.monotonic() - arrival.captured <= MAX_AGE:
                        return arrival
                    self.dropped += 1
                if self._ended:
                    return None
                self._changed.wait(1.0)

    def _run(self) -> None:
        connection: _Connection | None = self._first
        try:
            while connection is not None:
                cause = self._read(connection)
                connection = None if self._stop.is_set() else self._reconnect(cause)
        except BaseException as error:  # the caller's thread raises it
            self._failure = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read(self, connection: "_Connection") -> str:
        """Put frames into the queue until the connection ends; return why it did."""
        clock, skipping = _Clock(time.monotonic()), True  # until a key frame, which the following frames need
        try:
            for packet in connection.packets():
                now = time.monotonic()
                stamp = connection.timestamp(packet, now)
                if stamp is not None:
                    clock = clock if clock.fits(stamp, now) else _Clock(now)
                    clock.add(stamp, now)
                late = stamp is not None and now - clock.captured(stamp) > MAX_AGE
                skipping = late or (skipping and not packet.is_keyframe)
                if self._stop.is_set():
                    break
                if skipping:
                    self.dropped += now > clock.ready
                    continue
                for frame in connection.decode(packet):
                    stamp = connection.timestamp(frame, now)
                    if now > clock.ready:
                        self._put(frame, now if stamp is None else stamp, clock, now)
        except ConnectionError as error:
            return str(error)
        finally:
            connection.close()
        return "the stream ended"

    def _put(self, frame: Any, stamp: float, clock: "_Clock", now: float) -> None:
        self._start = now if self._start is None else self._start
        if clock.zero is None:  # a new connection: its times start anywhere
            clock.zero = stamp - max(now - self._start, self._last_seconds)
        self._last_frame, self._last_seconds = now, stamp - clock.zero
        with self._changed:
            if len(self._queue) >= QUEUE:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(_Arrival(frame, self._last_seconds, clock.captured(stamp)))
            self._changed.notify()

    def _reconnect(self, cause: str) -> "_Connection | None":
        """Connect again, with longer and longer pauses; None after `close` or `GIVE_UP` seconds without a frame."""
        lost, delay = time.monotonic(), FIRST_DELAY
        while time.monotonic() - self._last_frame < GIVE_UP:
            self._report(f"{cause}; connecting again in {delay:g} s")
            if self._stop.wait(delay):
                return None
            try:
                connection = _Connection(*self._target)
            except ConnectionError as error:
                cause, delay = str(error), min(2 * delay, MAX_DELAY)
            else:
                self._report(f"connected again after {time.monotonic() - lost:.1f} s")
                return connection
        self.problem = f"{self.name}: no frames for {GIVE_UP:g} s: {cause}"
        return None

    def _report(self, message: str) -> None:
        """Log one line, but not more than one per `REPORT_INTERVAL`."""
        if time.monotonic() - self._told < REPORT_INTERVAL:
            self._untold += 1
            return
        log.warning("%s: %s%s", self.name, message, f" ({self._untold} lines left out)" if self._untold else "")
        self._told, self._untold = time.monotonic(), 0


class _Arrival(NamedTuple):
    """A decoded frame in the queue."""

    frame: Any  # av.VideoFrame
    seconds: float  # since the first frame of the stream
    captured: float  # `time.monotonic` at the capture, without the least delay of the network


class _Clock:
    """Relate the times of a connection's frames to `time.monotonic`, and so tell which ones arrive late.

    The least delay of the last 10 to 20 seconds counts as none, because the clocks of cameras drift.
    """

    def __init__(self, now: float) -> None:
        self.ready = now + SETTLE
        self.zero: float | None = None  # time of a frame at second 0 of the stream
        self._last = (math.inf, now)
        self._window = now
        self._least = self._least_before = math.inf  # difference of arrival and frame time

    def fits(self, stamp: float, now: float) -> bool:
        """Return whether a time continues the earlier ones: not back by over a second, nor far ahead of the clock."""
        before, arrival = self._last
        return math.isinf(before) or -1 <= stamp - before <= now - arrival + JUMP

    def add(self, stamp: float, now: float) -> None:
        """Take the time of a packet that arrived now."""
        self._last = (stamp, now)
        if now - self._window > CLOCK_WINDOW:
            self._least, self._least_before, self._window = math.inf, self._least, now
        if now - stamp < min(self._least, self._least_before) - CATCHING_UP:
            self.ready = now + SETTLE
        self._least = min(self._least, now - stamp)

    def captured(self, stamp: float) -> float:
        """Return when a frame would have arrived with the least delay."""
        return stamp + min(self._least, self._least_before)


class _Connection:
    """An open stream. Every failure is a ConnectionError with the reason in one line."""

    def __init__(self, target: str, input_format: str | None) -> None:
        self._av = av = need("av", "video")
        try:
            options = OPTIONS if input_format is None else {}
            timeouts = (OPEN_TIMEOUT, READ_TIMEOUT)
            self._container = av.open(target, format=input_format, options=options, timeout=timeouts)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ConnectionError(reason(error)) from None
        if not self._container.streams.video:
            self.close()
            raise ConnectionError("it contains no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "SLICE"  # decoding several frames at a time would delay them
        self._timed = not self._container.format.flags & NO_TIMESTAMPS
        self.finite = self._container.duration is not None or self._container.size > 0
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate: Fraction = rate if rate and 1 <= rate <= 240 else DEFAULT_FRAME_RATE

    def close(self) -> None:
        self._container.close()

    def packets(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                if not packet.size:  # the end
                    return
                yield packet
        except (self._av.FFmpegError, OSError) as error:
            raise ConnectionError(reason(error)) from None

    def decode(self, packet: Any) -> list[Any]:
        """Return the frames that a packet completes; none if it is damaged."""
        try:
            return packet.decode()
        except self._av.FFmpegError:
            log.info("skipped a damaged packet")
            return []

    def timestamp(self, item: Any, now: float) -> float | None:
        """Return the time of a packet or frame in seconds, `now` if the format has no times; None if it is missing."""
        if not self._timed:
            return now
        return None if item.pts is None or item.time_base is None else float(item.pts * item.time_base)


def _camera(number: int) -> tuple[str, str]:
    """Return FFmpeg's name of a camera and its input format."""
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        return f"video_device_number={number}", "vfwcap"
    return f"/dev/video{number}", "v4l2"
