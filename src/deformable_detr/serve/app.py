"""The web application: routes, error responses and the web page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from .. import __version__
from ..visualize.web.html import read_asset
from . import schemas
from .decoding import FORMATS
from .engine import Engine, run_in
from .limits import Shares
from .middleware import AccessMiddleware
from .uploads import FIELD, Upload, parse_uploads, read_body

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": description}
    for status, description in {
        400: "malformed form",
        401: "missing or wrong token",
        403: "request from a page of another site",
        408: "request body too slow",
        413: "too many bytes or pixels",
        415: "unsupported type of body or image",
        421: "host name other than localhost",
        422: "wrong parameter or damaged image, named in the message",
        500: "internal error",
        503: "overloaded or shutting down; see Retry-After",
        504: "no response before the timeout",
    }.items()
}
_PAGE_FILES = ("page.html", "page.css", "page.js", "results.js", "zoom.js", "example.jpg")
_SHARED_FILES = ("style.css", "viewer.css", "viewer.js", "masks.js", "labels.js", "elements.js")
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "jpg": "image/jpeg"}


def create_app(engine: Engine, token: str | None = None, name: str = "model", origins: Sequence[str] = ()) -> FastAPI:
    """Create the application, which starts and stops the engine.

    Args:
        engine: The model. Set `engine.draining` before a shutdown.
        token: See `AccessMiddleware`.
        name: Name of the model for clients.
        origins: Sites whose pages may use the API (CORS), such as "https://example.org", or "*" for all.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not engine.alive:
            await asyncio.to_thread(engine.start)
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="deformable-detr",
        version=__version__,
        description='Object detection. Errors are JSON: {"detail": one line}.',
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
    )
    app.add_middleware(AccessMiddleware, engine=engine, token=token, origins=frozenset(origins))
    if origins:  # outermost: the browser's preflight request has no token, and pages may read refusals
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"], expose_headers=["retry-after"],
        )  # fmt: skip
    # The middleware checks the token; the dependency only describes it in OpenAPI.
    security = [] if token is None else [Depends(HTTPBearer(scheme_name="token", auto_error=False))]
    app.include_router(_api_routes(engine, name), dependencies=security)
    app.include_router(_status_routes(engine))
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    files = {name: resources.files("deformable_detr.serve").joinpath(name).read_bytes() for name in _PAGE_FILES}
    for name, content in (files | {name: read_asset(name).encode() for name in _SHARED_FILES}).items():
        response: Any = Response(content, media_type=_MEDIA_TYPES[name.split(".")[1]])
        app.add_route("/" if name == "page.html" else f"/{name}", response, ["GET"], include_in_schema=False)
    return app


def _api_routes(engine: Engine, name: str) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=_ERRORS)
    limits, memory = engine.limits, Shares(engine.limits.total_body_bytes * 3 // 4)

    @router.post("/detect", response_model=schemas.Detected, openapi_extra=_describe_body(limits.images))
    async def detect(request: Request, parameters: Annotated[schemas.TileParameters, Query()]) -> Response:
        """Detect objects in one image (the body) or in several (a form)."""

        async def work(uploads: list[Upload], client: str) -> Callable[[], Any]:
            results = await engine.detect(uploads, parameters.threshold, parameters.top_k, client, parameters.tiling)
            engine.metrics.images.inc(len(uploads))
            pairs = list(zip(results, uploads, strict=True))
            return lambda: {"images": [schemas.detected_image(result, upload.filename) for result, upload in pairs]}

        return await _process(request, engine, memory, limits.images, work)

    async def explain(request: Request, parameters: Annotated[schemas.ExplainParameters, Query()]) -> Response:
        """Explain the detections in one image: what each decoder layer sampled."""

        async def work(uploads: list[Upload], client: str) -> Callable[[], Any]:
            traced = await engine.explain(uploads[0], parameters.threshold, parameters.top_k, client)
            return lambda: schemas.explained_image(traced, uploads[0].filename)

        return await _process(request, engine, memory, 1, work)

    if engine.model.explains:
        router.post("/explain", response_model=schemas.Explained, openapi_extra=_describe_body(1))(explain)

    @router.get("/model")
    async def model() -> schemas.Model:
        """Describe the model and the limits of requests."""
        return schemas.Model(
            name=name,
            version=__version__,
            classes=[
                schemas.Class(label=label, category_id=category.id, name=category.name)
                for label, category in enumerate(engine.categories)
            ],
            resize=engine.config.resize,
            short_side=engine.config.resize_rule.short,
            long_side=engine.config.long_side,
            explains=engine.model.explains,
            formats=list(FORMATS.values()),
            limits=schemas.RequestLimits.model_validate(limits, from_attributes=True),
        )

    return router


def _status_routes(engine: Engine) -> APIRouter:
    router = APIRouter(responses={status: _ERRORS[status] for status in (421, 503)})

    @router.get("/healthz")
    async def healthz() -> schemas.State:
        """Answer 200 while the server works; restart it otherwise."""
        if not engine.alive:
            raise HTTPException(503, "the model's thread has ended")
        return schemas.State(status="alive")

    @router.get("/readyz")
    async def readyz() -> schemas.State:
        """Answer 200 while the server accepts requests."""
        if engine.draining or not engine.alive:
            raise HTTPException(503, "shutting down" if engine.draining else "not ready", headers={"retry-after": "5"})
        return schemas.State(status="ready")

    @router.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        text = await run_in(engine.writer, generate_latest, engine.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


async def _process(
    request: Request,
    engine: Engine,
    memory: Shares,
    max_images: int,
    work: Callable[[list[Upload], str], Coroutine[Any, Any, Callable[[], Any]]],
) -> Response:
    """Read the images of a request and answer with the JSON of what `work` returns, within the timeout."""
    client = request.scope["client"][0]
    engine.check_capacity(client)

    async def answer(body: bytearray) -> Response:
        content_type = request.headers.get("content-type", "")
        uploads = await run_in(engine.readers, parse_uploads, content_type, body, max_images)
        content = await work(uploads, client)
        return await run_in(engine.writer, lambda: JSONResponse(content()))

    async with read_body(request, engine.limits, memory) as body:
        return await _with_timeout(request, answer(body), engine.limits.timeout)


async def _with_timeout(request: Request, work: Coroutine[Any, Any, Response], seconds: float) -> Response:
    """The result. The work is canceled after the timeout (HTTPException 504) or when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # after the body: http.disconnect
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect if leaving.done() else HTTPException(504, f"no response within {seconds:g} s")
    finally:
        working.cancel()
        leaving.cancel()


async def _invalid_parameter(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    return JSONResponse({"detail": f"{'.'.join(map(str, first['loc'][1:]))[:60]}: {first['msg'][:200]}"}, 422)


def _describe_body(max_images: int) -> dict[str, Any]:
    """OpenAPI of a body with images."""
    image = {"type": "string", "format": "binary"}
    parts = {"type": "array", "items": image, "minItems": 1, "maxItems": max_images}
    form = {"type": "object", "properties": {FIELD: parts}, "required": [FIELD], "additionalProperties": False}
    content: dict[str, Any] = {kind: {"schema": image} for kind in (*FORMATS.values(), "application/octet-stream")}
    return {"requestBody": {"required": True, "content": {**content, "multipart/form-data": {"schema": form}}}}
