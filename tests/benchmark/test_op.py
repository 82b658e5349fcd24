"""`benchmark op` on small maps: every row is there, and the figures are of what they say."""

from __future__ import annotations

import json

import pytest
import torch

from deformable_detr import ops
from deformable_detr.benchmark import machine, op, rounds
from deformable_detr.utils.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(op, "LEVELS", ((12, 16), (6, 8)))


def test_rows_of_all_backends_with_ratios_and_errors(small):
    rows = op.measure("cpu", [1, 2], repeats=2, allocator="default")
    available = {b.name for b in ops.backends() if b.available} & {"cpu", "embedding_bag"}
    assert {(r.case, r.batch) for r in rows} == {(c, b) for c in ("encoder", "decoder") for b in (1, 2)}
    for case in ("encoder", "decoder"):
        found = {r.backend: r for r in rows if r.case == case and r.batch == 1 and r.dtype == "float32"}
        assert set(found) == {op.BASELINE, *available}
        assert found[op.BASELINE].forward_ratio == 1
        assert found["embedding_bag"].both_ms is None
        for row in found.values():
            assert row.error is not None
            assert row.error <= 1e-5
            assert row.forward_ratio == pytest.approx(found[op.BASELINE].forward_ms / row.forward_ms)
    json.dumps([vars(row) for row in rows])


def test_errors_are_noticed(small):
    wrong = op.with_backend("reference")
    assert op.error(lambda *given: wrong(*given) * 1.01, "encoder", torch.float32, "cpu") > 5e-3


def test_memory_counts_what_a_call_takes_beyond_its_result():
    size = 64 << 20

    def call():
        return (torch.ones(size // 4) + 1)[:1].clone()

    found = machine.memory_peak(call, "cpu")
    if found is None:
        pytest.skip("unknown on this platform")
    assert 64 <= found <= 200
    assert machine.memory_peak(lambda: torch.ones(size // 4), "cpu") < 20


def test_report_is_printed_and_written(small, monkeypatch, tmp_path, capsys):
    rows = [vars(row) for row in op.measure("cpu", [1], repeats=1, allocator="tuned")]

    class Done:
        stdout, returncode = json.dumps(rows), 0

    seen = []
    monkeypatch.setattr(rounds, "_commit", lambda: "abc1234")
    monkeypatch.setattr(rounds.sys, "argv", ["/bin/deformable-detr", "benchmark", "op", "--json", "/somewhere/op.json"])
    monkeypatch.setattr(rounds.subprocess, "run", lambda command, env, **_: seen.append(env) or Done())
    report = op.run(batches=(1,), threads=1, repeats=1, device="cpu", json_path=tmp_path / "op.json")
    assert [environment.get("MALLOC_TRIM_THRESHOLD_") is not None for environment in seen] == [False, True]
    assert json.loads((tmp_path / "op.json").read_text())["rows"] == rows * 2 == report["rows"]
    assert report["commit"] == "abc1234"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["command"] == "deformable-detr benchmark op --json op.json"
    printed = capsys.readouterr().out
    assert "transformers" in printed
    assert "encoder" in printed


def test_a_measuring_process_that_fails_is_one_line(monkeypatch):
    class Died:
        stdout, returncode = "", 7

    monkeypatch.setattr(rounds.subprocess, "run", lambda *_, **__: Died())
    with pytest.raises(UserError, match="the process that measures ended with code 7"):
        rounds.by_allocator("m", {}, 1, ["default"])
