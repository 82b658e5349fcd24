"""uvicorn's HTTP/1.1 connection with timeouts: clients that do not send or do not read are dropped."""

import asyncio
import heapq
import logging
from contextlib import suppress
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

client_log = logging.getLogger("deformable_detr.serve.clients")  # one line per error of a client
_TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_DISCARD_PAUSE = 1.0  # seconds for the next piece of a body that nobody reads


class _LingeringTransport:
    """Closes only the sending side at first while a body arrives: closing with unread data discards the response."""

    def __init__(self, transport: asyncio.Transport, conn: h11.Connection) -> None:
        self._transport, self._conn, self.lingering = transport, conn, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self.lingering or self._conn.their_state is not h11.SEND_BODY:
            self._transport.close()
        else:
            self.lingering = True
            with suppress(OSError):  # the client has left
                self._transport.write_eof()


class Connection(H11Protocol):
    """Limits the time for a request head and for reading a response, and the number of connections.

    `uploads.read_body` limits the time for a body. uvicorn discards what is left of it after the response.
    """

    limits: Limits
    transport: Any
    # When the last step (connecting, request head, response) ended, when data arrived, and when nothing was unsent.
    _since = _received = _read = 0.0

    @property
    def idle(self) -> bool:
        """Whether no complete request head has arrived since the last response."""
        return self.cycle is None or self.cycle.response_complete

    def rank(self) -> tuple[bool, bool, float]:
        """Sort key of connections to drop: without the token first, then waiting for the client, then slowest first."""
        waiting = self.idle or self.conn.their_state is h11.SEND_BODY or self.flow.write_paused
        return bool(self.scope) and "trusted" in self.scope, not waiting, self._since

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(cast(asyncio.Transport, _LingeringTransport(transport, self.conn)))
        self._since = self._received = self._read = self.loop.time()
        self._check_timeouts()
        if len(self.connections) > self.limits.connections:  # drop several, so that not every connection searches
            present = cast(set[Connection], self.connections)
            for slowest in heapq.nsmallest(1 + self.limits.connections // 50, present, key=Connection.rank):
                present.discard(slowest)
                slowest.transport.abort()

    def data_received(self, data: bytes) -> None:
        was_idle, self._received = self.idle, self.loop.time()
        if not self.transport.lingering:
            super().data_received(data)
        if was_idle and not self.idle:
            self._since = self._received

    def handle_events(self) -> None:
        super().handle_events()
        if not self.idle and {b"content-length", b"transfer-encoding"} <= dict(self.headers).keys():
            self.send_400_response("Send Content-Length or Transfer-Encoding, not both.")

    def send_400_response(self, msg: str) -> None:
        client_log.info("%s: %s", self.client and self.client[0], msg)
        if not self.idle:  # the broken request gets no second response
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _check_timeouts(self) -> None:
        """Close the connection if a limit is exceeded; else check again soon."""
        now, limits = self.loop.time(), self.limits
        stopped = self.conn.their_state is h11.SEND_BODY and now - self._received > _DISCARD_PAUSE
        if self.flow.write_paused or self.transport.is_closing():
            if now - self._read > limits.stall_timeout:
                self.transport.abort()
        elif (self.idle or self.transport.lingering) and (stopped or now - self._since > limits.head_timeout):
            if self.conn.our_state is h11.IDLE:
                self.transport.write(_TIMEOUT_RESPONSE)
            self.transport.close()
        else:
            self._read = now
        if self in self.connections:
            self.loop.call_later(min(limits.head_timeout, limits.stall_timeout) / 10, self._check_timeouts)
