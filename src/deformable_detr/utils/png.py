"""PNG chunks: orientation marks anywhere in the file, and large texts that Pillow refuses."""

import io
import zlib
from contextlib import suppress
from typing import IO, Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 16 << 20  # bytes of texts that are searched, also after decompression
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_LEFT_OUT = (*_TEXTS, b"eXIf", b"iCCP")  # nothing else of them is used; Pillow refuses large ones


def without_texts(file: IO[bytes], pixels: bool) -> tuple[IO[bytes], dict[str, Any]]:
    """Return a PNG without texts and profiles, and EXIF and XMP under Pillow's names for `Image.info`.

    Any other file is returned as it is.

    Args:
        pixels: Keep the pixels. Otherwise, the copy ends where they start, and the file is only skimmed.
    """
    file.seek(0)
    if file.read(8) != SIGNATURE:
        file.seek(0)
        return file, {}
    if not pixels:
        file = getattr(file, "raw", file)  # a buffer would read all pixels
        file.seek(len(SIGNATURE))
    kept, info, budget, in_header, left_out = [SIGNATURE], {}, MAX_TEXT, True, False
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = file.tell() + length + 4
        in_header = in_header and kind != b"IDAT"
        if kind in _LEFT_OUT:
            body = file.read(min(length, budget)) if kind != b"iCCP" else b""
            info |= {"exif": b"Exif\0\0" + body} if kind == b"eXIf" else {}
            budget -= len(body)
            if kind in _TEXTS:
                entry, size = _mark_in_text(kind, body, budget)
                info, budget = info | entry, budget - size
            file.seek(end)
            left_out = True
        elif pixels or in_header:
            kept.append(head + file.read(length + 4))
        else:
            kept += [head] if kept[-1][4:8] != b"IDAT" else []
            file.seek(end)
    if raw := info.pop("raw", None):
        info.setdefault("exif", raw)
    if pixels and not left_out:
        file.seek(0)
        return file, info
    return io.BytesIO(b"".join([*kept, head])), info


def _mark_in_text(kind: bytes, body: bytes, budget: int) -> tuple[dict[str, Any], int]:
    """Return EXIF or XMP of a text chunk, if it is one, and the number of bytes that were decompressed."""
    key, _, text = body.partition(b"\0")
    if key not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        return {}, 0
    compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":
        text = b"".join(text[2:].split(b"\0", 2)[2:])  # without language and translated keyword
    elif compressed:
        text = text[1:]
    size = 0
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, max(1, budget))
        except zlib.error:
            return {}, 0
        size = len(text)
    if key == b"XML:com.adobe.xmp":
        return {"xmp": text}, size
    with suppress(ValueError):
        return {"raw": bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))}, size
    return {}, size
