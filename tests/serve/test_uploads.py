"""Parsing of request bodies and cleaning of file names."""

import time

import pytest
from starlette.exceptions import HTTPException

from deformable_detr.serve.limits import Shares
from deformable_detr.serve.uploads import clean_text, parse_uploads

KIND = "multipart/form-data; boundary=b"


def part(data=b"x", name='name="images"', filename='; filename="a.png"', headers=b""):
    return (
        b"--b\r\nContent-Disposition: form-data; "
        + (name + filename).encode()
        + b"\r\n"
        + headers
        + b"\r\n"
        + data
        + b"\r\n"
    )


def rejection_status(kind, body, max_images=2):
    with pytest.raises(HTTPException) as caught:
        parse_uploads(kind, bytearray(body), max_images)
    return caught.value.status_code


def test_parts_in_order():
    data = bytes(range(256)) * 20 + b"\r\n--b\r\r\n--"
    uploads = parse_uploads(KIND, bytearray(part(data) + part(b"second", filename="") + b"--b--\r\n"), 2)
    assert [bytes(upload.data) for upload in uploads] == [data, b"second"]
    assert [upload.label for upload in uploads] == ["image 1 (a.png)", "image 2"]
    assert [upload.filename for upload in uploads] == ["a.png", None]


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/JPEG; x=y", "application/octet-stream"])
def test_image_body(kind):
    (upload,) = parse_uploads(kind, bytearray(b"abc"), 2)
    assert bytes(upload.data) == b"abc"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json", "text/uri-list", "application/x-www-form-urlencoded"]
)
def test_other_content_types(kind):
    assert rejection_status(kind, b'{"url": "http://127.0.0.1/"}') == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not a form", 400),
        (part(), 400),  # no closing boundary
        (part()[:40], 400),
        (b"--b--\r\n", 422),
        (part() * 3 + b"--b--\r\n", 422),
        (part(name='name="url"', filename="") + b"--b--\r\n", 422),
        (part(name="x") + b"--b--\r\n", 400),
        (part(headers=b"A: " + b"b" * 100_000 + b"\r\n") + b"--b--\r\n", 400),
        (part(headers=b"A: b\r\n" * 1000) + b"--b--\r\n", 400),
    ],
)
def test_malformed_forms(body, status):
    assert rejection_status(KIND, body) == status
    assert len(parse_uploads(KIND, bytearray(part() * 2 + b"--b--\r\n"), 2)) == 2


@pytest.mark.parametrize(
    ("start", "repeated", "statuses"),
    [
        (part(b"")[:-4] + b"A: ", b"b", {400}),  # the parser limits the headers of a part
        (part(b"")[:-4], b"A: b\r\n", {400}),
        (part(b""), b"\r\n--c", {200}),  # almost a boundary
        (b"", b"\r\n", {200, 400}),
    ],
)
def test_large_forms_take_linear_time(start, repeated, statuses):
    begin = time.process_time()
    try:
        parse_uploads(
            KIND, bytearray(start + repeated * (10_000_000 // len(repeated)) + b"\r\n" + part() + b"--b--"), 2
        )
        status = 200
    except HTTPException as error:
        status = error.status_code
    assert status in statuses
    assert time.process_time() - begin < 5


def test_form_without_a_boundary():
    assert rejection_status("multipart/form-data", part() + b"--b--\r\n") == 400
    assert rejection_status("multipart/form-data; boundary=" + "x" * 5000, part() + b"--b--\r\n") == 400


def test_clean_text():
    assert clean_text(b"../../etc/passwd") == "../../etc/passwd"  # displayed only, never opened
    assert clean_text(b"a\x00b\nc\x1b[31m") == "abc[31m"
    assert clean_text("a\u202egpj.exe".encode()) == "agpj.exe"
    assert clean_text(b"\xff\xfe") == "��"
    assert len(clean_text(b"x" * 5000)) == 100


def test_shares():
    """All clients together may hold a third more than one."""
    shares = Shares(6)
    assert shares.allows("a", 6)
    assert not shares.allows("a", 7)
    shares.add("a", 4)
    assert shares.allows("a", 2)
    assert not shares.allows("a", 3)
    assert shares.allows("b", 4)
    assert not shares.allows("b", 5)
    shares.add("a", -4)
    assert shares == {}
