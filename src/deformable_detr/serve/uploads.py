"""Request bodies: read within limits and parsed into images."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .limits import ClientDisconnected, HttpError, Limits

FIELD = "images"  # the name of the form parts
HOW = f"send an image as the body with its Content-Type (image/jpeg, …), or multipart/form-data with parts '{FIELD}'"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Upload(NamedTuple):
    """An uploaded image. label: what errors call it. filename: as the client sent it, never used as a path."""

    data: bytes | memoryview
    label: str
    filename: str | None


class BodyBudget:
    """Counts the bytes of all request bodies in memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def add(self, count: int) -> None:
        """Raise HttpError (503) if the budget does not allow this many more bytes."""
        if self.used + count > self.limit:
            raise HttpError(503, "the server is receiving too much data; try again", retry_after=2)
        self.used += count


@asynccontextmanager
async def read_body(request: Any, limits: Limits, budget: BodyBudget) -> AsyncIterator[bytearray]:
    """Read the body of a Starlette request; it counts against the budget until the block ends.

    Raises:
        HttpError: 413 as soon as it is too large, 408 if it is too slow, 415 if it is compressed, 503 over the budget.
        ClientDisconnected: The client left.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise HttpError(415, "compressed bodies are not supported; send the image as it is")
    too_large = HttpError(413, f"request bodies may have up to {limits.body_bytes / 1e6:g} MB")
    content_length = request.headers.get("content-length", "")
    if content_length.isdecimal() and int(content_length[:20]) > limits.body_bytes:
        raise too_large
    body, loop = bytearray(), asyncio.get_running_loop()
    deadline = loop.time() + limits.body_timeout
    try:
        try:
            async with asyncio.timeout(limits.body_timeout) as timer:
                more_body = True
                while more_body:
                    timer.reschedule(min(deadline, loop.time() + limits.stall_timeout))
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    chunk, more_body = message.get("body", b""), message.get("more_body", False)
                    if len(body) + len(chunk) > limits.body_bytes:
                        raise too_large
                    budget.add(len(chunk))
                    body += chunk
        except TimeoutError:
            raise HttpError(408, "the request body did not arrive in time") from None
        yield body
    finally:
        budget.used -= len(body)


def parse_uploads(content_type: str, body: bytearray, max_images: int) -> list[Upload]:
    """Return the images of a body.

    Raises:
        HttpError: 415 for another type of body, 400 for a malformed form, 422 for unexpected parts or too many images.
    """
    media_type = content_type.split(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return _parse_form(content_type, body, max_images)
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return [Upload(memoryview(body), "the image", None)]
    raise HttpError(415, f"unsupported Content-Type {media_type[:60] or '(none)'!r}; {HOW}")


def _parse_form(content_type: str, body: bytearray, max_images: int) -> list[Upload]:
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise HttpError(400, "the form's Content-Type has no boundary")
    form = _FormHandler(max_images)
    try:
        MultipartParser(boundary, form.callbacks()).write(bytes(body))  # pyright: ignore[reportArgumentType]
    except (FormParserError, UnicodeDecodeError) as error:
        raise HttpError(400, f"malformed form ({' '.join(str(error).split())[:120]})") from None
    if not form.complete:
        raise HttpError(400, "the form ends before its last boundary")
    if not form.uploads:
        raise HttpError(422, f"the form has no image; {HOW}")
    return form.uploads


class _FormHandler:
    """Collects uploads from the callbacks of python-multipart's parser."""

    def __init__(self, max_images: int) -> None:
        self.max_images, self.uploads, self.complete = max_images, [], False
        self.field, self.value, self.headers, self.content = b"", b"", {}, bytearray()

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: setattr(self, "field", self.field + data[start:end]),
            "on_header_value": lambda data, start, end: setattr(self, "value", self.value + data[start:end]),
            "on_header_end": self._add_header,
            "on_headers_finished": self._check_name,
            "on_part_data": lambda data, start, end: self.content.extend(memoryview(data)[start:end]),
            "on_part_end": self._end_part,
            "on_end": lambda: setattr(self, "complete", True),
        }

    def _begin_part(self) -> None:
        if len(self.uploads) == self.max_images:
            raise HttpError(422, f"a request may have up to {self.max_images} images")
        self.headers, self.content = {}, bytearray()

    def _add_header(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field = self.value = b""

    def _check_name(self) -> None:
        _, self.options = parse_options_header(self.headers.get(b"content-disposition", b""))
        name = clean_text(self.options.get(b"name", b""))
        if name != FIELD:
            raise HttpError(422, f"unexpected form part {name!r}; send images in parts named '{FIELD}'")

    def _end_part(self) -> None:
        filename = clean_text(self.options.get(b"filename", b"")) or None
        label = f"image {len(self.uploads) + 1}" + (f" ({filename})" if filename else "")
        self.uploads.append(Upload(memoryview(self.content), label, filename))


def clean_text(text: bytes) -> str:
    """Return at most 100 characters of a client's text, without control characters."""
    return _CONTROLS.sub("", text.decode("utf-8", "replace"))[:100]
