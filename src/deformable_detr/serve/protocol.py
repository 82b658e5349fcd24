"""uvicorn's HTTP/1.1 connection with timeouts: clients that do not send or do not read are dropped."""

import asyncio
import time

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
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _close_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    _dropped = False

    @property
    def idle(self) -> bool:
        """Whether no complete request head has arrived since the last response."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._start_head_timer()
        if len(self.connections) > self.limits.connections:
            # Connections that are closing count too, as long as they have data to send.
            present = [one for one in self.connections if isinstance(one, Connection) and not one._dropped]
            if len(present) > self.limits.connections:
                longest = min((one for one in present if one.idle), key=lambda one: one._idle_since)
                longest._dropped = True
                longest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle:
            self._start_head_timer()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()
        self._start_close_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.stall_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def shutdown(self) -> None:
        super().shutdown()
        self._start_close_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_close_timer()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._start_close_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer, self._close_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._close_timer = None
        super().connection_lost(exc)

    def _start_head_timer(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_timeout, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or not self.idle:
            return
        if self.conn.our_state is h11.IDLE:
            self.transport.write(_TIMEOUT_RESPONSE)
        self.transport.close()
        self._start_close_timer()

    def _start_close_timer(self) -> None:
        """Abort a closing connection whose client does not read what is left."""
        if self.transport.is_closing() and self._close_timer is None:
            self._close_timer = self.loop.call_later(self.limits.stall_timeout, self.transport.abort)
