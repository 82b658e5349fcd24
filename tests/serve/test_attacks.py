"""Hostile clients: floods, broken requests and full queues. Honest clients are answered, and the log stays short."""

import http.client
import io
import logging
import multiprocessing
import resource
import socket
import statistics
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest
from PIL import Image

from deformable_detr.serve.protocol import client_log
from deformable_detr.serve.server import TOKEN_VARIABLE, RateLimit
from tests.support.server import (
    ServerProcess,
    encode_image,
    multipart,
    post_image,
    running_server,
    small_model,
    wait_until,
)

TOKEN = "a-token-of-enough-letters"
UNREAD = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
CHUNKED = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def connect(port, data=b"", address="127.0.0.1"):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(address, 0))
    connection.sendall(data)
    return connection


def read_all(connection):
    """Read until the server closes; return the bytes."""
    text = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            text += chunk
    return text


@pytest.fixture(scope="module")
def client():
    with running_server(token=TOKEN) as client:
        yield client


# A body that no route reads


@pytest.mark.alone
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize(
    ("line", "status"),
    [(b"GET /", 200), (b"GET /no/such/path", 404), (b"POST /", 405), (b"POST /v1/detect", 401), (b"GET /metrics", 401)],
)
def test_missing_body_holds_no_connection(client, line, status, close):
    start = time.monotonic()
    with connect(
        client.port, line + b" HTTP/1.1\r\nHost: localhost\r\n" + close + b"Content-Length: 9\r\n\r\n"
    ) as connection:
        assert int(connection.recv(65536).split()[1]) == status
        assert time.monotonic() - start < 1
        read_all(connection)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("close", ["", "close"])
@pytest.mark.parametrize(("token", "status"), [("wrong", 401), (TOKEN, 413)])
def test_refused_uploads_can_read_the_response(token, status, close):
    """Also clients that read only after they have sent the whole body, which no socket buffer can hold."""
    body = bytes(30_000_000)
    with running_server(token=TOKEN, body_bytes=1000) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        headers = {"Content-Type": "image/png", "Authorization": f"Bearer {token}", "Connection": close or "keep-alive"}
        for _ in range(2):  # the rest of the body was discarded, so the connection remains in step
            connection.request("POST", "/v1/detect", body, headers)
            response = connection.getresponse()
            assert response.status == status
            assert b"detail" in response.read()
        connection.close()


def test_connections_without_the_token_are_dropped_first():
    attacks = (UNREAD, UNREAD[:9], b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", UNREAD.replace(b"GET", b"POST"))
    with running_server(token=TOKEN, connections=40, head_timeout=60, stall_timeout=60) as client, ExitStack() as stack:
        client.get("/v1/model").raise_for_status()
        upload = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        stack.callback(upload.close)
        upload.putrequest("POST", "/v1/detect")
        for name, value in (*client.headers.items(), ("content-type", "image/png"), ("content-length", "100")):
            if name.startswith(("auth", "content")):
                upload.putheader(name, value)
        upload.endheaders(b"x")
        wait_until(lambda: len(client.server.server_state.connections) == 2)
        honest = set(client.server.server_state.connections)
        for number in range(200):
            with suppress(OSError):
                stack.enter_context(connect(client.port, attacks[number % len(attacks)]))
            if number % 20 == 0:
                assert client.get("/v1/model").status_code == 200
        wait_until(lambda: len(client.server.server_state.connections) <= 40)
        assert honest <= client.server.server_state.connections
        upload.send(bytes(99))
        assert upload.getresponse().status == 415


# Broken requests


@pytest.mark.parametrize("end", [b"Content-Length: 3\r\n\r\n0\r\n\r\n", b"Content-Length: 0\r\n\r\n0\r\n\r\n"])
def test_two_framings_are_refused(client, end):
    request = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + end
    for before in (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"):  # also as the second request
        with connect(client.port, before + request + b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            text = read_all(connection)
        assert text.count(b"HTTP/1.1 ") == text.count(b"HTTP/1.1 400") + bool(before)
        assert b"Send Content-Length or Transfer-Encoding, not both." in text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:1", 200), ("localhost.", 200), ("127.1.2.3:80", 200), ("[::1]:80", 200),
        ("[::ffff:127.0.0.1]", 200), ("localhost..", 421), ("[localhost]", 421), ("[127.0.0.1]", 421), ("::1", 421),
        ("]127.0.0.1[", 421), ("127.0.0.1%evil.example", 421), ("[::1%25evil.example]", 421), ("localhost:80:80", 421),
        ("localhost:evil.example", 421), ("127.0.0.1:80.evil.example", 421), ("127.1", 421), ("", 421),
    ],
)  # fmt: skip
def test_host_names(host, status):
    with running_server() as client:
        assert client.get("/v1/model", headers={"Host": host}).status_code == status


BROKEN = (
    b"\0\1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n", CHUNKED % b"/" + b"zz\r\n",
    CHUNKED % b"/v1/detect" + b"zz\r\n", CHUNKED % b"/v1/detect" + b"1\r\na\r\nzz\r\n",
    CHUNKED % b"/healthz" + b"0\r\n\r\n\0",
    UNREAD + b"123456789\0\1\r\n\r\n", UNREAD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data\r\nContent-Length: 1\r\n\r\nx",
    b"GET /%00%0aERROR HTTP/1.1\r\nHost: localhost\r\n\r\n", b"DELETE /v1/model HTTP/1.1\r\nHost: localhost\r\n\r\n",
)  # fmt: skip


def send_broken_requests(port, rounds):
    for data in BROKEN * rounds:
        for pieces in ((data,), (data[:-3], data[-3:])):
            with connect(port) as connection, suppress(OSError):
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.01)
                connection.shutdown(socket.SHUT_WR)
                read_all(connection)


def test_broken_requests_are_no_errors_of_the_server(caplog, monkeypatch):
    monkeypatch.setattr(client_log, "filters", [])  # of a server that another test started in this process
    with running_server() as client, caplog.at_level(logging.INFO, client_log.name):
        send_broken_requests(client.port, 1)
        assert client.get("/healthz").status_code == 200
    lines = [record for record in caplog.records if record.name.startswith(("deformable_detr", "uvicorn", "asyncio"))]
    assert len(lines) > 20
    assert {(record.name, record.levelname) for record in lines} == {("deformable_detr.serve.clients", "INFO")}
    assert all("\n" not in record.getMessage() and len(record.getMessage()) < 150 for record in lines)


def test_log_of_the_server_is_short(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    server = ServerProcess(tmp_path / "model")
    try:
        send_broken_requests(int(server.address.rpartition(":")[2]), 3)
    finally:
        server.process.terminate()
        _, errors = server.wait()
    lines = errors.splitlines()
    assert 20 <= len(lines) <= 40  # 20 per minute
    assert all(line.startswith("INFO deformable_detr.serve.clients: 127.0.0.1: ") for line in lines), errors
    assert "(further errors in this minute are not logged)" in lines[19]


def test_rate_limit():
    limit, passed = RateLimit(), []
    for second in range(0, 180, 2):
        record = logging.makeLogRecord({"msg": "%d", "args": (second,), "created": 1e9 // 60 * 60 + second})
        passed += [record.getMessage()] if limit.filter(record) else []
    assert passed[:2] == ["0", "2"]
    assert passed[19] == "38 (further errors in this minute are not logged)"
    assert len(passed) == 60


# Full queues


def blank_png(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def other_client(client, address):
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=client.base_url, transport=transport, timeout=60, headers=dict(client.headers))


def test_small_images_pass_large_ones(monkeypatch):
    monkeypatch.setattr("deformable_detr.serve.engine.LARGE_IMAGE", 48 * 64)
    gate, large, small = threading.Event(), encode_image(height=96, width=96), encode_image()  # 3 places, 1 place
    with running_server(max_queue=9, images=3, pixels=96 * 96) as client, ThreadPoolExecutor(4) as pool:
        client.engine._large_reader.submit(gate.wait, 60)
        try:
            waiting = pool.submit(client.post, "/v1/detect", files=multipart(large, large, large))
            wait_until(lambda: client.engine._large_images.total() == 9)
            assert post_image(client, large).status_code == 503
            assert {post_image(client, small).status_code for _ in range(20)} == {200}
            with other_client(client, "127.0.0.2") as other:
                later = pool.submit(post_image, other, large)
                wait_until(lambda: client.engine._large_images.total() == 12)
                gate.set()
                assert (waiting.result().status_code, later.result().status_code) == (200, 200)
        finally:
            gate.set()
        assert client.engine._large_images.total() == client.engine._images.total() == 0


def test_one_client_cannot_fill_the_queue():
    model, gate = small_model(), threading.Event()
    with running_server(model, max_queue=6, images=4) as client, ThreadPoolExecutor(12) as pool:
        model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
        try:
            first = [pool.submit(post_image, client, encode_image()) for _ in range(6)]
            wait_until(lambda: client.engine._images.total() == 6)
            assert post_image(client, encode_image()).status_code == 503
            with other_client(client, "127.0.0.2") as other:
                second = [pool.submit(post_image, other, encode_image()) for _ in range(2)]
                wait_until(lambda: client.engine._images.total() == 8)
                assert post_image(other, encode_image()).status_code == 503
                gate.set()
                assert {response.result().status_code for response in first + second} == {200}
        finally:
            gate.set()


# Load


class Honest(threading.Thread):
    """Sends an image again and again on one connection. answers: (status or error, seconds)."""

    def __init__(self, port, stop, token=None, pause=0.1):
        super().__init__()
        self.port, self.stop, self.pause, self.answers = port, stop, pause, []
        self.headers = {"Content-Type": "image/png", **({"Authorization": f"Bearer {token}"} if token else {})}
        self.start()

    def run(self):
        connection, data = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60), encode_image()
        while not self.stop.wait(self.pause):
            start = time.perf_counter()
            try:
                connection.request("POST", "/v1/detect", data, self.headers)
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException) as error:
                status = repr(error)
                connection.close()
            self.answers.append((status, time.perf_counter() - start))


def flood(port, rate, seconds, request, result):
    """Open connections and keep them, as long as open files allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8000), hard))
    connections, opened, start = deque(maxlen=min(hard, 8000) - 100), 0, time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        if opened < rate * elapsed:
            with suppress(OSError):
                connections.append(connect(port, request))
            opened += 1
        else:
            time.sleep(0.001)
    result.put(opened / elapsed)


@pytest.fixture
def server_port(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    server = ServerProcess(tmp_path / "model", **{TOKEN_VARIABLE: TOKEN})
    yield int(server.address.rpartition(":")[2])
    server.process.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="limits of open files")
@pytest.mark.parametrize("request_", [UNREAD, UNREAD[:5], UNREAD.replace(b"Content-Length: 9\r\n", b"")])
def test_flood(server_port, request_):
    """500 connections per second for 20 s; three clients with the token are answered, 95% within a second."""
    result, stop = multiprocessing.Queue(), threading.Event()
    clients = [Honest(server_port, stop, TOKEN) for _ in range(3)]
    attacker = multiprocessing.Process(target=flood, args=(server_port, 500, 20, request_, result))
    attacker.start()
    rate = result.get()
    stop.set()
    attacker.join()
    for client in clients:
        client.join()
    statuses, seconds = zip(*(answer for client in clients for answer in client.answers), strict=True)
    p95 = statistics.quantiles(seconds, n=20)[-1]
    print(f"{rate:.0f} connections/s, {len(seconds)} honest requests, p95 {p95:.3f} s")
    assert rate > 450, "the attacker was too slow"
    assert set(statuses) == {200}
    assert p95 < 1


@pytest.mark.slow
@pytest.mark.alone
def test_large_images_do_not_fill_the_queue(server_port):
    """Four requests of 16 blank images of 49 megapixels at any time, beside 16 clients with small images."""
    stop, data = threading.Event(), blank_png(7000, 7000)

    def attack():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{server_port}", timeout=60, trust_env=False) as client:
            while not stop.is_set():
                statuses[client.post("/v1/detect", files=multipart(*[data] * 16), headers=headers).status_code] += 1
                time.sleep(0.2)

    statuses = Counter()
    attackers = [threading.Thread(target=attack) for _ in range(4)]
    for attacker in attackers:
        attacker.start()
    time.sleep(2)
    clients = [Honest(server_port, stop, TOKEN) for _ in range(16)]
    time.sleep(20)
    stop.set()
    for thread in (*clients, *attackers):
        thread.join()
    counts = Counter(status for client in clients for status, _ in client.answers)
    print(f"honest {dict(counts)}, attackers {dict(statuses)}")
    assert set(counts) <= {200, 503}
    assert counts[503] <= 0.05 * counts.total()
