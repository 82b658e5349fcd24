"""The server process: address, token, options and shutdown."""

import signal
import socket
import sys
import threading
import time

import httpx
import pytest

from deformable_detr.cli import main
from deformable_detr.serve.limits import Limits
from deformable_detr.serve.middleware import is_loopback
from deformable_detr.serve.server import TOKEN_VARIABLE, check_token, listen
from deformable_detr.utils.errors import UserError
from tests.support.server import ServerProcess, encode_image, small_model

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("LOCALHOST.", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
        ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("", False), ("192.168.1.2", False),
        ("localhost.example", False), ("127.0.0.1.example", False), ("::ffff:10.0.0.1", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "photos.example"])
def test_public_hosts_need_a_token(host, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))])
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        listen(host, 0, None)


def test_token_from_the_environment(monkeypatch):
    assert check_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN + "2")
    assert check_token(None) == TOKEN + "2"
    assert check_token(TOKEN) == TOKEN


@pytest.mark.parametrize(
    "token", ["", "short", "fifteen-letters", "with a blank in it", "ümläütümläütümläüt", "x" * 20 + "\n"]
)
def test_invalid_tokens(token, monkeypatch):
    with pytest.raises(UserError, match="token"):
        check_token(token)
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match="token"):
        check_token(None)


def test_resolved_address_must_be_loopback(monkeypatch):
    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: original("0.0.0.0", *a, **k))
    with pytest.raises(UserError, match="token"):
        listen("localhost", 0, None)
    listen("localhost", 0, TOKEN).close()


def test_invalid_addresses():
    with listen("127.0.0.1", 0, None) as first:
        first.listen()
        with pytest.raises(UserError, match=r"127\.0\.0\.1 --port \d+: cannot listen there"):
            listen("127.0.0.1", first.getsockname()[1], None)
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid --port 0: cannot listen there"):
        listen("no.such.host.invalid", 0, TOKEN)


@pytest.mark.parametrize(
    ("option", "value"),
    [("port", "70000"), ("max-batch-size", "0"), ("max-queue", "0"), ("timeout", "inf"), ("shutdown-delay", "-1")],
)
def test_invalid_options(option, value, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(tmp_path), f"--{option}={value}"])
    assert caught.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


def test_missing_packages(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(tmp_path)])
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err == "error: prometheus_client is not installed: pip install 'deformable-detr[serve]'\n"
    )


def test_public_host_without_token_is_rejected_before_loading(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(tmp_path / "missing"), "--host", "0.0.0.0"])
    assert caught.value.code == 2
    assert "a token is needed" in capsys.readouterr().err


@pytest.fixture
def start_server(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    started = []

    def start(*options, **environment):
        started.append(ServerProcess(tmp_path / "model", *options, **environment))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_model_that_fails_on_its_first_image(tmp_path, monkeypatch):
    from deformable_detr.serve import server

    model = small_model()
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    monkeypatch.setattr(server, "load_detector", lambda *_: model)
    monkeypatch.setattr(type(model), "optimize", lambda self: self)
    with pytest.raises(UserError, match="fails on its first image, so it is not served: division by zero"):
        server.serve(tmp_path, "127.0.0.1", 0, None, "cpu", Limits())


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_under_load_loses_no_request(start_server):
    """Clients send until /readyz fails, as behind a load balancer; a connection refused later is theirs to retry."""
    server = start_server("--shutdown-delay", "3", "--max-batch-size", "2", **{TOKEN_VARIABLE: TOKEN})
    address, headers = server.address, {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
    statuses, problems, stopping = [], [], threading.Event()
    not_ready = []

    def load(seed):
        data = encode_image(seed=seed)
        with httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False) as client:
            while 503 not in not_ready:
                try:
                    response = client.post("/v1/detect", content=data)
                except httpx.ConnectError:  # the socket is closed, so no request was accepted
                    assert stopping.is_set()
                    return
                except httpx.HTTPError as error:
                    problems.append(repr(error))
                    return
                statuses.append(response.status_code)

    clients = [threading.Thread(target=load, args=(seed,)) for seed in range(8)]
    for client in clients:
        client.start()
    while len(statuses) < 20:
        time.sleep(0.01)
    before = len(statuses)
    stopping.set()
    server.signal(signal.SIGTERM)
    try:
        while True:
            not_ready.append(httpx.get(f"{address}/readyz", timeout=10, trust_env=False).status_code)
            time.sleep(0.02)
    except httpx.HTTPError:
        pass
    for client in clients:
        client.join(60)
    code, errors = server.wait()
    assert code == 0, errors
    assert problems == []
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > before  # requests were served while draining
    assert 503 in not_ready
    assert TOKEN not in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c(start_server):
    server = start_server()
    assert httpx.get(f"{server.address}/readyz", trust_env=False).status_code == 200
    server.signal(signal.SIGINT)
    code, errors = server.wait()
    assert (code, errors) == (130, "")
