"""What every request passes first: who may enter, and what every answer carries."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .limits import Limits
from .metrics import Metrics

_log = logging.getLogger(__name__)

_CONTENT = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; " \
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # fmt: skip
_ALWAYS = (
    (b"content-security-policy", _CONTENT.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
)
_LINGER_SECONDS = 3.0


@dataclass
class Status:
    """Of the whole server. draining: it is about to leave; /readyz says so, answers ask to close the connection."""

    draining: bool = False


class AccessMiddleware:
    """ASGI middleware: token, host and origin; headers; a close that lets the client read the answer first; figures.

    token: what /v1 and /metrics ask for as `Authorization: Bearer TOKEN`; none: nothing is asked for, and only requests
        that name this machine itself as their host are served, so that no web page can reach the server by a name of
        its own that leads here.
    """

    def __init__(self, app: Any, limits: Limits, status: Status, metrics: Metrics, token: str | None) -> None:
        self.app, self.limits, self.status, self.metrics = app, limits, status, metrics
        self._secret = None if token is None else _digest(token.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _RequestHandler(self, scope, receive, send).run()

    def refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason where the request may not enter."""
        path: str = scope["path"]
        if self._secret is not None:
            if not (path.startswith("/v1/") or path == "/metrics"):
                return None
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Digests are compared: they are equally long whatever was given, so time tells nothing.
            right = hmac.compare_digest(_digest(given.strip()), self._secret)
            return None if right and kind.lower() == b"bearer" else (401, "send Authorization: Bearer TOKEN")
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_here(_host_name(host)):
            return 421, "this server answers only to localhost; start it with a token to use other names"
        origin = headers.get(b"origin")
        foreign = origin is not None and _site(origin) != host.lower()
        if foreign and scope["method"] not in ("GET", "HEAD"):
            return 403, "pages of other sites may not use this server"
        return None


class _RequestHandler:
    """One request and its answer."""

    def __init__(self, door: AccessMiddleware, scope: Any, receive: Any, send: Any) -> None:
        self.door, self.scope, self._receive, self._send = door, scope, receive, send
        self.headers = dict(scope["headers"])
        self.unread = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"
        self.status = 0

    async def run(self) -> None:
        began = time.perf_counter()
        try:
            refused = self.door.refusal(self.scope, self.headers)
            if refused is None:
                await self.door.app(self.scope, self.receive, self.send)
            else:
                await self._refuse(*refused)
        except Exception:
            _log.exception("%s %s failed", self.scope["method"], self._path)
            if self.status:  # half an answer cannot be taken back; the connection is closed
                raise
            await self._refuse(500, "internal error; the server's log tells more")
        finally:
            metrics = self.door.metrics
            metrics.requests.labels(self._path, str(self.status or 499)).inc()
            metrics.request_seconds.labels(self._path).observe(time.perf_counter() - began)

    @property
    def _path(self) -> str:
        """The route's, of which there are few; clients make up any number of others."""
        return getattr(self.scope.get("route"), "path", "other")

    async def receive(self) -> Any:
        message = await self._receive()
        if not message.get("more_body", False):
            self.unread = False
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name for name, _ in message["headers"]}
            extra = [pair for pair in _ALWAYS if pair[0] not in given]
            if self.unread or self.door.status.draining:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *extra]}
        elif self.unread and not message.get("more_body", False):
            # The answer is out; a close with bytes of the client's unread would make its system throw the answer away.
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        """Throws away what the client still sends, for a while."""
        if b"expect" in self.headers:  # it waits for our word before it sends
            return
        left = 4 * self.door.limits.body_bytes
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while self.unread and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass

    async def _refuse(self, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def is_here(host: str) -> bool:
    """Whether a name or an address means this machine itself and nothing else."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host_name(header: str) -> str:
    """Of a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


def _site(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
