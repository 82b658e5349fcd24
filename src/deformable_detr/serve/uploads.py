"""Request bodies: counted while they come, given up when they do not, taken apart into images."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from .limits import ClientDisconnected, HttpError, Limits

PART = "images"  # the name of the parts of a form
HOW = f"send an image as the body with its Content-Type (image/jpeg, …), or multipart/form-data with parts '{PART}'"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Upload(NamedTuple):
    """One image as it came. label: how messages call it. filename: as the client named it; only ever shown."""

    data: bytes | memoryview
    label: str
    filename: str | None


class BodyBudget:
    """How many bytes of bodies are held by all requests."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, count: int) -> None:
        if self.held + count > self.most:
            raise HttpError(503, "too much is being sent to this server at once; try again", retry_after=2)
        self.held += count


@asynccontextmanager
async def whole_body(request: Any, limits: Limits, ledger: BodyBudget) -> AsyncIterator[bytearray]:
    """The body of a Starlette request, held in the ledger until the block ends.

    Raises Refused: 413 as soon as it is over the limit, 408 when it does not come, 415 where it is compressed, 503
    where all requests together hold too much. Raises Gone where the client leaves.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise HttpError(415, "compressed bodies are not read; send the image as it is")
    too_large = HttpError(413, f"the request may have {limits.body_bytes / 1e6:g} MB at most")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    data, loop = bytearray(), asyncio.get_running_loop()
    end = loop.time() + limits.body_seconds
    try:
        try:
            async with asyncio.timeout(limits.body_seconds) as clock:
                more = True
                while more:
                    clock.reschedule(min(end, loop.time() + limits.stall_seconds))
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    if len(data) + len(piece) > limits.body_bytes:
                        raise too_large
                    ledger.take(len(piece))
                    data += piece
        except TimeoutError:
            raise HttpError(408, "the request's body did not come in time") from None
        yield data
    finally:
        ledger.held -= len(data)


def uploads(content_type: str, data: bytearray, most: int) -> list[Upload]:
    """The images of a body. Raises Refused: 415 for other kinds of body, 400 for a broken form, 422 for a wrong one.

    most: images in one request.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _form(content_type, data, most)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [Upload(memoryview(data), "the image", None)]
    raise HttpError(415, f"a body of the type {kind[:60] or '(none)'!r} is not read; {HOW}")


def _form(content_type: str, data: bytearray, most: int) -> list[Upload]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise HttpError(400, "the form's Content-Type names no boundary")
    form = _Form(most)
    try:
        MultipartParser(boundary, form.callbacks()).write(bytes(data))  # pyright: ignore[reportArgumentType]
    except (FormParserError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the form is broken ({' '.join(str(error).split())[:120]})") from None
    if not form.ended:
        raise HttpError(400, "the form ends before its last boundary")
    if not form.uploads:
        raise HttpError(422, f"no image: {HOW}")
    return form.uploads


class _Form:
    """What a parser of python-multipart calls, piece by piece."""

    def __init__(self, most: int) -> None:
        self.most, self.uploads, self.ended = most, [], False
        self.field, self.value, self.headers, self.pieces = b"", b"", {}, bytearray()

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: setattr(self, "field", self.field + data[start:end]),
            "on_header_value": lambda data, start, end: setattr(self, "value", self.value + data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._check,
            "on_part_data": lambda data, start, end: self.pieces.extend(memoryview(data)[start:end]),
            "on_part_end": self._end,
            "on_end": lambda: setattr(self, "ended", True),
        }

    def _begin(self) -> None:
        if len(self.uploads) == self.most:
            raise HttpError(422, f"a request may have {self.most} images at most")
        self.headers, self.pieces = {}, bytearray()

    def _header(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field = self.value = b""

    def _check(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, self.options = parse_options_header(self.headers.get(b"content-disposition", b""))
        name = clean(self.options.get(b"name", b""))
        if name != PART:
            raise HttpError(422, f"the form has a part {name!r}; only images are read, in parts called '{PART}'")

    def _end(self) -> None:
        filename = clean(self.options.get(b"filename", b"")) or None
        label = f"image {len(self.uploads) + 1}" + (f" ({filename})" if filename else "")
        self.uploads.append(Upload(memoryview(self.pieces), label, filename))


def clean(text: bytes) -> str:
    """Text of a client's, fit to be shown: at most 100 characters, no controls."""
    return _CONTROLS.sub("", text.decode("utf-8", "replace"))[:100]
