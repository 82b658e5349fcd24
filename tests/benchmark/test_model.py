"""The benchmarks of the model, of prediction and of training: what they measure is what they say."""

import copy
import json
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deformable_detr import DeformableDETR
from deformable_detr.benchmark import export as exported
from deformable_detr.benchmark import model as bench
from deformable_detr.benchmark import predict, rounds, scaling, train
from deformable_detr.benchmark.parts import TimedParts
from deformable_detr.config import presets
from tests.support.models import tiny
from tests.support.red_box import RedBoxFinder

TINY = {
    "backbone": "test_resnet", "hidden_dim": 64, "num_heads": 4, "ffn_dim": 48, "encoder_layers": 1,
    "decoder_layers": 2, "num_queries": 20, "num_classes": 20,
}  # fmt: skip


def test_model_beside_transformers():
    pytest.importorskip("transformers")
    wanted = ("transformers", "model", "optimized")
    rows = bench.measure("refine", [(64, 96)], [2], ["fp32"], wanted, 2, "default", changes=TINY)
    assert [row.way for row in rows] == list(wanted)
    assert rows[0].ratio == 1.0
    for row in rows:
        assert row.error < 1e-4  # all compute the same boxes
        assert row.images_per_second == pytest.approx(2e3 / row.median_ms)
        assert row.ratio == pytest.approx(rows[0].median_ms / row.median_ms)
        assert {"pre", "backbone", "projections", "encoder", "decoder", "heads", "rest", "post"} == set(row.parts_ms)
        assert min(row.parts_ms.values()) >= 0
    assert len({row.gflop for row in rows}) == 1


def test_exported_files_beside_eager(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "FORMS", (exported.Form("onnx", "gather"),))
        exported.run(tiny(), (1, 2), (64, 96), 1, json_path=path)
    figures = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "command"} <= set(figures)
    rows = figures["rows"]
    assert [row["runtime"] for row in rows] == ["eager", "optimized", "onnx"] * 2
    for eager, row in zip(rows[0:1] * 3 + rows[3:4] * 3, rows, strict=True):
        assert row["ratio"] == pytest.approx(eager["median_ms"] / row["median_ms"])
        assert (row["mib"] is not None) == (row["runtime"] == "onnx")


def test_another_result_is_seen(monkeypatch):
    """`error` of an optimized model that is not the same: one layer's norm is shifted a little."""
    original = DeformableDETR.optimize

    def wrong(self, *options):
        other = copy.deepcopy(self)
        other.encoder.layers[0].norm2.bias += 0.05
        return original(other, *options)

    monkeypatch.setattr(DeformableDETR, "optimize", wrong)
    rows = bench.measure("refine", [(64, 96)], [1], ["fp32"], ("model", "optimized"), 1, "default", changes=TINY)
    assert rows[0].error == 0
    assert rows[1].error > 1e-3


class _Slow(nn.Module):
    def __init__(self, seconds, inner=None):
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x):
        time.sleep(self.seconds)
        return x if self.inner is None else self.inner(x)


class _Whole(nn.Module):
    """A backbone of 20 ms, a decoder of 10 ms with a head of 30 ms in it, and 5 ms of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = _Slow(0.02)
        self.decoder = _Slow(0.01)
        self.decoder.heads = _Slow(0.03)
        self.decoder.inner = self.decoder.heads

    def forward(self, x):
        time.sleep(0.005)
        return self.decoder(self.backbone(x))


def test_time_by_part():
    whole = _Whole()
    timed = TimedParts(lambda: whole(1), whole)
    for seconds in (0.2, 0.02, 0.02, 0.3):  # a slow first round, which does not count, and a slow last one
        whole.backbone.seconds = seconds
        assert timed() == 1
    found = timed.medians(3)
    assert list(found) == ["backbone", "decoder", "heads", "rest"]
    for part, least in {"backbone": 20, "decoder": 10, "heads": 30, "rest": 5}.items():
        assert least <= found[part] < 3 * least + 20
    assert not whole.backbone._forward_hooks


def test_rounds_leave_the_first_one_out():
    calls = []
    times = rounds.in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.01 if len(calls) > 1 else 0.5)}, 3
    )
    assert calls == ["a"] * 4
    assert 10 <= times["b"].best_ms <= times["b"].median_ms <= times["b"].p95_ms
    assert times["b"].best_ms < 400


def test_picture_is_a_picture():
    root = ET.fromstring(rounds.bars("t", {"one": {"pre": 1.0, "backbone": 3.0}, "two": {"pre": 2.0}}))
    assert root.tag.endswith("svg")
    widths = [float(r.get("width")) for r in root.iter() if r.tag.endswith("rect") and r.get("height") == "30"]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)


def test_description_names_no_host(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "benchmark", "model", "--json", "/secret/place/model.json"])
    report = json.dumps(rounds.described(None))
    assert '"deformable-detr benchmark model --json model.json"' in report
    import socket

    assert socket.gethostname() not in report
    assert "/home" not in report
    assert '"torch"' in report


def test_prediction(tmp_path):
    for number in range(20):
        Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(tmp_path / f"{number:02}.png")
    found = predict.measure(RedBoxFinder(), sorted(tmp_path.iterdir()), batch_size=2)
    assert found.images == 20
    assert found.of_model == pytest.approx(found.images_per_second / found.model_images_per_second)
    assert len(found.resident_mib) in (0, 10)
    assert found.peak_mib == sorted(found.peak_mib)


def test_training_step():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    rows = train.measure("refine", (64, 96), 1, ["fp32"], 1, "default", changes=TINY)
    assert [row.way for row in rows] == ["transformers", "ours"]
    assert rows[1].ratio == pytest.approx(rows[0].median_ms / rows[1].median_ms)


def test_scaling(tmp_path):
    few = {"batches": (1, 2), "queries": (20, 40), "short_sides": (48, 96), "changes": TINY}
    points = scaling.measure("refine", "fp32", 2, **few)
    assert [(p.varied, p.batch, p.queries, p.height) for p in points] == [
        ("images", 1, 20, 48), ("images", 2, 20, 48), ("queries", 1, 20, 48), ("queries", 1, 40, 48),
        ("pixels", 1, 20, 48), ("pixels", 1, 20, 96),
    ]  # fmt: skip
    maps = 6 * 8 + 3 * 4 + 2 * 2 + 1  # strides 8, 16, 32 and 64
    assert [p.tokens for p in points[:4]] == [maps + 20, 2 * (maps + 20), maps + 20, maps + 40]
    for p in points:
        assert p.us_per_token == pytest.approx(p.median_ms * 1e3 / p.tokens)
    assert points[0].median_ms == points[2].median_ms == points[4].median_ms  # timed once
    scaling.draw(points, "t", tmp_path / "p.svg")
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")


def test_a_network_that_transformers_lacks_has_no_twin():
    model = DeformableDETR(presets.PRESETS["small"](backbone="test_resnet", backbone_weights="none", hidden_dim=32))
    assert bench.transformers_twin(model) is None
