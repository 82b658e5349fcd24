"""The limits of a server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What clients may ask for. Sizes are in bytes, times in seconds.

    Attributes:
        body_bytes: Maximum size of a request body.
        total_body_bytes: Maximum size of all request bodies in memory.
        pixels: Maximum width × height of an image, from its header.
        images: Maximum images per request.
        max_queue: Maximum images accepted and not answered yet; further requests get 503.
        max_explanations: Maximum explanations in progress, each of which holds a whole image.
        max_batch_size: Maximum images per pass of the model.
        batch_wait: How long the first image of a batch waits for others.
        timeout: From the end of the request body to the response; then the request gets 504.
        head_timeout: For the head of a request.
        stall_timeout: Between two pieces of a body, or while a client does not read its response.
        body_timeout: For a whole body.
        connections: Maximum connections; beyond it, the connection that has been idle longest is dropped.
        shutdown_delay: How long after SIGTERM requests are still accepted while /readyz answers 503.
    """

    body_bytes: int = 20_000_000
    total_body_bytes: int = 320_000_000
    pixels: int = 50_000_000
    images: int = 16
    max_queue: int = 64
    max_explanations: int = 4
    max_batch_size: int = 8
    batch_wait: float = 0.004
    timeout: float = 30.0
    head_timeout: float = 10.0
    stall_timeout: float = 10.0
    body_timeout: float = 60.0
    connections: int = 1000
    shutdown_delay: float = 1.0
