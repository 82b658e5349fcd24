"""ASGI middleware for access control, response headers and metrics."""

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Set
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from .engine import Engine
from .protocol import client_log

_log = logging.getLogger(__name__)
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
_HOST = re.compile(r"(\[[0-9a-f]*:[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]*)?")  # an IPv6 address or a name, and a port


class AccessMiddleware:
    """Check token, host and origin, add security headers, count requests and log the errors of clients.

    Args:
        app: The ASGI application.
        engine: Provides the metrics and whether the server is about to shut down.
        token: Required for /v1 and /metrics as `Authorization: Bearer TOKEN`. If None, only requests to localhost are
            served, so that no web page can reach the server through a host name of its own (DNS rebinding).
        origins: Sites whose pages may send requests without a token; "*": all.
    """

    def __init__(self, app: Any, engine: Engine, token: str | None, origins: Set[str] = frozenset()) -> None:
        self.app, self.engine, self.origins = app, engine, origins
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if self.engine.draining:
                    headers["connection"] = "close"
            await send(message)

        async def refuse(code: int, detail: str) -> None:
            headers = {"www-authenticate": "Bearer"} if code == 401 else None
            await JSONResponse({"detail": detail}, code, headers)(scope, receive, send_with_headers)

        try:
            if refusal := self._refusal(scope):
                await refuse(*refusal)
            else:
                await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass  # counted as 499
        except Exception:
            _log.exception("%s %s failed", scope["method"], _route(scope))
            if not status:  # otherwise the response is incomplete, and uvicorn closes the connection
                await refuse(500, "internal error; see the server's log")
        finally:
            if 400 <= status < 499:
                client, path = scope["client"] or ("-",), scope["raw_path"][:80].decode("latin-1")
                client_log.info("%s: %s %s: %d", client[0], scope["method"], path, status)
            self.engine.metrics.requests.labels(_route(scope), str(status or 499)).inc()
            self.engine.metrics.request_seconds.labels(_route(scope)).observe(time.perf_counter() - start)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Return status and reason if the request is not allowed."""
        path, headers = scope["path"], dict(scope["headers"])
        if self._token is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer":
                scope["trusted"] = True  # its connection is dropped last
            elif path.startswith("/v1/") or path == "/metrics":
                return 401, "send Authorization: Bearer TOKEN"
            return None
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        name = _HOST.fullmatch(host)
        if name is None or not is_loopback(name[1].strip("[]")):
            return 421, "this server answers only to localhost; start it with a token to use other host names"
        cross_site = bool(origin) and origin.partition("://")[2] != host and not self.origins & {origin, "*"}
        if cross_site and scope["method"] not in ("GET", "HEAD"):
            return 403, "pages of other sites may not use this server"
        return None


def _route(scope: Any) -> str:
    """The path of the route; clients can request any number of others."""
    return getattr(scope.get("route"), "path", "other")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is localhost."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
