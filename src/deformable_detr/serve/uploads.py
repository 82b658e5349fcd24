"""Request bodies: read within limits and parsed into images."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .limits import Limits, Shares

FIELD = "images"  # the name of the form parts
HOW = f"send an image as the body with its Content-Type (image/jpeg, …), or multipart/form-data with parts '{FIELD}'"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Upload(NamedTuple):
    """An uploaded image. label: what errors call it. filename: as the client sent it, never used as a path."""

    data: bytes | bytearray
    label: str
    filename: str | None


@asynccontextmanager
async def read_body(request: Request, limits: Limits, memory: Shares) -> AsyncIterator[bytearray]:
    """Read the body of a Starlette request; it holds a share of the memory until the block ends.

    Raises:
        HTTPException: 413 as soon as it is too large, 408 if it is too slow, 415 if compressed, 503 if memory is full.
        ClientDisconnect: The client left.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise HTTPException(415, "compressed bodies are not supported; send the image as it is")
    too_large = HTTPException(413, f"request bodies may have up to {limits.body_bytes / 1e6:g} MB")
    busy = HTTPException(503, "the server is receiving too much data; try again", headers={"retry-after": "2"})
    content_length = request.headers.get("content-length", "")
    if content_length.isdecimal() and int(content_length[:20]) > limits.body_bytes:
        raise too_large
    body, now, client = bytearray(), asyncio.get_running_loop().time, request.scope["client"][0]
    deadline = now() + limits.body_timeout
    try:
        try:
            async with asyncio.timeout(min(limits.stall_timeout, limits.body_timeout)) as timer:
                async for chunk in request.stream():
                    timer.reschedule(min(deadline, now() + limits.stall_timeout))
                    if len(body) + len(chunk) > limits.body_bytes:
                        raise too_large
                    if not memory.allows(client, len(chunk)):
                        raise busy
                    memory.add(client, len(chunk))
                    body += chunk
        except TimeoutError:
            raise HTTPException(408, "the request body did not arrive in time") from None
        yield body
    finally:
        memory.add(client, -len(body))


def parse_uploads(content_type: str, body: bytearray, max_images: int) -> list[Upload]:
    """Return the images of a body.

    Raises:
        HTTPException: 415 for another type of body, 400 for a malformed form, 422 for other parts or too many images.
    """
    media_type = content_type.split(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return _parse_form(content_type, body, max_images)
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return [Upload(body, "the image", None)]
    raise HTTPException(415, f"unsupported Content-Type {media_type[:60] or '(none)'!r}; {HOW}")


def _parse_form(content_type: str, body: bytearray, max_images: int) -> list[Upload]:
    uploads: list[Upload] = []
    ends: list[bool] = []

    def add(name: bytes | None, data: bytes | None, filename: str = "") -> None:
        if clean_text(name) != FIELD:
            raise HTTPException(422, f"unexpected form part {clean_text(name)!r}; send images in parts named '{FIELD}'")
        if len(uploads) == max_images:
            raise HTTPException(422, f"a request may have up to {max_images} images")
        label = f"image {len(uploads) + 1}" + (f" ({filename})" if filename else "")
        uploads.append(Upload(data or b"", label, filename or None))

    def add_file(file: Any) -> None:
        add(file.field_name, file.file_object.getvalue(), clean_text(file.file_name))

    try:
        _, options = parse_options_header(content_type)
        FormParser(
            "multipart/form-data",
            on_field=lambda field: add(field.field_name, field.value),
            on_file=add_file,
            on_end=lambda: ends.append(True),
            boundary=options.get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": len(body)},  # never written to disk
        ).write(bytes(body))
    except (FormParserError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"malformed form ({' '.join(str(error).split())[:120]})") from None
    if not ends:
        raise HTTPException(400, "the form ends before its last boundary")
    if not uploads:
        raise HTTPException(422, f"the form has no image; {HOW}")
    return uploads


def clean_text(text: bytes | None) -> str:
    """Return at most 100 characters of a client's text, without control characters."""
    return _CONTROLS.sub("", (text or b"").decode("utf-8", "replace"))[:100]
