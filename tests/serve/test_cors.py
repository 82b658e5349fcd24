"""Requests from pages of other sites (CORS)."""

import logging

import pytest

from deformable_detr.serve.server import check_origins
from deformable_detr.utils.errors import UserError
from tests.support.commands import is_one_line_error, run_command
from tests.support.server import encode_image, post_image, running_server, small_model

SITE, TOKEN = "https://app.example", "0123456789abcdef"


@pytest.fixture(scope="module")
def model():
    return small_model()


def preflight(client, origin, headers="authorization,content-type"):
    request = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    # A browser sends no token with it.
    return client.options("/v1/detect", headers={**request, "Authorization": ""})


def allowed(response):
    return response.headers.get("access-control-allow-origin")


def test_is_off_by_default(model):
    with running_server(model) as client:
        assert preflight(client, SITE).status_code == 403
        response = post_image(client, encode_image(), headers={"Origin": SITE})
        assert (response.status_code, allowed(response)) == (403, None)
        assert allowed(client.get("/v1/model", headers={"Origin": SITE})) is None


@pytest.mark.parametrize("token", [None, TOKEN])
def test_named_origins(model, token):
    with running_server(model, token, origins=[SITE, "http://localhost:3000"]) as client:
        for origin in (SITE, "http://localhost:3000"):
            response = preflight(client, origin)
            assert (response.status_code, allowed(response)) == (200, origin)
            assert "authorization" in response.headers["access-control-allow-headers"].lower()
            response = post_image(client, encode_image(), headers={"Origin": origin})
            assert (response.status_code, allowed(response)) == (200, origin)
        other = "https://evil.example"
        assert allowed(preflight(client, other)) is None
        response = post_image(client, encode_image(), headers={"Origin": other})
        assert (response.status_code, allowed(response)) == (200 if token else 403, None)
        if token:
            response = post_image(client, encode_image(), headers={"Origin": SITE, "Authorization": "Bearer wrong"})
            assert (response.status_code, allowed(response)) == (401, SITE)  # the page can read the reason
        else:
            response = post_image(client, encode_image(), headers={"Origin": SITE, "Host": "evil.example"})
            assert response.status_code == 421  # DNS rebinding


def test_all_origins(model):
    with running_server(model, origins=["*"]) as client:
        assert allowed(preflight(client, SITE)) == "*"
        response = post_image(client, encode_image(), headers={"Origin": SITE})
        assert (response.status_code, allowed(response)) == (200, "*")
        assert "access-control-allow-credentials" not in response.headers
        assert post_image(client, encode_image(), headers={"Host": "evil.example"}).status_code == 421


def test_warning_and_errors(caplog, capsys, tmp_path):
    with caplog.at_level(logging.WARNING):
        check_origins([SITE, "http://[::1]:3000", "http://localhost:3000"], None)
        assert caplog.messages == []
        check_origins(["*"], None)
        check_origins(["*"], TOKEN)
    assert ["a browser on this machine" in line for line in caplog.messages] == [True, False]
    for origin in ("app.example", f"{SITE}/", "null", "https://App.example", "https://*.example", "file:///x"):
        with pytest.raises(UserError, match="--allow-origin"):
            check_origins([origin], TOKEN)
    code, _, errors = run_command(capsys, "serve", tmp_path, "--allow-origin", SITE, "--allow-origin", "app.example")
    assert code == 2
    assert is_one_line_error(errors)
    assert "--allow-origin app.example" in errors
    code, _, errors = run_command(capsys, "serve", tmp_path, "--host", "0.0.0.0", "--allow-origin", "*")
    assert (code, "so a token is needed" in errors) == (2, True)
