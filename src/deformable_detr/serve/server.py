"""The server process: its address, its token and its shutdown."""

import logging
import math
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from ..detector import load_detector
from ..utils.errors import UserError, first_line
from ..utils.tiles import Tiling
from .app import create_app
from .engine import Engine
from .limits import Limits
from .middleware import is_loopback
from .protocol import Connection, client_log

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "DEFORMABLE_DETR_TOKEN"
_MAX_HEAD_BYTES = 32_768


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown on SIGTERM.

    First /readyz answers 503 while requests are still accepted, then no new requests are accepted and pending ones are
    answered, then the process ends with exit code 0. Ctrl-C skips the first step, a second signal the second one too.
    """

    def __init__(self, app: FastAPI, engine: Engine, message: str) -> None:
        limits = engine.limits
        config = uvicorn.Config(
            app,
            http=type("Connection", (Connection,), {"limits": limits}),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="error",  # its warnings are about clients, which `client_log` counts
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=16,  # connections that asyncio accepts before it continues with others
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            timeout_keep_alive=math.ceil(limits.stall_timeout),
            timeout_graceful_shutdown=math.ceil(limits.timeout),
        )
        super().__init__(config)
        self.engine, self.message, self.interrupted, self._exit_time = engine, message, False, math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(2048)  # more connections may wait
        print(self.message)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGTERM and not self.engine.draining:
            self._exit_time = time.monotonic() + self.engine.limits.shutdown_delay
        else:
            self.should_exit = True
        self.interrupted |= sig == signal.SIGINT
        self.engine.draining = True

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._exit_time:
            self.should_exit = True
        return await super().on_tick(counter)


def check_token(token: str | None) -> str | None:
    """Return the token, or the one of the environment variable, or None if neither is set.

    Raises:
        UserError: The token is weak or has characters that cannot be sent.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token is not None and not re.fullmatch(r"[!-~]{16,}", token):
        raise UserError(f"--token or {TOKEN_VARIABLE}: the token must have at least 16 ASCII characters, no spaces")
    return token


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Return a socket bound to the address.

    Raises:
        UserError: The address cannot be used, or it is public and there is no token.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        # A name may resolve to any address, so the address decides.
        if token is None and not is_loopback(str(address[0])):
            raise UserError(
                f"--host {host}: others can reach this address, so a token is needed: set {TOKEN_VARIABLE} "
                '(create one: python -c "import secrets; print(secrets.token_urlsafe())")'
            )
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}; choose another") from None
    return listener


def check_origins(origins: Sequence[str], token: str | None) -> None:
    """Warn if pages of all sites may use the server.

    Raises:
        UserError: An origin is not in the form in which browsers send it.
    """
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?", origin):
            raise UserError(f"--allow-origin {origin}: write it as https://example.org, in lower case, without a path")
    if "*" in origins:
        who = "that has the token" if token else "that a browser on this machine opens"
        log.warning("--allow-origin *: any web page %s can use this server; name the origins to restrict it", who)


def serve(
    source: Path,
    host: str,
    port: int,
    token: str | None,
    device: str,
    limits: Limits,
    origins: Sequence[str] = (),
    tiling: Tiling | None = None,
) -> None:
    """Serve a model until a signal arrives and print one line when it accepts requests.

    Args:
        source: A model folder or an exported file.
        port: Port to listen on. 0: any free port.
        token: Required from clients, and by hosts other than localhost. Default: `TOKEN_VARIABLE`, if it is set.
        origins: See `create_app`.
        tiling: See `Engine`.

    Raises:
        UserError: An argument is wrong, or the model cannot be loaded or run.
        KeyboardInterrupt: After Ctrl-C.
    """
    token, name = check_token(token), source.resolve().name
    check_origins(origins, token)
    with listen(host, port, token) as listener:
        address, port = listener.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        model = load_detector(source, device)
        _configure_process(limits)
        engine = Engine(model, limits, model.optimize(), tiling)
        try:
            engine.start()
        except Exception as error:  # runtimes and devices raise many types of errors
            raise UserError(f"{source} fails on its first image, so it is not served: {first_line(error)}") from None
        app = create_app(engine, token, name, origins)
        server = Server(app, engine, f"serving {name} at {url} - press Ctrl-C to stop")
        server.run([listener])
    if server.interrupted:
        raise KeyboardInterrupt


class RateLimit(logging.Filter):
    """Passes `limit` records per minute."""

    limit, _count, _minute = 20, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        minute = int(record.created // 60)
        self._count, self._minute = self._count + 1 if minute == self._minute else 1, minute
        if self._count == self.limit:
            record.msg += " (further errors in this minute are not logged)"
        return self._count <= self.limit


def _configure_process(limits: Limits) -> None:
    """Change settings of the whole process, which belongs to the server."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    client_log.setLevel(logging.INFO)
    client_log.addFilter(RateLimit())
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # malformed forms are no problem of the server
    Image.MAX_IMAGE_PIXELS = limits.pixels  # a second check, for frames that are larger than their image
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about the images of clients
    try:
        import resource
    except ImportError:
        return  # Windows has no limit on open files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.connections + 200
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
