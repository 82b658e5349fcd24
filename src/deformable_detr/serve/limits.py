"""What the server bears, and how it says no."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..utils.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients can ask for. Sizes in bytes, times in seconds.

    body_bytes: of one request. held_bytes: of all bodies that are held at one time.
    pixels: of one image, by its header. images: in one request.
    waiting: images that were taken and are not answered yet; beyond it requests are refused with 503.
    explaining: the same for explanations, which hold whole images.
    batch: images that go through the model together; batch_wait: how long the first of them waits for others.
    deadline: from the whole body to the answer; after it 504.
    head_seconds: for a request's head. stall_seconds: between two pieces of a body, or of an answer being read.
    body_seconds: for a whole body.
    connections: at one time; then those that keep us waiting longest are dropped.
    drain_seconds: how long, after SIGTERM, requests are still taken while /readyz already says no.
    """

    body_bytes: int = 20_000_000
    held_bytes: int = 320_000_000
    pixels: int = 50_000_000
    images: int = 16
    waiting: int = 64
    explaining: int = 4
    batch: int = 8
    batch_wait: float = 0.004
    deadline: float = 30.0
    head_seconds: float = 10.0
    stall_seconds: float = 10.0
    body_seconds: float = 60.0
    connections: int = 1000
    drain_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("images", 1), ("waiting", self.images), ("explaining", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} is under {least}")
        for name in ("deadline", "head_seconds", "stall_seconds", "body_seconds", "batch_wait", "drain_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} {value} must be a number of seconds")


class HttpError(Exception):
    """A request that is not served: an HTTP status and one line that says why.

    retry_after: seconds after which it may go better.
    """

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class ClientDisconnected(Exception):
    """The client went away; nobody reads the answer."""
