"""The web application: its routes, and errors as one line of JSON each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError

from .. import __version__
from . import schemas
from .decoding import FORMATS
from .engine import Engine
from .limits import ClientDisconnected, HttpError
from .middleware import AccessMiddleware, Status
from .responses import detected, explained
from .uploads import PART, BodyBudget, Upload, uploads, whole_body

_WHY = {
    400: "a form that is broken",
    401: "no token, or a wrong one",
    403: "asked for by a page of another site",
    408: "the body did not come in time",
    413: "too many bytes or pixels",
    415: "a body or an image of a kind that is not read",
    421: "asked for by a name that is not this machine's own",
    422: "parameters or images that are wrong; the message names which",
    500: "a fault of the server's",
    503: "no room, or leaving; Retry-After says when to come back",
    504: "no answer before the deadline",
}
_PICTURE = {"type": "string", "format": "binary"}


def create_app(engine: Engine, status: Status, token: str | None = None, name: str = "model") -> FastAPI:
    """The application around an engine, which it starts and stops.

    status: what the server tells of itself; whoever shuts it down sets `draining`.
    token: see `door.Door`. name: of the model, as it is shown.
    """
    limits = engine.limits
    ledger = BodyBudget(limits.held_bytes)
    secured = token is not None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not engine.alive:
            await asyncio.to_thread(engine.start)
        engine.metrics.ready.set_function(lambda: float(ready()))
        yield
        await asyncio.to_thread(engine.stop)

    def ready() -> bool:
        return engine.alive and not status.draining

    app = FastAPI(
        title="deformable-detr",
        version=__version__,
        description='Object detection. Errors are JSON: {"detail": one line}.',
        lifespan=lifespan,
        docs_url=None,  # these load their scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(AccessMiddleware, limits=limits, status=status, metrics=engine.metrics, token=token)
    _add_errors(app)
    always = (401,) if secured else (403, 421)
    on_images = (400, 408, 413, 415, 422, 500, 503, 504, *always)
    access: dict[str, Any] = {"security": [{"token": []}]} if secured else {}

    async def worked(request: Request, most: int, work: Callable[[list[Upload]], Coroutine[Any, Any, Any]]) -> Response:
        """The answer to a request with images: its body read, `work` done in time, put into JSON."""
        engine.refuse_if_full()

        async def answered(body: bytearray) -> bytes:
            found = await engine.read(uploads, request.headers.get("content-type", ""), body, most)
            return await engine.write(_json, await work(found))

        async with whole_body(request, limits, ledger) as body:
            answer = await _in_time(request, answered(body), limits.deadline)
        return Response(answer, media_type="application/json")

    @app.post(
        "/v1/detect",
        response_model=schemas.Detected,
        responses=_problems(*on_images),
        openapi_extra={**_body(limits.images), **access},
    )
    async def detect(request: Request, given: Annotated[schemas.DetectParameters, Query()]) -> Response:
        """The objects in one image (the body) or in several (a form)."""

        async def work(found: list[Upload]) -> Callable[[], Any]:
            all_found = await engine.detect(found, given.threshold, given.top_k)
            engine.metrics.images.inc(len(found))
            pairs = list(zip(all_found, found, strict=True))
            return lambda: {"images": [detected(one, upload.filename) for one, upload in pairs]}

        return await worked(request, limits.images, work)

    if engine.explains:

        @app.post(
            "/v1/explain",
            response_model=schemas.Explained,
            responses=_problems(*on_images),
            openapi_extra={**_body(1), **access},
        )
        async def explain(request: Request, given: Annotated[schemas.ExplainParameters, Query()]) -> Response:
            """Where each decoder layer looked for each detection in one image."""

            async def work(found: list[Upload]) -> Callable[[], Any]:
                traced = await engine.explain(found[0], given.threshold, given.top_k)
                return lambda: explained(traced, found[0].filename)

            return await worked(request, 1, work)

    @app.get("/v1/model", response_model=schemas.Model, responses=_problems(*always), openapi_extra=access)
    async def model() -> dict[str, Any]:
        """What the model knows and what may be asked."""
        config = engine.config
        classes = [
            {"label": label, "category_id": category.id, "name": category.name}
            for label, category in enumerate(engine.categories)
        ]
        bounds = {key: getattr(limits, key) for key in schemas.Bounds.model_fields}
        return {
            "name": name, "version": __version__, "classes": classes, "short_side": config.image_size,
            "long_side": config.long_side, "explains": engine.explains, "formats": list(FORMATS.values()),
            "limits": bounds,
        }  # fmt: skip

    @app.get("/healthz", response_model=schemas.State, responses=_problems(503, *_open(always)))
    async def healthz() -> dict[str, str]:
        """Whether the server lives; where not, start it again."""
        if not engine.alive:
            raise HttpError(503, "the thread that runs the model has ended")
        return {"status": "alive"}

    @app.get("/readyz", response_model=schemas.State, responses=_problems(503, *_open(always)))
    async def readyz() -> dict[str, str]:
        """Whether to send requests here."""
        if not ready():
            raise HttpError(503, "leaving" if status.draining else "not ready", retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        return Response(await engine.write(engine.metrics.text), media_type=engine.metrics.media_type)

    _add_page(app)
    if secured:
        _describe_token(app)
    return app


async def _in_time(request: Request, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The result; Refused (504) after that time, Gone where the client leaves; then the work is canceled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected if leaving.done() else HttpError(504, f"no answer within {seconds:g} s")
    finally:
        working.cancel()
        leaving.cancel()


def _json(make: Callable[[], Any]) -> bytes:
    return json.dumps(make(), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HttpError)
    async def refused(_: Request, error: HttpError) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return _problem(error.status, error.detail, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _problem(422, f"{'.'.join(map(str, first['loc'][1:]))[:60]}: {first['msg'][:200]}")

    @app.exception_handler(ClientDisconnected)
    async def gone(_: Request, __: ClientDisconnected) -> Response:
        return _problem(499, "the client is gone")  # nobody reads it; the figures do


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return Response(_json(lambda: {"detail": detail}), status, headers, "application/json")


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Problem, "description": _WHY[status]} for status in sorted(statuses)
    }
    if 503 in described:
        seconds = {"schema": {"type": "integer", "minimum": 1}, "description": "seconds to wait"}
        described[503]["headers"] = {"Retry-After": seconds}
    return described


def _open(always: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(status for status in always if status == 421)


def _body(most: int) -> dict[str, Any]:
    """OpenAPI of a body with images."""
    many = {"type": "array", "items": _PICTURE, "minItems": 1, "maxItems": most}
    form = {"type": "object", "properties": {PART: many}, "required": [PART], "additionalProperties": False}
    kinds: dict[str, Any] = {kind: {"schema": _PICTURE} for kind in (*FORMATS.values(), "application/octet-stream")}
    return {"requestBody": {"required": True, "content": {**kinds, "multipart/form-data": {"schema": form}}}}


def _add_page(app: FastAPI) -> None:
    """The page for people. Three names that are known beforehand, so no path of a client's is ever opened."""
    kinds = {
        "/": ("page.html", "text/html"),
        "/page.css": ("page.css", "text/css"),
        "/page.js": ("page.js", "text/javascript"),
    }
    folder = resources.files("deformable_detr.serve")
    for path, (file, kind) in kinds.items():
        content = folder.joinpath(file).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.router.add_route(path, _without_arguments(page), methods=["GET"], include_in_schema=False)


def _without_arguments(page: Callable[[], Coroutine[Any, Any, Response]]) -> Callable[[Request], Any]:
    async def route(_: Request) -> Response:
        return await page()

    return route


def _describe_token(app: FastAPI) -> None:
    """Adds the token to the OpenAPI description; the door checks it."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = described
