"""The server as a program: what it listens at, and how it leaves."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from ..detector import DeformableDETR, load_detector
from ..utils.errors import UserError, first_line
from .app import create_app
from .engine import Engine
from .limits import Limits
from .metrics import Metrics
from .middleware import Status, is_here
from .protocol import protocol

TOKEN_VARIABLE = "DEFORMABLE_DETR_TOKEN"
_LEAST_TOKEN = 16  # characters
_HEAD_BYTES = 32_768


class Server(uvicorn.Server):
    """uvicorn's, that leaves in three steps after SIGTERM: /readyz says no while requests are still taken, then nothing
    new is taken and what was taken is answered, then it ends, with exit code 0.

    Ctrl-C leaves out the first step, a second signal the second one too.
    """

    def __init__(self, app: Any, limits: Limits, status: Status) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_keep_alive=math.ceil(limits.stall_seconds),
            timeout_graceful_shutdown=math.ceil(limits.deadline),
        )
        super().__init__(config)
        self.limits, self.status = limits, status
        self.interrupted = False
        self._leave_at = math.inf

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGTERM and not self.status.draining:
            self._leave_at = time.monotonic() + self.limits.drain_seconds
        else:
            self.should_exit = True
        self.interrupted |= sig == signal.SIGINT
        self.status.draining = True

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)


def check_token(token: str | None, host: str) -> str | None:
    """The token: the one given, or that of the environment; none where neither is there.

    Raises UserError for one that is easily guessed, cannot be sent, or is missing where others can reach the host.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if not token:
        if token is not None:
            raise UserError(f"the token is empty; give one, or unset {TOKEN_VARIABLE}")
        if not is_here(host):
            raise UserError(
                f"--host {host}: others can reach it, so a token is needed: set {TOKEN_VARIABLE} "
                '(python -c "import secrets; print(secrets.token_urlsafe())" makes one)'
            )
        return None
    if len(token) < _LEAST_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise UserError(f"the token must have {_LEAST_TOKEN} or more letters, digits and signs, and no blanks")
    return token


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket bound to the address. Raises UserError where that cannot be, or is open to others without a token."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no such address here ({getattr(error, 'strerror', None) or error})") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen at {host} port {port}: {error.strerror or error}; choose another") from None
    # What the name led to counts, not what it looked like.
    if token is None and not is_here(str(listener.getsockname()[0])):
        listener.close()
        raise UserError(f"--host {host}: others can reach it, so a token is needed: set {TOKEN_VARIABLE}")
    return listener


def serve(
    source: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str = "auto",
    limits: Limits = Limits(),  # noqa: B008, it is frozen
    report: Callable[[str], None] = print,
) -> None:
    """Serves a model until a signal comes.

    source: a model's folder or an exported file. host, port: where to listen; port 0: any that is free.
    token: what requests must bring; none: that of the environment variable DEFORMABLE_DETR_TOKEN, if it is set.
    report: gets one line when requests are taken.
    Raises UserError before anything is served, KeyboardInterrupt after Ctrl-C.
    """
    token = check_token(token, host)
    listener = listen(host, port, token)
    with listener:
        model = load_detector(source, device)
        fast = model.optimize() if isinstance(model, DeformableDETR) else None
        _harden(limits)
        status, metrics = Status(), Metrics()
        name = source.resolve().name
        engine = Engine(model, limits, metrics, fast)
        try:
            engine.start()
        except UserError:
            raise
        except Exception as error:  # whatever a runtime or a device raises at its first image
            line = first_line(error)
            raise UserError(f"{source} fails at its first image, so it is not served: {line[:200]}") from None
        server = Server(create_app(engine, status, token, name), limits, status)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        started = server.startup

        async def startup(sockets: list[socket.socket] | None = None) -> None:
            await started(sockets)
            report(f"serving {name} at http://{shown}:{number} - Ctrl-C stops")

        server.startup = startup
        server.run([listener])
    if server.interrupted:
        raise KeyboardInterrupt


def _harden(limits: Limits) -> None:
    """Settings of the whole process, which is the server's own."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # broken forms are the client's affair
    Image.MAX_IMAGE_PIXELS = limits.pixels  # a second check, for frames that are larger than their picture
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
