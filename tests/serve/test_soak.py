"""Load with 30% invalid requests: short by default, long with SOAK=100000 and `-m slow`."""

import os

import pytest

from tests.support.server import encode_image, running_server, small_model
from tests.support.soak import Soak, equal


@pytest.mark.parametrize(
    "requests", [300, pytest.param(int(os.environ.get("SOAK", 20_000)), marks=pytest.mark.slow, id="long")]
)
def test_valid_and_invalid_requests_under_load(requests):
    model = small_model()
    with running_server(model) as client:
        soak = Soak(client, model, requests, clients=8 if requests == 300 else 32)
        soak.run()
        assert client.engine._images.total() == 0
    assert soak.problems == []
    statuses = {status for _, status in soak.counts}
    assert {0, 200, 400, 404, 413, 415, 422} <= statuses <= {0, 200, 400, 404, 413, 415, 422, 503}
    assert sum(count for (kind, _), count in soak.counts.items() if kind != "good") > 0.2 * requests
    if requests > 300:
        assert soak.growth() < 0.05


def test_wrong_responses_are_detected():
    model = small_model()
    with running_server(model) as client:
        soak = Soak(client, model, 1, 1)
        response = client.post("/v1/detect", params={"threshold": 0.1, "top_k": 20}, content=soak.images[0],
                               headers={"Content-Type": "image/png"}).json()["images"][0]  # fmt: skip
        assert equal(response, soak.expected[0])
        assert not equal(response, soak.expected[1])
        response["detections"][0]["box"][0] += 0.02
        assert not equal(response, soak.expected[0])
        soak._note("good", client.post("/v1/detect", content=encode_image()), (200,))
        assert soak.problems
