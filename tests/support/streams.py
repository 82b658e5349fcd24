"""A live stream over HTTP whose frames say when they were captured, with cuts and stalls."""

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import NamedTuple

import numpy as np
from PIL import Image

BITS, BLOCK = 20, 8  # a frame shows the milliseconds since the server's start as a row of white and black blocks
SIZE = (64, BITS * BLOCK)  # (height, width)


class Event(NamedTuple):
    """What happens from `start` for `seconds` after the server's start.

    cut: connections are closed, and new ones are refused. stall: nothing is captured. backlog: frames are captured, but
    arrive only at the end.
    """

    kind: str
    start: float
    seconds: float


class Camera:
    """The events and their clock, `time.monotonic`, which all processes of a machine share."""

    def __init__(self, events: Sequence[Event], rate: float):
        self.events, self.rate, self.start = events, rate, time.monotonic()
        self.closed = False

    def during(self, kind: str) -> bool:
        now = time.monotonic() - self.start
        return any(event.kind == kind and event.start <= now < event.start + event.seconds for event in self.events)

    def frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield (seconds since the start, pixels) until a cut, at uneven times."""
        pauses = np.random.default_rng(0).uniform(0.5, 1.5, 1000) / self.rate
        for pause in cycle(pauses.tolist()):
            if self.closed or self.during("cut"):
                return
            seconds = time.monotonic() - self.start
            yield seconds, numbered_frame(round(seconds * 1000))
            time.sleep(pause)
            while self.during("stall") and not self.closed:
                time.sleep(0.02)


def numbered_frame(number):
    """Return pixels (H, W, 3) that show a number."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.where(bits, 235, 20), BLOCK).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (*SIZE, 3)).copy()


def frame_number(pixels):
    """Return the number that a frame of any size (H, W, 3) shows."""
    row = pixels[pixels.shape[0] // 4].astype(float).mean(axis=1)
    bits = row[: len(row) // BITS * BITS].reshape(BITS, -1).mean(axis=1) > 128
    return int(sum(1 << bit for bit, white in enumerate(bits) if white))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        camera = self.server.camera
        if camera.during("cut") or self.path.startswith("/gone"):
            self.send_error(503)
            return
        self.send_response(200)
        kind = "multipart/x-mixed-replace; boundary=frame" if self.path == "/mjpeg" else "video/mp2t"
        self.send_header("Content-Type", kind)
        self.end_headers()
        with suppress(OSError):  # the client is gone
            (self._mjpeg if self.path == "/mjpeg" else self._transport_stream)(camera)

    def _mjpeg(self, camera):
        for _, pixels in camera.frames():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            data = buffer.getvalue()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data + b"\r\n")

    def _transport_stream(self, camera):
        import av

        encoder = "libx264" if "libx264" in av.codecs_available else "mpeg2video"
        options = {"preset": "ultrafast", "tune": "zerolatency"} if encoder == "libx264" else {}
        held = _HeldFile(self.wfile, camera)  # swallows errors, which PyAV would turn into its own
        with av.open(held, "w", format="mpegts", options={"flush_packets": "1"}) as container:
            stream = container.add_stream(encoder, rate=25, options=options)
            stream.width, stream.height = SIZE[::-1]
            stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 12
            stream.codec_context.time_base = Fraction(1, 1000)
            for seconds, pixels in camera.frames():
                if held.broken:
                    return
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(OSError):
            super().handle()


class _HeldFile:
    """Keep what is written during a backlog until its end."""

    def __init__(self, file, camera):
        self._file, self._camera, self._held, self.broken = file, camera, [], False

    def write(self, data):
        self._held.append(bytes(data))
        if not (self.broken or self._camera.during("backlog")):
            try:
                self._file.write(b"".join(self._held))
            except OSError:
                self.broken = True
            self._held.clear()
        return len(data)


class CameraServer(ThreadingTCPServer):
    """Serve a camera until the end of the `with` block."""

    daemon_threads = True
    scheme: str
    handler: type[BaseRequestHandler]

    def __init__(self, events=(), rate=25.0):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.camera = Camera(events, rate)

    @property
    def start(self):
        return self.camera.start

    def address(self, path):
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}/{path}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.camera.closed = True
        self.shutdown()
        self.server_close()


class StreamServer(CameraServer, ThreadingHTTPServer):
    """Serve /ts (MPEG-TS) and /mjpeg."""

    scheme, handler = "http", _Handler


class RemoteServer(NamedTuple):
    """A `StreamServer` in another process."""

    start: float  # `time.monotonic`
    port: int

    def address(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"


@contextmanager
def serve_elsewhere(events):
    """Run a server in another process, so that this one has the memory of the client only."""
    command = [sys.executable, "-m", "tests.support.streams", json.dumps(events)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        start, port = process.stdout.readline().split()
        try:
            yield RemoteServer(float(start), int(port))
        finally:
            process.kill()


if __name__ == "__main__":
    with StreamServer([Event(*event) for event in json.loads(sys.argv[1])]) as server:
        print(server.camera.start, server.server_address[1], flush=True)
        time.sleep(3600)
