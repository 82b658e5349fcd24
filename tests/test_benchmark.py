"""The `benchmark` command: every available runtime is measured, and the metrics are consistent."""

import json
import socket
import sys
import time

import pytest
import torch

from deformable_detr import benchmark as module
from deformable_detr.benchmark import benchmark, describe_machine, peak_memory_mib, table, time_interleaved
from deformable_detr.cli import main
from deformable_detr.runtimes.fused.onednn import has_bf16
from tests.support.models import tiny, write_pseudo_labeled_dataset

IN_PROCESS = [("eager", "fp32"), ("optimized", "fp32"), *([("optimized", "bf16")] if has_bf16() else [])]


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def without_exports(monkeypatch):
    monkeypatch.setattr(module, "_exported_variants", lambda *_: {})


def test_rows_and_speedups(model, without_exports):
    rows = benchmark(model, batch_size=2, image_size=(64, 96), repeats=1)
    assert [(row.runtime, row.precision) for row in rows] == IN_PROCESS
    for row in rows:
        assert row.images_per_second == pytest.approx(2e3 / row.median_ms)
        assert row.speedup == pytest.approx(rows[0].median_ms / row.median_ms)
        assert (row.peak_mib is not None) == (sys.platform == "linux")
        assert row.ap is None
    assert len(table(rows).splitlines()) == len(rows) + 2


def test_command_line(model, without_exports, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    data = write_pseudo_labeled_dataset(tmp_path / "set", model)
    main(["benchmark", str(tmp_path / "model"), str(data), "--image-size", "64,96", "--repeats", "1",
          "--device", "cpu", "--json", str(tmp_path / "benchmark.json")])  # fmt: skip
    assert "| eager | fp32 |" in capsys.readouterr().out
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["image_size"] == [64, 96]
    assert results["machine"]["versions"]["torch"]
    aps = [row["ap"] for row in results["rows"]]
    assert aps[0] > 0.1
    assert aps[1] == pytest.approx(aps[0], abs=0.01)


@pytest.mark.slow
def test_exported_files_and_missing_packages(model, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "openvino" else object())
    lines = []
    rows = benchmark(model, image_size=(64, 96), repeats=1, report=lines.append)
    assert [(row.runtime, row.precision) for row in rows] == [*IN_PROCESS, ("onnx", "fp32")]
    assert rows[-1].peak_mib is None
    assert "openvino is not measured: pip install 'deformable-detr[export]'" in lines


@pytest.mark.slow
def test_all_forms_with_ap(model, tmp_path, monkeypatch):
    for package in ("onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    from deformable_detr.export import export

    monkeypatch.setattr(export, "MAX_AP_LOSS", 1.0)  # random weights lose AP in int8
    data = write_pseudo_labeled_dataset(tmp_path / "set", model, images=6)
    rows = benchmark(model, data, image_size=(64, 96), repeats=1)
    forms = [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8")]
    assert [(row.runtime, row.precision) for row in rows] == [*IN_PROCESS, *forms]
    assert all(row.ap is not None for row in rows)


def test_first_round_is_not_counted():
    calls = []
    timings = time_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.01 if len(calls) > 1 else 0.5)}, 3
    )
    assert calls == ["a"] * 4
    assert 10 <= timings["b"].median_ms <= timings["b"].p95_ms < 400


def test_peak_memory_excludes_the_result():
    size = 64 << 20

    def call():
        return (torch.ones(size // 4) + 1)[:1].clone()

    peak = peak_memory_mib(call, "cpu")
    if peak is None:
        pytest.skip("unknown on this platform")
    assert 64 <= peak <= 200
    assert peak_memory_mib(lambda: torch.ones(size // 4), "cpu") < 20


def test_description_names_no_host():
    text = json.dumps(describe_machine())
    assert socket.gethostname() not in text
    assert "/home" not in text
