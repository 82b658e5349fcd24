"""uvicorn's HTTP/1.1 connection with timeouts: clients that do not send or do not read are dropped."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

_TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def protocol_class(limits: Limits) -> type[H11Protocol]:
    """Return a connection class with these limits, which uvicorn instantiates."""
    return type("Connection", (Connection,), {"limits": limits})


class Connection(H11Protocol):
    """Limits the time for a request head and for reading a response, and the number of connections.

    `uploads.read_body` limits the time for a body.
    """

    limits: Limits
    _timer: asyncio.TimerHandle
    _head_since: float | None  # since when a request head is due
    _unread_since: float | None = None  # since when the client does not read what is left to send
    _idle_since = 0.0
    _dropped = False

    @property
    def idle(self) -> bool:
        """Whether no complete request head has arrived since the last response."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._idle_since = self._head_since = self.loop.time()
        self._check_timeouts()
        if len(self.connections) > self.limits.connections:
            # Connections that are closing count too, as long as they have data to send.
            present = [one for one in self.connections if isinstance(one, Connection) and not one._dropped]
            if len(present) > self.limits.connections:
                longest = min((one for one in present if one.idle), key=lambda one: one._idle_since)
                longest._dropped = True
                longest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.loop.time()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _check_timeouts(self) -> None:
        """Close the connection if a limit is exceeded; else check again soon."""
        now, limits = self.loop.time(), self.limits
        if self.flow.write_paused or self.transport.is_closing():
            self._unread_since = self._unread_since or now
            if now - self._unread_since > limits.stall_timeout:
                self.transport.abort()
        elif self._head_since is not None and now - self._head_since > limits.head_timeout:
            if self.conn.our_state is h11.IDLE:
                self.transport.write(_TIMEOUT_RESPONSE)
            self.transport.close()
        self._timer = self.loop.call_later(min(limits.head_timeout, limits.stall_timeout) / 10, self._check_timeouts)
