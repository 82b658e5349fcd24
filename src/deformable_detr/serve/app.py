"""The web application: routes, error responses and the web page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer

from .. import __version__
from . import schemas
from .decoding import FORMATS
from .engine import Engine
from .limits import ClientDisconnected, HttpError
from .middleware import AccessMiddleware, Status
from .responses import detected_image, explained_image
from .uploads import FIELD, BodyBudget, Upload, parse_uploads, read_body

_ERRORS = {
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
}
_PAGES = {
    "/": ("deformable_detr.serve", "page.html", "text/html"),
    "/page.css": ("deformable_detr.serve", "page.css", "text/css"),
    "/page.js": ("deformable_detr.serve", "page.js", "text/javascript"),
    "/viewer.css": ("deformable_detr.visualize.web", "viewer.css", "text/css"),
    "/viewer.js": ("deformable_detr.visualize.web", "viewer.js", "text/javascript"),
    "/elements.js": ("deformable_detr.visualize.web", "elements.js", "text/javascript"),
}


def create_app(engine: Engine, status: Status, token: str | None = None, name: str = "model") -> FastAPI:
    """Create the application, which starts and stops the engine.

    Args:
        engine: The model.
        status: Set `status.draining` before a shutdown.
        token: See `AccessMiddleware`.
        name: Name of the model for clients.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not engine.alive:
            await asyncio.to_thread(engine.start)
        engine.metrics.ready.set_function(lambda: float(engine.alive and not status.draining))
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
    app.add_middleware(AccessMiddleware, limits=engine.limits, status=status, metrics=engine.metrics, token=token)
    # The middleware checks the token; the dependency only describes it in OpenAPI.
    security = [] if token is None else [Depends(HTTPBearer(scheme_name="token", auto_error=False))]
    refusals = (403, 421) if token is None else (401,)
    app.include_router(_api_routes(engine, name, refusals), dependencies=security)
    app.include_router(_status_routes(engine, status, () if token else (421,)))
    _add_error_handlers(app)
    for path, (package, file, media_type) in _PAGES.items():
        content = resources.files(package).joinpath(file).read_bytes()
        app.router.add_route(path, _static(content, media_type), methods=["GET"], include_in_schema=False)
    return app


def _api_routes(engine: Engine, name: str, refusals: tuple[int, ...]) -> APIRouter:
    router = APIRouter(prefix="/v1")
    limits, budget = engine.limits, BodyBudget(engine.limits.total_body_bytes)
    errors = _describe_errors(400, 408, 413, 415, 422, 500, 503, 504, *refusals)

    @router.post(
        "/detect", response_model=schemas.Detected, responses=errors, openapi_extra=_describe_body(limits.images)
    )
    async def detect(request: Request, parameters: Annotated[schemas.DetectParameters, Query()]) -> Response:
        """Detect objects in one image (the body) or in several (a form)."""

        async def work(uploads: list[Upload]) -> Callable[[], Any]:
            results = await engine.detect(uploads, parameters.threshold, parameters.top_k)
            engine.metrics.images.inc(len(uploads))
            pairs = list(zip(results, uploads, strict=True))
            return lambda: {"images": [detected_image(result, upload.filename) for result, upload in pairs]}

        return await _process(request, engine, budget, limits.images, work)

    async def explain(request: Request, parameters: Annotated[schemas.ExplainParameters, Query()]) -> Response:
        """Explain the detections in one image: what each decoder layer sampled."""

        async def work(uploads: list[Upload]) -> Callable[[], Any]:
            traced = await engine.explain(uploads[0], parameters.threshold, parameters.top_k)
            return lambda: explained_image(traced, uploads[0].filename)

        return await _process(request, engine, budget, 1, work)

    if engine.explains:
        describe = {"response_model": schemas.Explained, "responses": errors, "openapi_extra": _describe_body(1)}
        router.post("/explain", **describe)(explain)

    @router.get("/model", response_model=schemas.Model, responses=_describe_errors(*refusals))
    async def model() -> dict[str, Any]:
        """Describe the model and the limits of requests."""
        classes = [
            {"label": label, "category_id": category.id, "name": category.name}
            for label, category in enumerate(engine.categories)
        ]
        return {
            "name": name, "version": __version__, "classes": classes, "short_side": engine.config.image_size,
            "long_side": engine.config.long_side, "explains": engine.explains, "formats": list(FORMATS.values()),
            "limits": {key: getattr(limits, key) for key in schemas.RequestLimits.model_fields},
        }  # fmt: skip

    return router


def _status_routes(engine: Engine, status: Status, refusals: tuple[int, ...]) -> APIRouter:
    router = APIRouter()
    errors = _describe_errors(503, *refusals)

    @router.get("/healthz", response_model=schemas.State, responses=errors)
    async def healthz() -> dict[str, str]:
        """Answer 200 while the server works; restart it otherwise."""
        if not engine.alive:
            raise HttpError(503, "the model's thread has ended")
        return {"status": "alive"}

    @router.get("/readyz", response_model=schemas.State, responses=errors)
    async def readyz() -> dict[str, str]:
        """Answer 200 while the server accepts requests."""
        if status.draining or not engine.alive:
            raise HttpError(503, "shutting down" if status.draining else "not ready", retry_after=5)
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        return Response(await engine.write(engine.metrics.text), media_type=engine.metrics.media_type)

    return router


async def _process(
    request: Request,
    engine: Engine,
    budget: BodyBudget,
    max_images: int,
    work: Callable[[list[Upload]], Coroutine[Any, Any, Callable[[], Any]]],
) -> Response:
    """Read the images of a request and answer with the JSON of what `work` returns, within the timeout."""
    engine.check_capacity()

    async def answer(body: bytearray) -> bytes:
        content_type = request.headers.get("content-type", "")
        uploads = await engine.read(parse_uploads, content_type, body, max_images)
        return await engine.write(_to_json, await work(uploads))

    async with read_body(request, engine.limits, budget) as body:
        content = await _with_timeout(request, answer(body), engine.limits.timeout)
    return Response(content, media_type="application/json")


async def _with_timeout(request: Request, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The result. The work is canceled after the timeout (HttpError 504) or when the client leaves."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected if leaving.done() else HttpError(504, f"no response within {seconds:g} s")
    finally:
        working.cancel()
        leaving.cancel()


def _to_json(make: Callable[[], Any]) -> bytes:
    return json.dumps(make(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def _add_error_handlers(app: FastAPI) -> None:
    def error_response(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
        return Response(_to_json(lambda: {"detail": detail}), status, headers, "application/json")

    @app.exception_handler(HttpError)
    async def http_error(_: Request, error: HttpError) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return error_response(error.status, error.detail, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_response(422, f"{'.'.join(map(str, first['loc'][1:]))[:60]}: {first['msg'][:200]}")

    @app.exception_handler(ClientDisconnected)
    async def client_disconnected(_: Request, __: ClientDisconnected) -> Response:
        return error_response(499, "the client disconnected")  # only the metrics see it


def _describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Problem, "description": _ERRORS[status]} for status in sorted(statuses)
    }
    if 503 in responses:
        seconds = {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}
        responses[503]["headers"] = {"Retry-After": seconds}
    return responses


def _describe_body(max_images: int) -> dict[str, Any]:
    """OpenAPI of a body with images."""
    image = {"type": "string", "format": "binary"}
    parts = {"type": "array", "items": image, "minItems": 1, "maxItems": max_images}
    form = {"type": "object", "properties": {FIELD: parts}, "required": [FIELD], "additionalProperties": False}
    content: dict[str, Any] = {kind: {"schema": image} for kind in (*FORMATS.values(), "application/octet-stream")}
    return {"requestBody": {"required": True, "content": {**content, "multipart/form-data": {"schema": form}}}}


def _static(content: bytes, media_type: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return endpoint
