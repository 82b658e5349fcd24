"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The figures of one server, apart from any other's in the process."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        ours = {"namespace": "deformable_detr", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ("path", "status"), **ours)
        self.request_seconds = Histogram(
            "request_seconds", "From a request's head to its answer.", ("path",), buckets=_SECONDS, **ours
        )
        self.images = Counter("images", "Images in which objects were looked for.", **ours)
        self.read_seconds = Histogram("read_seconds", "To read and resize an image.", buckets=_SECONDS, **ours)
        self.model_seconds = Histogram("model_seconds", "Of the model on a batch.", buckets=_SECONDS, **ours)
        self.batch_images = Histogram("batch_images", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **ours)
        self._queue = Gauge("queue_images", "Images that wait for the model.", **ours)
        self._taken = Gauge("taken_images", "Images that were taken and are not answered.", **ours)
        self.ready = Gauge("ready", "1 while /readyz says yes.", **ours)

    def watch(self, queue: Callable[[], int], taken: Callable[[], int]) -> None:
        """Where the two gauges are read when they are asked for."""
        self._queue.set_function(queue)
        self._taken.set_function(taken)

    def text(self) -> bytes:
        return generate_latest(self.registry)
