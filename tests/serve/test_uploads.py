"""Parsing of request bodies and cleaning of file names."""

import pytest
from starlette.exceptions import HTTPException

from deformable_detr.serve.uploads import BodyBudget, clean_text, parse_uploads

KIND = "multipart/form-data; boundary=b"


def part(data=b"x", name='name="images"', filename='; filename="a.png"', more=b""):
    return (
        b"--b\r\nContent-Disposition: form-data; "
        + (name + filename).encode()
        + b"\r\n"
        + more
        + b"\r\n"
        + data
        + b"\r\n"
    )


def refused(kind, body, most=2):
    with pytest.raises(HTTPException) as caught:
        parse_uploads(kind, bytearray(body), most)
    return caught.value.status_code


def test_parts_in_order():
    data = bytes(range(256)) * 20 + b"\r\n--b\r\r\n--"
    found = parse_uploads(KIND, bytearray(part(data) + part(b"second", filename="") + b"--b--\r\n"), 2)
    assert [bytes(one.data) for one in found] == [data, b"second"]
    assert [one.label for one in found] == ["image 1 (a.png)", "image 2"]
    assert [one.filename for one in found] == ["a.png", None]


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/JPEG; x=y", "application/octet-stream"])
def test_image_body(kind):
    (found,) = parse_uploads(kind, bytearray(b"abc"), 2)
    assert bytes(found.data) == b"abc"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json", "text/uri-list", "application/x-www-form-urlencoded"]
)
def test_other_content_types(kind):
    assert refused(kind, b'{"url": "http://127.0.0.1/"}') == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"no form", 400),
        (part(), 400),  # no last boundary
        (part()[:40], 400),
        (b"--b--\r\n", 422),
        (part() * 3 + b"--b--\r\n", 422),
        (part(name='name="url"', filename="") + b"--b--\r\n", 422),
        (part(name="x") + b"--b--\r\n", 400),
        (part(more=b"A: " + b"b" * 100_000 + b"\r\n") + b"--b--\r\n", 400),
        (part(more=b"A: b\r\n" * 1000) + b"--b--\r\n", 400),
    ],
)
def test_malformed_forms(body, status):
    assert refused(KIND, body) == status
    assert len(parse_uploads(KIND, bytearray(part() * 2 + b"--b--\r\n"), 2)) == 2


def test_a_form_without_a_boundary():
    assert refused("multipart/form-data", part() + b"--b--\r\n") == 400
    assert refused("multipart/form-data; boundary=" + "x" * 5000, part() + b"--b--\r\n") == 400


def test_clean_text():
    assert clean_text(b"../../etc/passwd") == "../../etc/passwd"  # only shown, never opened
    assert clean_text(b"a\x00b\nc\x1b[31m") == "abc[31m"
    assert clean_text("a\u202egpj.exe".encode()) == "agpj.exe"
    assert clean_text(b"\xff\xfe") == "��"
    assert len(clean_text(b"x" * 5000)) == 100


def test_the_budget_is_limited():
    budget = BodyBudget(10)
    budget.add(10)
    with pytest.raises(HTTPException, match="too much data") as caught:
        budget.add(1)
    assert caught.value.status_code == 503
    assert caught.value.headers == {"retry-after": "2"}
    budget.used -= 10
    budget.add(10)
