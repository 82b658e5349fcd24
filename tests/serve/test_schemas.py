"""The server conforms to its OpenAPI description, for valid and invalid requests."""

import logging

import pytest

from tests.support.models import NAMES
from tests.support.server import encode_image, post_image, running_server, small_model

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TOKEN = "a-token-of-enough-letters"
IMAGES = {
    f"image/{kind.lower()}": [encode_image(kind, 8, 12), encode_image(kind, 20, 9)]
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")
}
SHORT = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
ANY = [image for images in IMAGES.values() for image in images]


@pytest.fixture(scope="module")
def client():
    with running_server(small_model(), token=TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def schema(client):
    # OpenAPI allows any bytes, but only images are accepted.
    for kind, images in IMAGES.items():
        schemathesis.openapi.media_type(kind, st.sampled_from(images))
    schemathesis.openapi.media_type("application/octet-stream", st.sampled_from(ANY))
    schemathesis.openapi.format("binary", st.sampled_from(ANY))
    logging.getLogger("schemathesis").setLevel(logging.WARNING)
    description = client.get("/openapi.json").json()
    description["components"].pop("securitySchemes")  # every request below has the token, also the invalid ones
    for operations in description["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)
    return schemathesis.openapi.from_dict(description)


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/explain", "/v1/model", "/healthz", "/readyz"])
def test_responses_conform_to_the_description(client, schema, path):
    method = "POST" if path in ("/v1/detect", "/v1/explain") else "GET"
    operation = schema[path][method]
    # Routes without parameters have no invalid requests.
    modes = list(schemathesis.GenerationMode) if method == "POST" else [schemathesis.GenerationMode.POSITIVE]
    for mode in modes:

        @seed(1)  # schemathesis takes a few valid requests for invalid ones; derandomize would depend on this source
        @SHORT
        @given(operation.as_strategy(generation_mode=mode))
        def holds(case):
            case.call_and_validate(base_url=str(client.base_url), headers={"Authorization": f"Bearer {TOKEN}"})

        holds()


def test_wrong_description_is_detected(client):
    wrong = client.get("/openapi.json").json()
    wrong["components"]["schemas"]["State"]["properties"]["status"]["type"] = "integer"
    case = schemathesis.openapi.from_dict(wrong)["/healthz"]["GET"].Case()
    with pytest.raises(schemathesis.core.failures.FailureGroup):
        case.call_and_validate(base_url=str(client.base_url))


def test_response_statuses_are_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    responses = paths["/v1/detect"]["post"]["responses"]
    assert {"200", "400", "401", "408", "413", "415", "422", "503", "504"} <= set(responses)
    for request in (encode_image(), b"nothing", encode_image("JPEG", 99, 99)[:400]):
        assert str(post_image(client, request).status_code) in responses
    assert NAMES[0] == client.get("/v1/model").json()["classes"][0]["name"]
