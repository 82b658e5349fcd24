"""uvicorn's HTTP/1.1 connection with a clock: who does not send or does not read is dropped."""

from __future__ import annotations

import asyncio
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

_LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_CLOSE_SECONDS = 2.0


def protocol(limits: Limits) -> type[H11Protocol]:
    """The class of connections with these limits; uvicorn makes the instances."""
    return type("Connection", (Connection,), {"limits": limits})


class Connection(H11Protocol):
    """Bounds the time for a request's head and for an answer to be read, and the number of connections.

    Bodies have a clock of their own, in `bodies`.
    """

    limits: Limits
    _head_clock: asyncio.TimerHandle | None = None
    _write_clock: asyncio.TimerHandle | None = None
    _close_clock: asyncio.TimerHandle | None = None
    _since = 0.0
    _dropped = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._since = time.monotonic()
        self._expect_head()
        if len(self.connections) > self.limits.connections:
            # Those that are closing too: they have not sent all yet.
            there = [one for one in self.connections if isinstance(one, Connection) and not one._dropped]
            if len(there) > self.limits.connections:
                longest = min((one for one in there if one.idle), key=lambda one: one._since)
                longest._dropped = True
                longest.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on: none came, or only a part of its head."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle:
            self._expect_head()
        elif self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()
        self._expect_close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    def shutdown(self) -> None:
        super().shutdown()
        self._expect_close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_close()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._expect_close()

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._head_clock, self._write_clock, self._close_clock):
            if clock is not None:
                clock.cancel()
        self._head_clock = self._write_clock = self._close_clock = None
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head_clock is None and not self.transport.is_closing():
            self._head_clock = self.loop.call_later(self.limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_clock = None
        if self.transport.is_closing() or not self.idle:
            return
        if self.conn.our_state is h11.IDLE:
            self.transport.write(_LATE)
        self.transport.close()
        self._expect_close()

    def _expect_close(self) -> None:
        """A close waits until all is sent; not for ever, and whether or not the client reads a little."""
        if self.transport.is_closing() and self._close_clock is None:
            self._close_clock = self.loop.call_later(self.limits.stall_seconds, self.transport.abort)
