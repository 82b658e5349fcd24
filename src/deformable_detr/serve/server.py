"""The server process: its address, its token and its shutdown."""

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
from dataclasses import dataclass
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
from .middleware import Status, is_loopback
from .protocol import protocol_class

TOKEN_VARIABLE = "DEFORMABLE_DETR_TOKEN"
_MIN_TOKEN_LENGTH = 16
_MAX_HEAD_BYTES = 32_768


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown on SIGTERM.

    First /readyz answers 503 while requests are still accepted, then no new requests are accepted and pending ones are
    answered, then the process ends with exit code 0. Ctrl-C skips the first step, a second signal the second one too.
    """

    def __init__(self, app: Any, limits: Limits, status: Status, on_start: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            http=protocol_class(limits),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=math.ceil(limits.stall_timeout),
            timeout_graceful_shutdown=math.ceil(limits.timeout),
        )
        super().__init__(config)
        self.limits, self.status, self.on_start = limits, status, on_start
        self.interrupted = False
        self._exit_time = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGTERM and not self.status.draining:
            self._exit_time = time.monotonic() + self.limits.shutdown_delay
        else:
            self.should_exit = True
        self.interrupted |= sig == signal.SIGINT
        self.status.draining = True

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._exit_time:
            self.should_exit = True
        return await super().on_tick(counter)


def check_token(token: str | None, host: str) -> str | None:
    """Return the token, or the one of the environment variable, or None if neither is set.

    Raises:
        UserError: The token is weak or has characters that cannot be sent, or it is missing for a public host.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token is None:
        if not is_loopback(host):
            raise _token_required(host)
        return None
    if len(token) < _MIN_TOKEN_LENGTH or not all("!" <= character <= "~" for character in token):
        raise UserError(
            f"--token or {TOKEN_VARIABLE}: the token must have at least {_MIN_TOKEN_LENGTH} ASCII characters, no spaces"
        )
    return token


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Return a socket bound to the address.

    Raises:
        UserError: The address cannot be used, or it is public and there is no token.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: unknown address ({getattr(error, 'strerror', None) or error})") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}; choose another port") from None
    # A name may resolve to any address, so the address decides.
    if token is None and not is_loopback(str(listener.getsockname()[0])):
        listener.close()
        raise _token_required(host)
    return listener


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a model.

    Attributes:
        host: Address to listen on. Any but localhost needs a token.
        port: Port to listen on. 0: any free port.
        token: Required from clients. Default: the environment variable DEFORMABLE_DETR_TOKEN, if it is set.
        device: Device of the model, see `load_detector`.
        limits: Limits of requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    device: str = "auto"
    limits: Limits = Limits()  # noqa: RUF009, it is frozen


def serve(source: Path, options: ServeOptions, report: Callable[[str], None] = print) -> None:
    """Serve a model until a signal arrives.

    Args:
        source: A model folder or an exported file.
        options: Address, token, device and limits.
        report: Called with one line when the server accepts requests.

    Raises:
        UserError: The options are wrong, or the model cannot be loaded or run.
        KeyboardInterrupt: After Ctrl-C.
    """
    token = check_token(options.token, options.host)
    name, limits, status = source.resolve().name, options.limits, Status()
    with listen(options.host, options.port, token) as listener:
        address, port = listener.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        model = load_detector(source, options.device)
        optimized = model.optimize() if isinstance(model, DeformableDETR) else None
        _configure_process(limits)
        engine = Engine(model, limits, Metrics(), optimized)
        try:
            engine.start()
        except UserError:
            raise
        except Exception as error:  # runtimes and devices raise many types of errors
            raise UserError(f"{source} fails on its first image, so it is not served: {first_line(error)}") from None
        app = create_app(engine, status, token, name)
        server = Server(app, limits, status, lambda: report(f"serving {name} at {url} - press Ctrl-C to stop"))
        server.run([listener])
    if server.interrupted:
        raise KeyboardInterrupt


def _token_required(host: str) -> UserError:
    return UserError(
        f"--host {host}: others can reach this address, so a token is needed: set {TOKEN_VARIABLE} "
        '(create one: python -c "import secrets; print(secrets.token_urlsafe())")'
    )


def _configure_process(limits: Limits) -> None:
    """Change settings of the whole process, which belongs to the server."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # malformed forms are no problem of the server
    Image.MAX_IMAGE_PIXELS = limits.pixels  # a second check, for frames that are larger than their image
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        import resource
    except ImportError:
        return  # Windows has no limit on open files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.connections + 200
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
