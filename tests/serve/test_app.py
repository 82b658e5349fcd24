"""Routes of a running server: responses equal `predict`, and invalid requests get the right status and one line."""

import io
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.explanation import trace
from deformable_detr.serve import schemas
from deformable_detr.utils.tiles import Tiling
from tests.support.masks import with_masks
from tests.support.models import NAMES
from tests.support.server import delayed, encode_image, multipart, post_image, running_server, small_model, wait_until

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=2)


@pytest.fixture(scope="module")
def client(model):
    with running_server(model) as client:
        yield client


def assert_same(image_result, expected):
    assert [detection["name"] for detection in image_result["detections"]] == list(expected.names)
    assert [detection["category_id"] for detection in image_result["detections"]] == expected.category_ids.tolist()
    assert (image_result["height"], image_result["width"]) == expected.image_size
    boxes = torch.tensor([detection["box"] for detection in image_result["detections"]]).view(-1, 4)
    scores = torch.tensor([detection["score"] for detection in image_result["detections"]])
    torch.testing.assert_close(boxes, expected.boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=0)


def predict(model, data, **options):
    return model.predict(Image.open(io.BytesIO(data)), **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_image_as_the_body(client, model, kind):
    data = encode_image(kind, 50, 71)
    response = post_image(client, data, kind=f"image/{kind.lower()}")
    assert response.status_code == 200, response.text
    (image_result,) = schemas.Detected.model_validate(response.json()).model_dump()["images"]
    assert image_result["detections"]
    assert image_result["name"] is None
    assert_same(image_result, predict(model, data))


def test_boxes_are_clipped_to_the_image():
    model = small_model()
    with torch.no_grad():
        for head in model.decoder.heads.boxes:
            head.layers[-1].bias[2:] += 3.0
    data = encode_image("PNG", 48, 64)
    with running_server(model) as client:
        (image_result,) = post_image(client, data).json()["images"]
    assert any(box["box"][0] == 0 and box["box"][3] == 48 for box in image_result["detections"])
    assert_same(image_result, predict(model, data))


def test_masks_only_of_models_that_have_them(client, model):
    data = encode_image("PNG", 50, 71)
    model = with_masks(deepcopy(model))
    with running_server(model) as masks_client:
        response = post_image(masks_client, data, params={"top_k": 6})
        (image_result,) = response.json()["images"]
        assert schemas.Detected.model_validate(response.json()).images[0].detections[0].mask is not None
        explained = post_image(masks_client, data, "/v1/explain", params={"top_k": 1}).json()
    expected = predict(model, data, top_k=6)
    assert_same(image_result, expected)
    masks = [detection.pop("mask") for detection in image_result["detections"]]
    assert masks == list(expected.segmentations)
    assert expected.masks.flatten(1).any(1).all()
    assert explained["detections"][0]["mask"] == masks[0]
    plain = post_image(client, data, params={"top_k": 6})
    assert plain.json()["images"][0] == image_result
    assert b"mask" not in plain.content


def test_multiple_images_in_a_form(client, model):
    sizes = [(48, 64), (64, 48), (48, 64), (100, 30), (48, 64)]
    images = [encode_image("PNG", *size, seed=number) for number, size in enumerate(sizes)]
    results = client.post("/v1/detect", files=multipart(*images), params={"threshold": 0.3, "top_k": 7}).json()[
        "images"
    ]
    assert [image_result["name"] for image_result in results] == [f"{number}.png" for number in range(5)]
    for image_result, data in zip(results, images, strict=True):
        assert_same(image_result, predict(model, data, threshold=0.3, top_k=7))


def test_concurrent_requests_equal_serial_prediction(client, model):
    images = [encode_image("PNG", *size, seed=seed) for seed in range(6) for size in ((48, 64), (64, 64))]
    expected = [predict(model, data, threshold=0.2, top_k=5 + number) for number, data in enumerate(images)]
    before = client.engine.metrics.batch_images._sum.get()

    def send(number):
        index = number % len(images)
        response = post_image(client, images[index], params={"threshold": 0.2, "top_k": 5 + index})
        assert response.status_code == 200, response.text
        assert_same(response.json()["images"][0], expected[index])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(send, range(60)))
    assert client.engine.metrics.batch_images._sum.get() - before == 60


def test_tiles(client, model):
    data, small = encode_image("PNG", 150, 230), encode_image("PNG", 50, 60)
    query = "?threshold=0.4&tile=96&tile_overlap=0.25&top_k=9"
    response = client.post(f"/v1/detect{query}", files=multipart(data, small))
    assert response.status_code == 200, response.text
    options = {"threshold": 0.4, "top_k": 9, "tile": 96, "tile_overlap": 0.25}
    expected = [predict(model, image, **options) for image in (data, small)]
    assert len(expected[0]) > 9
    for result, detections in zip(response.json()["images"], expected, strict=True):
        assert_same(result, detections)


def test_too_many_or_too_small_tiles(client):
    data = encode_image("PNG", 800, 800)
    response = post_image(client, data, "/v1/detect?tile=32&tile_overlap=0.5")
    assert response.status_code == 422
    assert response.json() == {"detail": "the image: 2401 tiles; an image may have 256: use larger ones"}
    assert post_image(client, data, "/v1/detect?tile=31").status_code == 422
    assert post_image(client, data, "/v1/detect?tile=64&tile_overlap=1").status_code == 422


def test_tiles_by_default_of_the_server(model):
    data = encode_image("PNG", 150, 230)
    with running_server(model, tiling=Tiling(96, 0.25)) as client:
        assert_same(post_image(client, data).json()["images"][0], predict(model, data, tile=96, tile_overlap=0.25))


def test_exif_orientation(client, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode_image("JPEG", 40, 80, exif=exif)
    (image_result,) = post_image(client, data).json()["images"]
    assert (image_result["height"], image_result["width"]) == (80, 40)
    assert_same(image_result, predict(model, data))


def test_explain_matches_trace(client, model):
    data = encode_image(seed=3)
    response = client.post("/v1/explain", files=multipart(data), params={"threshold": 0.2, "top_k": 4})
    image_result = schemas.Explained.model_validate(response.json()).model_dump()
    traced = trace(model, Image.open(io.BytesIO(data)), threshold=0.2, top_k=4)
    assert len(image_result["detections"]) == len(traced.detections) == 4
    assert_same(image_result, traced.detections)
    for index, detection in enumerate(image_result["detections"]):
        sampling = traced.detection(index).layers
        assert len(detection["layers"]) == len(sampling) == 2
        for layer, expected in zip(detection["layers"], sampling, strict=True):
            points = torch.tensor(layer["points"])
            torch.testing.assert_close(points[:, :2], expected.locations.view(-1, 2), atol=0.06, rtol=0)
            torch.testing.assert_close(points[:, 2], expected.weights.view(-1), atol=1e-4, rtol=0)
            assert points[:, 4].tolist() == [head for head in range(2) for _ in range(len(points) // 2)]
    assert client.post("/v1/explain", files=multipart(data, data)).status_code == 422


def test_model_description(client):
    description = schemas.Model.model_validate(client.get("/v1/model").json())
    assert [category.name for category in description.classes] == list(NAMES)
    assert description.explains
    assert description.limits.body_bytes == 20_000_000


@pytest.mark.slow
def test_exported_model_cannot_explain(tmp_path):
    from deformable_detr.export import ExportOptions, export_model, load_exported

    pytest.importorskip("onnxruntime")
    export_model(small_model(), tmp_path / "tiny.onnx", "onnx", ExportOptions(image_size=(64, 64)))
    exported = load_exported(tmp_path / "tiny.onnx", "cpu")
    with running_server(exported) as client:
        assert not client.get("/v1/model").json()["explains"]
        assert "/v1/explain" not in client.get("/openapi.json").json()["paths"]
        assert post_image(client, encode_image(), "/v1/explain").status_code == 404
        images = [encode_image("PNG", *size) for size in ((48, 64), (64, 48), (30, 90))]
        results = client.post("/v1/detect", files=multipart(*images)).json()["images"]
        for image_result, data in zip(results, images, strict=True):
            assert_same(image_result, predict(exported, data))


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"threshold": 1.5}, 422), ({"threshold": -0.1}, 422), ({"threshold": "nan"}, 422), ({"threshold": "x"}, 422),
        ({"top_k": 0}, 422), ({"top_k": 1001}, 422), ({"top_k": 1.5}, 422), ({"url": "http://127.0.0.1"}, 422),
        ({"path": "/etc/passwd"}, 422), ({"threshold": 0}, 200), ({"threshold": 1}, 200), ({"top_k": 1000}, 200),
    ],
)  # fmt: skip
def test_parameters(client, query, status):
    response = post_image(client, encode_image(), params=query)
    assert response.status_code == status
    if status != 200:
        assert next(iter(query)) in response.json()["detail"]


def test_damaged_image_fails_only_its_request(client):
    data = encode_image("JPEG", 100, 100)
    response = client.post("/v1/detect", files=multipart(encode_image(), data[: len(data) // 2]))
    assert response.status_code == 422
    assert response.json()["detail"].startswith("image 2 (1.png): cannot be read as an image (image file is truncated")
    assert client.post("/v1/detect", files=multipart(encode_image(), data)).status_code == 200


ATTACKS = [
    *(("GET", path, None, None, 404) for path in (
        "/../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page.css/../../engine.py", "/%2e%2e/%2e%2e/etc/passwd",
        "/page.js%00.png", "//etc/passwd", "/static/../../etc/passwd", "/v1/../../etc/passwd",
        "/v1/detect/..%5c..%5cwin.ini",
        "/.env", "/.git/config", "/docs", "/redoc", "/page.html/", "/http://169.254.169.254/latest/meta-data",
    )),
    *(("POST", "/v1/detect", kind, body, 415) for kind, body in (
        ("application/json", b'{"url": "http://169.254.169.254/"}'), ("application/json", b'{"path": "/etc/passwd"}'),
        ("text/uri-list", b"file:///etc/passwd"), ("text/plain", b"http://127.0.0.1:22/"),
        ("application/x-www-form-urlencoded", b"image=@/etc/passwd"), ("image/png", b"http://127.0.0.1/a.png"),
        ("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
        ("application/octet-stream", b"%!PS\n(/etc/passwd) run"), ("image/png", b"\x1f\x8b" + bytes(100)),
        ("application/xml", b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>"),
        ("application/octet-stream", b"PK\x03\x04" + bytes(100)), ("image/x-icon", b"\0\0\1\0" + bytes(100)),
    )),
    ("POST", "/v1/detect?url=http://127.0.0.1/", "image/png", encode_image(), 422),
    ("POST", "/v1/detect?file=/etc/passwd", "image/png", encode_image(), 422),
    ("POST", "/v1/explain?image=file:///etc/passwd", "image/png", encode_image(), 422),
    ("PUT", "/v1/detect", "image/png", encode_image(), 405),
    ("DELETE", "/v1/model", None, None, 405),
    ("POST", "/metrics", "text/plain", b"x", 405),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "kind", "body", "status"), ATTACKS)
def test_paths_and_urls_are_never_opened(client, method, path, kind, body, status):
    # httpx would normalize the path.
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request(method, path, body, {"Content-Type": kind} if kind else {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status == status
    assert b"root:" not in text
    assert set(json.loads(text)) == {"detail"}


def test_at_least_thirty_attacks():
    assert len(ATTACKS) >= 30


def test_compressed_bodies_are_rejected(client):
    assert post_image(client, encode_image(), headers={"Content-Encoding": "gzip"}).status_code == 415
    assert post_image(client, encode_image(), headers={"Content-Encoding": "identity"}).status_code == 200


def test_pixel_limit():
    with running_server(pixels=48 * 64) as client:
        assert post_image(client, encode_image(height=48, width=64)).status_code == 200
        response = post_image(client, encode_image(height=48, width=65))
        assert response.status_code == 413
        assert "megapixels" in response.json()["detail"]


def test_body_limit_while_streaming():
    data = encode_image("BMP", 64, 64)
    sent = []

    def endless():
        for _ in range(3000):
            sent.append(1)
            yield bytes(10_000)

    with running_server(body_bytes=len(data)) as client:
        assert post_image(client, data).status_code == 200
        declared = post_image(client, data + b"x")
        assert declared.status_code == 413
        streamed = client.post("/v1/detect", content=endless(), headers={"Content-Type": "image/bmp"})
        assert streamed.status_code == 413
        assert post_image(client, data).status_code == 200
        pieces = (data[start : start + 1000] for start in range(0, len(data), 1000))
        assert client.post("/v1/detect", content=pieces, headers={"Content-Type": "image/bmp"}).status_code == 200


def test_total_body_limit():
    data = encode_image("BMP", 64, 64)
    with running_server(total_body_bytes=-(-len(data) * 4 // 3)) as client:
        assert post_image(client, data).status_code == 200
        assert post_image(client, data + b"x").status_code == 503
        assert post_image(client, data).status_code == 200


def test_images_per_request_limit():
    with running_server(images=2, max_queue=2) as client:
        assert client.post("/v1/detect", files=multipart(encode_image(), encode_image())).status_code == 200
        assert (
            client.post("/v1/detect", files=multipart(encode_image(), encode_image(), encode_image())).status_code
            == 422
        )


def test_overload_results_200_or_503():
    data = encode_image()
    with running_server(delayed(small_model(), 0.05), max_queue=4, images=4, max_batch_size=2) as client:

        def send(_):
            response = post_image(client, data)
            if response.status_code == 503:
                assert 1 <= int(response.headers["retry-after"]) <= 30
            return response.status_code

        with ThreadPoolExecutor(16) as pool:  # four times the queue limit
            statuses = list(pool.map(send, range(64)))
        assert set(statuses) == {200, 503}
        assert send(0) == 200
        assert client.engine._images.total() == 0


def test_explanation_limit():
    with running_server(delayed(small_model(), 0.2), max_explanations=1) as client, ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: post_image(client, encode_image(), "/v1/explain").status_code, range(4)))
        assert sorted(set(statuses)) == [200, 503]
        assert post_image(client, encode_image(), "/v1/explain").status_code == 200


def test_timeout():
    model, gate = small_model(), threading.Event()
    with running_server(model, timeout=0.5) as client:
        hook = model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
        response = post_image(client, encode_image())
        assert response.status_code == 504
        assert response.json()["detail"] == "no response within 0.5 s"
        hook.remove()
        gate.set()
        wait_until(lambda: client.engine._images.total() == 0)
        wait_until(
            lambda: post_image(client, encode_image()).status_code == 200
        )  # a loaded machine may miss the deadline


@pytest.mark.parametrize("function", ["parse_uploads", "detected_image"])
def test_timeout_includes_parsing_and_serialization(monkeypatch, function):
    from deformable_detr.serve import app

    module = schemas if function == "detected_image" else app
    original, reached, gate = getattr(module, function), threading.Event(), threading.Event()

    def blocked(*arguments):
        reached.set()
        gate.wait(60)
        return original(*arguments)

    with running_server(small_model(), timeout=0.5) as client:
        monkeypatch.setattr(module, function, blocked)
        # A loaded machine may time out before the patched function, so retry.
        wait_until(lambda: post_image(client, encode_image()).status_code == 504 and reached.is_set())
        monkeypatch.undo()
        gate.set()
        wait_until(lambda: post_image(client, encode_image()).status_code == 200)


def test_work_of_disconnected_clients_is_canceled():
    model, gate, forward_passes = small_model(), threading.Event(), []
    with running_server(model, max_batch_size=1) as client:
        model.register_forward_pre_hook(lambda *_: gate.wait(30) and None)
        model.register_forward_hook(lambda *_: forward_passes.append(1))
        first = threading.Thread(target=post_image, args=(client, encode_image()))
        first.start()
        wait_until(lambda: client.engine._images.total() == 1)
        head = "POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: "
        with socket.create_connection(("127.0.0.1", client.port)) as disconnecting:
            disconnecting.sendall(f"{head}{len(encode_image())}\r\n\r\n".encode() + encode_image())
            wait_until(lambda: client.engine._images.total() == 2 and len(client.engine._batcher) == 1)
        wait_until(lambda: client.engine._images.total() == 1)
        gate.set()
        first.join()
        assert post_image(client, encode_image()).status_code == 200
        assert len(forward_passes) == 2  # the first and the last request


def test_model_error_is_logged_and_the_server_continues(caplog):
    model = small_model()
    with running_server(model) as client:

        def fail(*_):
            raise RuntimeError("secret")

        hook = model.register_forward_pre_hook(fail)
        response = post_image(client, encode_image())
        hook.remove()
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" in caplog.text
        assert post_image(client, encode_image()).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_health_and_readiness(client):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    client.engine.draining = True
    try:
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.headers["connection"] == "close"
        assert client.get("/healthz").status_code == 200
        assert post_image(client, encode_image()).status_code == 200
    finally:
        client.engine.draining = False
    assert client.get("/readyz").status_code == 200


def test_dead_model_thread_is_unhealthy():
    with running_server() as client:
        client.engine._batcher.stop()
        assert client.get("/healthz").status_code == 503
        assert client.get("/readyz").status_code == 503


def test_metrics(client):
    post_image(client, encode_image())
    client.get("/no/such/path")
    text = client.get("/metrics").text
    assert 'deformable_detr_requests_total{path="/v1/detect",status="200"}' in text
    assert 'deformable_detr_requests_total{path="other",status="404"}' in text
    assert "no/such" not in text
    assert "deformable_detr_ready 1.0" in text


def test_page_is_self_contained(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    files = re.findall(r'(?:src|href)="([\w.]+)"', page.text)
    assert {"page.js", "results.js", "zoom.js", "labels.js", "masks.js", "style.css"} <= set(files)
    for path in ("/", *(f"/{file}" for file in files)):
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "//cdn" not in text


@pytest.fixture(scope="module")
def token_client():
    with running_server(token=TOKEN) as client:
        yield client


class TestToken:
    @pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
    def test_is_required(self, token_client, header):
        headers = {"Authorization": header} if header is not None else {}
        for method, path in (
            ("GET", "/v1/model"),
            ("GET", "/metrics"),
            ("POST", "/v1/detect"),
            ("POST", "/v1/explain"),
        ):
            response = httpx.request(method, f"{token_client.base_url}{path}", headers=headers, trust_env=False)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"

    def test_grants_access(self, token_client):
        assert post_image(token_client, encode_image()).status_code == 200
        assert token_client.get("/v1/model").status_code == 200
        assert token_client.get("/metrics").status_code == 200
        assert post_image(token_client, encode_image(), headers={"Host": "photos.example"}).status_code == 200

    def test_is_not_required_for_health_checks_and_the_page(self, token_client):
        for path in ("/healthz", "/readyz", "/", "/page.css", "/viewer.js", "/openapi.json"):
            assert httpx.get(f"{token_client.base_url}{path}", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200), ({"Host": "127.0.0.1"}, 200), ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example"}, 421), ({"Host": "127.0.0.1.evil.example"}, 421), ({"Host": "192.168.0.1"}, 421),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://[bad"}, 403),
    ],
)  # fmt: skip
def test_other_hosts_and_origins_are_rejected_without_a_token(client, headers, status):
    assert post_image(client, encode_image(), headers=headers).status_code == status


def test_same_origin_is_allowed(client):
    origin = str(client.base_url).rstrip("/")
    assert post_image(client, encode_image(), headers={"Origin": origin}).status_code == 200


def test_large_images_are_decoded_one_at_a_time(client, monkeypatch):
    monkeypatch.setattr("deformable_detr.serve.engine.LARGE_IMAGE", 48 * 64 - 1)
    submitted = []
    original = client.engine._large_reader.submit
    monkeypatch.setattr(client.engine._large_reader, "submit", lambda *a: submitted.append(1) or original(*a))
    assert (
        client.post("/v1/detect", files=multipart(encode_image(), encode_image(height=20, width=20))).status_code == 200
    )
    assert submitted == [1]
    assert np.isfinite(client.engine._seconds_per_image)
