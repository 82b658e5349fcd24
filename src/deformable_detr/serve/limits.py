"""The limits of a server."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What clients may ask for. Sizes are in bytes, times in seconds."""

    body_bytes: int = 20_000_000  # of a request
    total_body_bytes: int = 320_000_000  # of all requests in memory
    pixels: int = 50_000_000  # width × height of an image, from its header
    images: int = 16  # per request
    max_queue: int = 64  # images of a client not answered yet, and as many places for large ones; then it gets 503
    max_explanations: int = 4  # in progress, each of which holds a whole image; likewise requests with tiles
    tiles: int = 256  # per image
    max_batch_size: int = 8  # images per pass of the model
    batch_wait: float = 0.004  # of the first image of a batch for others
    timeout: float = 30.0  # from the end of the request body to the response; then the request gets 504
    head_timeout: float = 10.0  # for the head of a request
    stall_timeout: float = 10.0  # between two pieces of a body, or while a client does not read its response
    body_timeout: float = 60.0  # for a whole body
    connections: int = 1000  # beyond it, those without the token are dropped first, then the slowest
    shutdown_delay: float = 1.0  # after SIGTERM, while requests are still accepted and /readyz answers 503


class Shares(Counter[str]):
    """What each client holds of a limited amount: at most a share. All clients together may hold a third more."""

    def __init__(self, share: int) -> None:
        super().__init__()
        self.share, self.limit = share, share * 4 // 3

    def allows(self, client: str, amount: int) -> bool:
        """Return whether the client may hold this much more."""
        return self.total() + amount <= self.limit and self[client] + amount <= self.share

    def add(self, client: str, amount: int) -> None:
        self += Counter({client: amount})  # drops clients that hold nothing
