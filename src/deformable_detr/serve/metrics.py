"""Prometheus metrics of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common = {"namespace": "deformable_detr", "registry": self.registry}
        timing = {"buckets": _SECONDS, **common}
        self.requests = Counter("requests", "Requests answered.", ("path", "status"), **common)
        self.request_seconds = Histogram("request_seconds", "Duration of requests.", ("path",), **timing)
        self.images = Counter("images", "Images answered by /v1/detect.", **common)
        self.read_seconds = Histogram("read_seconds", "Time to decode and resize an image.", **timing)
        self.model_seconds = Histogram("model_seconds", "Time of the model per batch.", **timing)
        self.batch_images = Histogram("batch_images", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **common)
        self.queued = Gauge("queued_images", "Images that wait for the model.", **common)
        self.accepted = Gauge("accepted_images", "Images accepted and not answered yet.", **common)
        self.ready = Gauge("ready", "1 while /readyz answers 200.", **common)
