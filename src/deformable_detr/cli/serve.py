"""`deformable-detr serve`."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from ..utils.packages import need
from ..utils.tiles import DEFAULT_OVERLAP, check_tiling
from .options import Device, Model, Positive, Tile, TileOverlap

Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]
Seconds = Annotated[float, Parameter(validator=Number(gte=0, lte=86400))]


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: Port = 8000,
    token: str | None = None,
    device: Device = "auto",
    max_batch_size: Positive = 8,
    max_queue: Positive = 64,
    timeout: Seconds = 30.0,
    shutdown_delay: Seconds = 1.0,
    tile: Tile = None,
    tile_overlap: TileOverlap = DEFAULT_OVERLAP,
    allow_origin: Annotated[list[str] | None, Parameter(negative=())] = None,
) -> None:
    """Serve a model over HTTP, with a web page. Only this machine can reach it unless --host is set.

    Args:
        host: Address to listen on. Any but localhost needs a token.
        port: Port to listen on. 0: any free port.
        token: Required from clients as `Authorization: Bearer TOKEN`. Prefer the environment variable
            DEFORMABLE_DETR_TOKEN, which process lists do not show.
        max_batch_size: Maximum images per pass of the model.
        max_queue: Maximum images of one address accepted and not answered yet; further requests get 503.
        timeout: Seconds from the end of a request to its response; then the request gets 504.
        shutdown_delay: Seconds after SIGTERM during which requests are still accepted while /readyz answers 503.
        allow_origin: Site whose pages may use the API (CORS), such as https://example.org, or * for all. May be
            repeated. Default: only the server's own page.
    """
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        need(package, "serve")
    from ..serve.limits import Limits
    from ..serve.server import serve as run

    limits = Limits(
        images=min(Limits.images, max_queue), max_queue=max_queue, max_batch_size=max_batch_size, timeout=timeout,
        shutdown_delay=shutdown_delay,
    )  # fmt: skip
    run(model, host, port, token, device, limits, allow_origin or (), check_tiling(tile, tile_overlap))
