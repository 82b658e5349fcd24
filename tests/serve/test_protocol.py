"""Slow clients are disconnected in time and do not delay others."""

import socket
import statistics
import time
from contextlib import ExitStack, suppress

import pytest

from tests.support.server import encode_image, post_image, running_server, wait_until

pytestmark = pytest.mark.alone

HEAD = b"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
LIMITS = {"head_timeout": 0.5, "stall_timeout": 0.5, "body_timeout": 1.5}


def connect(client):
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    connection.settimeout(10)
    return connection


def read_all(connection):
    """Read until the server closes; return the bytes and the seconds."""
    start_time, text = time.monotonic(), b""
    try:
        while chunk := connection.recv(65536):
            text += chunk
    except ConnectionResetError:
        pass
    return text, time.monotonic() - start_time


@pytest.fixture(scope="module")
def client():
    with running_server(**LIMITS) as client:
        yield client


@pytest.mark.parametrize("start", [b"", b"GET /hea", HEAD])
def test_head_timeout(client, start):
    with connect(client) as connection:
        connection.sendall(start)
        text, seconds = read_all(connection)
    assert 0.3 < seconds < 5
    assert text.startswith(b"HTTP/1.1 408")


def test_second_head_timeout(client):
    with connect(client) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /")
        text, seconds = read_all(connection)
    assert 0.3 < seconds < 5
    assert text.startswith(b"HTTP/1.1 200")


def test_slow_head(client):
    start_time = time.monotonic()
    with connect(client) as connection:
        for letter in HEAD * 10:
            try:
                connection.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.05)
    assert time.monotonic() - start_time < 5


def test_endless_head(client):
    with connect(client) as connection:
        connection.sendall(HEAD + b"A: " + b"b" * 100_000)
        assert b" 400 " in read_all(connection)[0].split(b"\r\n")[0]


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"]
)
def test_stalled_body(client, framing):
    with connect(client) as connection:
        connection.sendall(HEAD + framing + b"ab")
        text, seconds = read_all(connection)
    assert text.startswith(b"HTTP/1.1 408")
    assert b"did not arrive in time" in text
    assert seconds < 8


def test_slow_body(client):
    start_time = time.monotonic()
    with connect(client) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        connection.setblocking(False)
        text = b""
        while time.monotonic() - start_time < 10 and not text:
            connection.sendall(b"x")
            time.sleep(0.1)
            with suppress(BlockingIOError):
                text = connection.recv(1000)
    assert text.startswith(b"HTTP/1.1 408")
    assert 1 < time.monotonic() - start_time < 8


def test_steady_body_is_accepted(client):
    data = encode_image()
    with connect(client) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data))
        for part in range(4):
            connection.sendall(data[part * len(data) // 4 : (part + 1) * len(data) // 4])
            time.sleep(0.2)
        assert read_all(connection)[0].startswith(b"HTTP/1.1 200")


def test_two_hundred_slow_clients_do_not_delay_others():
    with ExitStack() as stack, running_server(head_timeout=30, stall_timeout=30, body_timeout=30) as client:
        slow_connections = [stack.enter_context(connect(client)) for _ in range(200)]
        for number, connection in enumerate(slow_connections):
            connection.sendall((b"GET /h", HEAD, HEAD + b"Content-Length: 19000000\r\n\r\nx", b"")[number % 4])
        wait_until(lambda: len(client.server.server_state.connections) >= 200)
        waits = []
        for connection in slow_connections:
            connection.sendall(b"a")
            start_time = time.perf_counter()
            assert client.get("/healthz").status_code == 200
            waits.append(time.perf_counter() - start_time)
        assert statistics.median(waits) < 1, "the median tolerates a loaded machine"
        assert post_image(client, encode_image()).status_code == 200
        for connection in slow_connections:
            connection.close()
        wait_until(lambda: len(client.server.server_state.connections) <= 1)


def test_longest_idle_connection_is_closed():
    with running_server(connections=5, head_timeout=30) as client, ExitStack() as stack:
        assert client.get("/healthz").status_code == 200
        slow_connections = [stack.enter_context(connect(client)) for _ in range(20)]
        for connection in slow_connections:
            with suppress(OSError):
                connection.sendall(b"GET ")
            time.sleep(0.01)
        wait_until(lambda: len(client.server.server_state.connections) <= 5)
        with connect(client) as new_connection:
            new_connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert read_all(new_connection)[0].startswith(b"HTTP/1.1 200")
        assert read_all(slow_connections[0])[0] == b""


def test_unread_response(client):
    request = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", client.port))
        connection.settimeout(0.2)
        start_time = time.monotonic()
        with suppress(ConnectionError, TimeoutError):
            while time.monotonic() - start_time < 10:
                connection.sendall(request * 20)
        assert time.monotonic() - start_time < 10  # the server stopped reading or disconnected
        before = client.server.server_state.connections
        wait_until(lambda: all(connection.transport.get_write_buffer_size() == 0 for connection in before), 8)
    assert client.get("/healthz").status_code == 200


def test_expect_continue(client):
    """A client that waits for "100 Continue" gets an error or the permission at once."""
    data = encode_image()
    with connect(client) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 30000000\r\n\r\n")
        assert read_all(connection)[0].startswith(b"HTTP/1.1 413")
    with connect(client) as connection:
        length = b"Content-Length: %d\r\n" % len(data)
        connection.sendall(HEAD + b"Expect: 100-continue\r\nConnection: close\r\n" + length + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(data)
        assert read_all(connection)[0].startswith(b"HTTP/1.1 200")


def test_small_unread_responses(client):
    """Responses below the size at which the transport pauses writing."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before = set(client.server.server_state.connections)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", client.port))
        wait_until(lambda: client.server.server_state.connections - before)
        (protocol,) = client.server.server_state.connections - before
        for _ in range(1000):
            if protocol.transport.get_write_buffer_size():
                break
            connection.sendall(request)
            time.sleep(0.004)
        assert 0 < protocol.transport.get_write_buffer_size() < 65536
        wait_until(lambda: protocol not in client.server.server_state.connections, 20)
