"""Every command on every family: from a folder that transformers wrote to a trained, exported and served model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import httpx
import pytest
import torch
from safetensors.torch import load_file
from tests.support.commands import run_command
from tests.support.image_sources import read_rows
from tests.support.server import ServerProcess
from tests.support.transformers_models import CONFIGS, write_repository

from deformable_detr.training.checkpoint import load_checkpoint
from deformable_detr.utils.files import EXPORT_SUFFIXES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")]
for package in ("transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "ray", "fastapi"):
    pytest.importorskip(package, reason=f"needs {package}")

CARDS = ("nine", "ten", "jack", "queen", "king", "ace")
# A Deformable DETR that this package's own network runs.
OWN = CONFIGS["deformable_detr"] | {
    "decoder_attention_heads": 4,
    "num_feature_levels": 3,  # with stride 64, the sizes that `export` verifies would be too small for a .pt2
    "backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [2, 3, 4]},
}
FAMILIES = [*(name for name in CONFIGS if " " not in name), "deformable_detr own"]
LOW = ("--threshold", "0.01")  # of models that have hardly learned
# Train with a save after every step, and die in the fourth step.
KILLED = """
import os, signal, sys
from deformable_detr.cli import main
from deformable_detr.training import trainer
from deformable_detr.training.step import TrainStep
step, calls = TrainStep.step, []
def killed_step(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **options)
assert trainer._SAVE_SECONDS > 0
TrainStep.step, trainer._SAVE_SECONDS = killed_step, 0.0
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cards(shared, tmp_path_factory):
    """Return a dataset of eight training and four validation images."""
    source, root = shared / "data/playing_cards", tmp_path_factory.mktemp("cards")
    for split, count in (("train", 8), ("val", 4)):
        (root / split).mkdir()
        content = json.loads((source / split / "_annotations.coco.json").read_text())
        content["images"] = content["images"][:: len(content["images"]) // count][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
        for image in content["images"]:
            shutil.copy(source / split / image["file_name"], root / split)
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@pytest.fixture(params=FAMILIES)
def repository(request, tmp_path):
    with mock.patch.dict(CONFIGS, {"deformable_detr own": OWN}):
        write_repository(tmp_path / "repository", request.param, names=CARDS)
    if request.param == "deformable_detr":  # files of other models than this package's own have one input size
        processor = tmp_path / "repository/preprocessor_config.json"
        processor.write_text(json.dumps({**json.loads(processor.read_text()), "size": {"height": 96, "width": 96}}))
    return tmp_path / "repository"


def test_every_command(repository, cards, tmp_path, capsys):
    def run(*arguments):
        code, output, errors = run_command(capsys, *arguments)
        assert code == 0, f"{arguments}: {errors}"
        return output + errors

    photo = sorted((cards / "val").glob("*.jpg"))[0]
    trained = tmp_path / "trained"
    assert "train 8 images" in run("check", cards)
    train_and_resume(run, repository, cards, tmp_path)

    table = run("evaluate", trained, cards, "--report", tmp_path / "report.html", "--workers", "0", *json_to(tmp_path))
    assert "AP50" in table
    metrics = read_json(tmp_path)
    assert "AP50" in (tmp_path / "report.html").read_text()
    run("predict", trained, photo, "--out", tmp_path / "pictures", *LOW, *json_to(tmp_path))
    assert (tmp_path / "pictures" / photo.name).stat().st_size > 1000
    (record,) = read_json(tmp_path)
    assert len(record["detections"]) > 5
    for name in ("explained.png", "explained.html"):
        text = run("explain", trained, photo, "--out", tmp_path / name, *LOW, *json_to(tmp_path))
        assert "layer 2: score" in text
        assert read_json(tmp_path)["detection"]["box"] == pytest.approx(record["detections"][0]["box"], abs=0.1)
        assert (tmp_path / name).stat().st_size > 10_000

    for to, suffix in EXPORT_SUFFIXES.items():
        file = tmp_path / f"model{suffix}"
        assert run("export", trained, "--to", to, "--out", file).count("verified batch") == 3
        run("predict", file, photo, *LOW, *json_to(tmp_path))
        assert_same_detections(read_json(tmp_path)[0]["detections"], record["detections"])
    run("evaluate", tmp_path / "model.onnx", cards, "--workers", "0", *json_to(tmp_path))
    assert read_json(tmp_path)["AR100"] == pytest.approx(metrics["AR100"], abs=1e-3)
    table = run("benchmark", trained, "--repeats", "1", "--threads", "1")
    assert all(name in table for name in ("| eager | fp32", "| optimized | fp32", "| onnx | fp32", "| openvino | fp32"))

    for name, model in (("model", trained), ("file", tmp_path / "model.onnx")):
        serve(model, photo, record["detections"], explains=name == "model")
        run("predict-dataset", model, cards / "val", "--out", tmp_path / name, "--num-cpus", "1", *LOW)
        (row,) = (row for image, row in read_rows(tmp_path / name).items() if Path(image).name == photo.name)
        assert row["error"] is None
        keys = ("box", "score", "name")
        found = zip(row["boxes"], row["scores"], row["names"], strict=True)
        assert_same_detections([dict(zip(keys, item, strict=True)) for item in found], record["detections"])


def train_and_resume(run, repository, cards, tmp_path):
    """Train; train again, killed in the fourth of four steps; resume: the weights are equal bit by bit."""
    options = ["--weights", repository, "--epochs", "2", "--device", "cpu", "--workers", "0"]
    trained, killed = tmp_path / "trained", tmp_path / "killed"
    text = run("train", cards, "--out", trained, *options)
    assert "epoch 2/2: step 4" in text
    assert "new:" not in text, "the heads of classes with the same names are kept"
    command = [sys.executable, "-c", KILLED, "train", cards, "--out", killed, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_checkpoint(killed / "checkpoints/last")[1]["train_state"]["step"] == 3, "in the middle of an epoch"
    assert "epoch 1/2" not in run("train", cards, "--out", killed, "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, killed))
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    start = load_file(repository / "model.safetensors")
    shared = [name for name in first if name in start]
    assert not shared or any(not torch.equal(first[name], start[name]) for name in shared)


def serve(model, photo, expected, explains):
    """Start the server, send an image, and fetch its page and an explanation."""
    server = ServerProcess(model)
    try:
        with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
            sent = {"content": photo.read_bytes(), "headers": {"Content-Type": "image/jpeg"}}
            (image,) = client.post("/v1/detect", params={"threshold": 0.01}, **sent).json()["images"]
            assert_same_detections(image["detections"], expected)
            assert client.get("/v1/model").json()["explains"] == explains
            explained = client.post("/v1/explain", params={"threshold": 0.01}, **sent)
            assert explained.status_code == (200 if explains else 404), explained.text
            assert "<html" in client.get("/").text
        server.signal(signal.SIGTERM)
        assert server.wait()[0] == 0
    finally:
        server.process.kill()


def assert_same_detections(detections, expected):
    """All, in any order of nearly equal scores."""
    assert len(detections) == len(expected)
    for one in expected:
        assert any(
            one["name"] == other["name"]
            and one["score"] == pytest.approx(other["score"], abs=1e-3)
            and one["box"] == pytest.approx(other["box"], abs=0.5)
            for other in detections
        ), one


def json_to(tmp_path):
    return "--json", tmp_path / "results.json"


def read_json(tmp_path):
    return json.loads((tmp_path / "results.json").read_text())
