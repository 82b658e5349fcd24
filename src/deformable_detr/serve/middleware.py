"""ASGI middleware for access control, response headers and metrics."""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Set
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse

from .engine import Engine

_log = logging.getLogger(__name__)

_CONTENT_SECURITY_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _CONTENT_SECURITY_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
)
_DRAIN_SECONDS = 3.0


class AccessMiddleware:
    """Check token, host and origin, add security headers, count requests, and let clients read early responses.

    Args:
        app: The ASGI application.
        engine: Provides the limits, the metrics and whether the server is about to shut down.
        token: Required for /v1 and /metrics as `Authorization: Bearer TOKEN`. If None, only requests to localhost are
            served, so that no web page can reach the server through a host name of its own (DNS rebinding).
        origins: Sites whose pages may send requests without a token; "*": all.
    """

    def __init__(self, app: Any, engine: Engine, token: str | None, origins: Set[str] = frozenset()) -> None:
        self.app, self.engine, self.origins = app, engine, origins
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _RequestHandler(self, scope, receive, send).run()

    def refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Return status and reason if the request is not allowed."""
        path: str = scope["path"]
        if self._token is not None:
            if not (path.startswith("/v1/") or path == "/metrics"):
                return None
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            valid = hmac.compare_digest(token.strip(), self._token)
            return None if valid and scheme.lower() == b"bearer" else (401, "send Authorization: Bearer TOKEN")
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        if not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
            return 421, "this server answers only to localhost; start it with a token to use other host names"
        cross_site = bool(origin) and origin.partition("://")[2] != host and not self.origins & {origin, "*"}
        if cross_site and scope["method"] not in ("GET", "HEAD"):
            return 403, "pages of other sites may not use this server"
        return None


class _RequestHandler:
    """One request and its response."""

    def __init__(self, middleware: AccessMiddleware, scope: Any, receive: Any, send: Any) -> None:
        self.middleware, self.scope, self._receive, self._send = middleware, scope, receive, send
        self.headers = dict(scope["headers"])
        self.unread = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"
        self.status = 0

    async def run(self) -> None:
        start = time.perf_counter()
        try:
            refusal = self.middleware.refusal(self.scope, self.headers)
            if refusal is None:
                await self.middleware.app(self.scope, self.receive, self.send)
            else:
                await self._refuse(*refusal)
        except Exception:
            _log.exception("%s %s failed", self.scope["method"], self._path)
            if self.status:  # the response has begun, so the connection must be closed
                raise
            await self._refuse(500, "internal error; see the server's log")
        finally:
            metrics = self.middleware.engine.metrics
            metrics.requests.labels(self._path, str(self.status or 499)).inc()
            metrics.request_seconds.labels(self._path).observe(time.perf_counter() - start)

    @property
    def _path(self) -> str:
        """The path of the route; clients can request any number of others."""
        return getattr(self.scope.get("route"), "path", "other")

    async def receive(self) -> Any:
        message = await self._receive()
        if not message.get("more_body", False):
            self.unread = False
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name for name, _ in message["headers"]}
            extra = [header for header in _HEADERS if header[0] not in present]
            if self.unread or self.middleware.engine.draining:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *extra]}
        elif self.unread and not message.get("more_body", False):
            # Closing a connection with unread data would make the client's system discard the response.
            await self._send({**message, "more_body": True})
            await self._discard_body()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _discard_body(self) -> None:
        """Read and drop what the client still sends, within limits."""
        if b"expect" in self.headers:  # the client waits for "100 Continue" before it sends
            return
        remaining = 4 * self.middleware.engine.limits.body_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self.unread and remaining > 0:
                    remaining -= len((await self.receive()).get("body", b""))

    async def _refuse(self, status: int, detail: str) -> None:
        headers = {"www-authenticate": "Bearer"} if status == 401 else None
        await JSONResponse({"detail": detail}, status, headers)(self.scope, self.receive, self.send)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is localhost."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
