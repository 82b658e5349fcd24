"""The scripts in benchmarks/ at tiny sizes: they run and compare equal computations."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.models import tiny, write_pseudo_labeled_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = json.dumps({
    "backbone": "test_resnet", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48, "encoder_layers": 1,
    "decoder_layers": 2, "num_queries": 20, "num_classes": 20,
})  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in this process and return its JSON."""

    def run(name, *arguments):
        path = tmp_path / "benchmark.json"
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--repeats", "1", "--json", str(path)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        sys.modules.pop("common", None)
        return json.loads(path.read_text())

    return run


def test_op(run):
    report = run("op.py", "--image-size", "64,96", "--batch", 1)
    rows = [row for row in report["rows"] if row["dtype"] == "float32"]
    assert {"transformers", "embedding_bag"} <= {row["backend"] for row in rows}
    assert all(row["error"] <= 1e-5 for row in rows)
    for row in rows:
        baseline = next(other for other in rows if (other["case"], other["backend"]) == (row["case"], "transformers"))
        assert row["forward_speedup"] == pytest.approx(baseline["forward_ms"] / row["forward_ms"])
    assert {"machine", "commit", "command"} <= set(report)


@pytest.mark.slow
def test_model(run, tmp_path):
    pytest.importorskip("transformers")
    arguments = ["--image-size", "64,96", "--config", CONFIG, "--precision", "fp32"]
    rows = run("model.py", *arguments, "--figure", tmp_path / "parts.svg")["rows"]
    assert [row["variant"] for row in rows] == ["transformers", "model", "optimized"]
    for row in rows:
        assert row["error"] < 1e-4
        assert row["speedup"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
        assert {"backbone", "projections", "encoder", "decoder", "heads", "rest"} == set(row["parts_ms"])
        assert min(row["parts_ms"].values()) >= 0
    assert (tmp_path / "parts.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_train(run):
    pytest.importorskip("transformers")
    rows = run("train.py", "--image-size", "64,96", "--config", CONFIG, "--precision", "fp32")["rows"]
    assert [row["implementation"] for row in rows] == ["transformers", "ours"]
    assert rows[1]["speedup"] == pytest.approx(rows[0]["median_ms"] / rows[1]["median_ms"])


@pytest.mark.slow
def test_scaling(run, tmp_path):
    cases = ["--images", 1, 2, "--queries", 20, 40, "--short-side", 48, 96]
    rows = run("scaling.py", *cases, "--config", CONFIG, "--figure", tmp_path / "scaling.svg")["rows"]
    assert [(row["varied"], row["images"], row["queries"], row["height"]) for row in rows] == [
        ("images", 1, 20, 48), ("images", 2, 20, 48), ("queries", 1, 20, 48), ("queries", 1, 40, 48),
        ("pixels", 1, 20, 48), ("pixels", 1, 20, 96),
    ]  # fmt: skip
    tokens = 6 * 8 + 3 * 4 + 2 * 2 + 1  # strides 8, 16, 32 and 64
    assert [row["tokens"] for row in rows[:4]] == [tokens + 20, 2 * (tokens + 20), tokens + 20, tokens + 40]
    assert rows[0]["median_ms"] == rows[2]["median_ms"] == rows[4]["median_ms"]  # timed once
    assert (tmp_path / "scaling.svg").exists()


@pytest.mark.slow
def test_predict_and_precision(run, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(tmp_path / "images" / f"{number:02}.png")
    row = run("predict.py", tmp_path / "model", tmp_path / "images", "--batch-size", 2)["rows"][0]
    assert row["images"] == 20
    assert row["ratio"] == pytest.approx(row["predict_per_second"] / row["model_per_second"])
    assert len(row["resident_mib"]) in (0, 10)
    rows = run("precision.py", tmp_path / "model", write_pseudo_labeled_dataset(tmp_path / "set", model))["rows"]
    assert rows[1]["AP"] == pytest.approx(rows[0]["AP"], abs=0.01)


def test_published_ap(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    from deformable_detr.evaluation.evaluator import evaluate
    from deformable_detr.weights import catalog

    model = tiny()
    model.save_pretrained(tmp_path / "hub")
    data = write_pseudo_labeled_dataset(tmp_path / "data", model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    ap = 100 * evaluate(tmp_path / "hub", data, device="cpu", workers=0)["AP"]
    assert ap > 1
    for published, code in ((ap + 0.1, None), (ap - 0.3, 1), (ap + 0.3, 1)):
        row = catalog.PretrainedModel("tiny-x", "someone/tiny", "Tiny", 64, 96, published, 1, catalog.COCO)
        objects = catalog.PretrainedModel("tiny-o", "someone/o", "Tiny", 64, 96, None, 1, catalog.OBJECTS365)
        monkeypatch.setattr(catalog, "CATALOG", (row, objects))
        assert published_ap(monkeypatch, "tiny-x", data, "--json", tmp_path / "ap.json") == code
        line = f"tiny-x: AP {ap:.1f}, published {published:.1f}, difference {ap - published:+.2f}"
        assert line in capsys.readouterr().out.splitlines()
    assert 100 * json.loads((tmp_path / "ap.json").read_text())["AP"] == pytest.approx(ap)
    assert "did you mean tiny-x?" in published_ap(monkeypatch, "tny-x", data)
    assert "no published AP" in published_ap(monkeypatch, "tiny-o", data)


def published_ap(monkeypatch, *arguments):
    """Run the script on the CPU and return its exit code or error."""
    monkeypatch.setattr(sys, "argv", ["published_ap.py", *map(str, arguments), "--device", "cpu", "--workers", "0"])
    try:
        runpy.run_path(str(SCRIPTS / "published_ap.py"), run_name="__main__")
    except SystemExit as error:
        return error.code


@pytest.mark.slow
def test_segm_eval(run):
    pytest.importorskip("pycocotools")
    report = run("segm_eval.py", "--images", 3, "--classes", 2)
    rows = report["rows"]
    assert [row["evaluator"] for row in rows] == ["pycocotools", "deformable-detr"]
    assert rows[1]["speedup"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])
    assert all(row["peak_mib"] > 10 for row in rows)
    assert len(set(report["ap"])) == 2
