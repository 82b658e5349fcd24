"""Live streams: frames are new, memory is flat, cuts and stalls are survived, and files are complete at the end."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli.predict import PredictOptions, find_sources, predict_files
from deformable_detr.predict import stream as module
from deformable_detr.predict import video
from deformable_detr.predict.frames import Video, is_address, public_name
from deformable_detr.predict.predictor import predict
from deformable_detr.predict.stream import LiveStream, open_video
from deformable_detr.utils.errors import UserError
from tests.support.rtsp import RtspServer
from tests.support.streams import Event, StreamServer, frame_number, serve_elsewhere
from tests.support.videos import Finder, read_lines, write_video

pytest.importorskip("av", reason="needs PyAV")

pytestmark = pytest.mark.alone  # depends on timing


class SlowFinder(Finder):
    """A model that is slower than the stream."""

    def forward(self, *arguments, **options):
        time.sleep(0.15)
        return super().forward(*arguments, **options)


class Shown:
    """What `predict_video` shows of a server's stream: times, numbers and ages of the frames, and the process's memory.

    Instead of drawing a frame, it notes it. After `seconds`, it presses Ctrl-C.
    """

    def __init__(self, server, seconds, monkeypatch):
        self.rows, self._server = [], server
        self._end = server.start + seconds
        monkeypatch.setattr(video, "_draw", self._note)
        self._draw = video._draw

    def _note(self, pixels, detections):
        now, number = time.monotonic(), frame_number(pixels)
        age = now - self._server.start - number / 1000
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.rows.append((now - self._server.start, number, age, memory))
        if now > self._end:
            raise KeyboardInterrupt
        return Image.fromarray(pixels)

    @property
    def seconds(self):
        return np.array([row[0] for row in self.rows])

    @property
    def numbers(self):
        return [row[1] for row in self.rows]

    @property
    def ages(self):
        return np.array([row[2] for row in self.rows])

    @property
    def memory(self):
        return np.array([row[3] for row in self.rows])


def watch(events, seconds, folder, monkeypatch, path="ts", serve=StreamServer):
    """Predict a stream until Ctrl-C; return what was shown, the summary and the JSON lines."""
    model = SlowFinder()
    predict(model, np.zeros((64, 160, 3), np.uint8))  # the first call imports and allocates
    with serve(events) as server:
        shown = Shown(server, seconds, monkeypatch)
        summary = video.predict_video(model, server.address(path), folder / "out.mp4", folder / "out.jsonl")
    return shown, summary, read_lines(folder / "out.jsonl")


@pytest.fixture
def fast_clock(monkeypatch):
    for name, value in {"READ_TIMEOUT": 2.5, "FIRST_DELAY": 0.2, "MAX_DELAY": 0.4, "REPORT_INTERVAL": 0.5}.items():
        monkeypatch.setattr(module, name, value)


CUTS_AND_STALLS = [Event("backlog", 3.5, 2.0), Event("cut", 7.0, 1.0), Event("stall", 10.0, 3.0)]


@pytest.mark.parametrize("path", ["ts", "mjpeg"])
def test_frames_are_new(tmp_path, monkeypatch, caplog, fast_clock, path):
    shown, summary, records = watch(CUTS_AND_STALLS, 16.0, tmp_path, monkeypatch, path)
    assert shown.ages.max() < 1
    assert shown.numbers == sorted(set(shown.numbers))
    for start, end in ((0, 3.5), (5.5, 7.0), (13.0, 16.0)):
        assert ((shown.seconds > start) & (shown.seconds < end)).any(), f"frames between {start} and {end} s"
    assert summary.dropped > 50
    assert summary.problem is None
    messages = [record.getMessage() for record in caplog.records]
    assert 2 <= len(messages) <= 20
    assert all(message.startswith("http://127.0.0.1") and "\n" not in message for message in messages)
    assert any("connecting again in 0.2 s" in message for message in messages)
    # The JSON lines and the written video have the times of the source.
    assert [record["frame"] for record in records] == list(range(summary.frames))
    times = [record["time"] for record in records]
    assert times == sorted(set(times))
    assert np.diff(times) == pytest.approx(np.diff(shown.seconds[: len(times)] - shown.ages[: len(times)]), abs=0.15)
    with Video(tmp_path / "out.mp4") as written:
        frames = list(written)
    assert [frame_number(frame.pixels) for frame in frames] == shown.numbers[: len(times)]
    assert [frame.seconds for frame in frames] == pytest.approx(times, abs=1e-3)


def test_rtsp(tmp_path, monkeypatch, caplog, fast_clock):
    av = pytest.importorskip("av")
    if "libx264" not in av.codecs_available:
        pytest.skip("the test's server needs libx264")
    shown, summary, records = watch([Event("cut", 5.0, 1.0)], 10.0, tmp_path, monkeypatch, "live", RtspServer)
    assert shown.ages.max() < 1
    assert (shown.seconds < 5).any()
    assert (shown.seconds > 6).any()
    assert summary.problem is None
    assert {record["video"][:7] for record in records} == {"rtsp://"}
    assert any("connecting again in" in message for message in caplog.messages)


@pytest.mark.parametrize("broken", ["QUEUE", "MAX_AGE"])
def test_old_frames_without_the_defenses(tmp_path, monkeypatch, broken):
    """Negative control: with an unbounded queue, or if late frames are kept, the age test fails."""
    monkeypatch.setattr(module, "MAX_AGE", math.inf)
    if broken == "QUEUE":
        monkeypatch.setattr(module, "QUEUE", 10**6)
    events = [Event("backlog", 4.0, 2.0)] if broken == "MAX_AGE" else []
    decode = module._Connection.decode
    # Slow enough that the model takes a frame before the whole backlog is read, and faster than the stream.
    monkeypatch.setattr(module._Connection, "decode", lambda *packet: time.sleep(0.01) or decode(*packet))
    shown, *_ = watch(events, 8.0, tmp_path, monkeypatch)
    assert shown.ages.max() > 1


@pytest.mark.slow
def test_ten_minutes(tmp_path, monkeypatch, caplog):
    """Cuts, stalls and backlogs every minute, with the real time limits."""
    events = []
    for minute in range(10):
        start = 60.0 * minute
        events += [Event("backlog", start + 10, 3), Event("stall", start + 20, 3), Event("cut", start + 30, 2)]
        events += [Event("stall", start + 42, 7)] if minute % 2 else []
    shown, summary, records = watch(events, 600.0, tmp_path, monkeypatch, serve=serve_elsewhere)
    late = [shown.memory[shown.seconds > start][:200].mean() for start in (120, 550)]
    print(f"{summary.frames} frames, {summary.dropped} dropped, oldest {np.sort(shown.ages)[-3:]} s, RSS {late} MiB")
    assert shown.ages.max() < 1
    assert summary.frames == len(records) > 1500
    assert late[1] - late[0] < 8  # MiB
    gaps = np.diff(shown.seconds)
    assert gaps.max() < 12  # a stall of 7 s, after which the stream is opened again
    assert len(caplog.records) < 100


def test_a_file_never_drops_frames(tmp_path):
    """An address with a size or duration is a file."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    for suffix in ("mp4", "ts"):
        write_video(tmp_path / f"street.{suffix}", frames=23, movflags="faststart" if suffix == "mp4" else "")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for suffix in ("mp4", "ts"):
            address = f"http://127.0.0.1:{server.server_address[1]}/street.{suffix}?token=secret"
            summary = video.predict_video(SlowFinder(), address, tmp_path / "out.mp4", tmp_path / "out.jsonl")
            assert (summary.frames, summary.dropped, summary.problem) == (23, 0, None)
            assert read_lines(tmp_path / "out.jsonl")[0]["video"] == address.removesuffix("?token=secret")
        server.shutdown()


def test_gives_up_after_a_while(tmp_path, monkeypatch, caplog, fast_clock):
    monkeypatch.setattr(module, "GIVE_UP", 2.0)
    with StreamServer([Event("cut", 2.5, 60)]) as server:
        summary = video.predict_video(Finder(), server.address("ts"), tmp_path / "out.mp4", tmp_path / "out.jsonl")
        name = server.address("ts")
    assert summary.problem.startswith(f"{name}: no frames for 2 s: Server returned 5")
    assert "\n" not in summary.problem
    assert len(read_lines(tmp_path / "out.jsonl")) == summary.frames > 0
    delays = [message.partition("again in ")[2] for message in caplog.messages]
    assert delays[0] == "0.2 s"
    assert delays[-1].startswith("0.4 s (")
    assert len(delays) <= 5


def test_addresses_that_cannot_be_opened():
    with StreamServer() as server:
        address = server.address("gone")
        with pytest.raises(UserError, match="Server returned 5XX") as caught:
            open_video(address.replace("//", "//user:secret@") + "?token=secret")
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith(f"{address} cannot be opened: ")
    assert str(caught.value).endswith("; check the address and the network")
    with pytest.raises(UserError, match="Connection refused"):
        open_video("rtsp://127.0.0.1:9/live")


def test_names_of_addresses():
    assert public_name("rtsp://user:p@ss@cam:554/live?key=1") == "rtsp://cam:554/live"
    assert public_name(Path("a?b@c.mp4")) == "a?b@c.mp4"
    assert [is_address(x) for x in ("RTSP://x", "https://x/y", "udp://x", "c.mp4", Path("http://x"))] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_close_ends_the_iteration():
    with StreamServer() as server, LiveStream(server.address("mjpeg")) as stream:
        frames = iter(stream)
        first, second = next(frames), next(frames)
        assert (first.number, first.seconds, second.number) == (0, 0.0, 1)
        assert second.seconds > 0
        stream.close()
        rest = list(frames)
        assert len(rest) <= module.QUEUE
        assert stream.problem is None


def test_times_that_start_again_are_a_new_connection():
    """A source that repeats a file goes back in time; one that jumps ahead would leave a long gap."""
    clock = module._Clock(100.0)
    clock.add(7.0, 100.0)
    assert clock.fits(7.04, 100.04)
    assert clock.fits(6.9, 100.04), "B-frames"
    assert clock.fits(7.04, 160.0), "a stall"
    assert not clock.fits(0.0, 100.04)
    assert not clock.fits(90.0, 100.04)


def test_clocks_may_drift():
    """A camera whose clock is slow by one per mille is not taken for late."""
    clock = module._Clock(0.0)
    late = 0.0
    for number in range(200_000):
        now = number / 25
        clock.add(0.999 * now, now)
        late = max(late, now - clock.captured(0.999 * now))
    assert late < 0.1


def test_frames_of_a_buffer_are_not_shown():
    """Two seconds of old frames arrive at first, 0.1 seconds at a time; then frames arrive as they are captured."""
    clock, shown = module._Clock(100.0), []
    for number in range(100):
        stamp = number * 0.1
        now = max(102.0 + number * 0.05, 100.0 + stamp)
        clock.add(stamp, now)
        if now > clock.ready:
            shown.append(now - 100.0 - stamp)
    assert len(shown) > 40
    assert max(shown) < 0.06


def test_failures_of_the_thread_are_raised(monkeypatch):
    monkeypatch.setattr(module._Connection, "decode", lambda *_: 1 / 0)
    with StreamServer() as server, open_video(server.address("mjpeg")) as stream, pytest.raises(ZeroDivisionError):
        list(stream)


COMMAND = """
import sys
from deformable_detr.cli import main
from tests.support.videos import Finder
import deformable_detr.detector
deformable_detr.detector.load_detector = lambda *_: Finder()
main(["predict", "model", *sys.argv[1:]])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signals_complete_the_files(tmp_path, number, code):
    with StreamServer() as server:
        address = server.address("mjpeg").replace("//", "//user:secret@")
        command = [sys.executable, "-c", COMMAND, f"{address}?key=secret", "--out", str(tmp_path / "out")]
        root = Path(__file__).parents[2]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not any((tmp_path / "out").glob(".*.mp4.*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, "secret" in output + errors, "Traceback" in errors) == (code, False, False), errors
    [lines], [written] = (list((tmp_path / "out").glob(f"*.{suffix}")) for suffix in ("jsonl", "mp4"))
    assert written.stem == server.address("mjpeg").removeprefix("http://").replace(":", "-").replace("/", "-")
    records = read_lines(lines)
    with Video(written) as video:
        assert sum(1 for _ in video) == len(records) > 5
        assert video.problem is None
    assert records[0]["video"] == server.address("mjpeg")
    assert not list((tmp_path / "out").glob(".*"))
    if code == 0:
        assert output.startswith(f"{server.address('mjpeg')}: {len(records)} frames")


def test_one_stream_per_command():
    addresses = find_sources(["http://a/live", "rtsp://b/live"])
    assert addresses == ["http://a/live", "rtsp://b/live"]
    with pytest.raises(UserError, match="2 streams or cameras: run one command for each"):
        predict_files(Finder(), addresses, PredictOptions())
    with pytest.raises(UserError, match="addresses are not read; download the file"):
        find_sources(["https://example.org/a.jpg?size=1"])
