"""The ops under opcheck, compile and export; backend selection; threads and forks."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from deformable_detr import ops
from deformable_detr.ops import operators
from deformable_detr.ops.native import library
from tests.support.op_cases import assert_near, case, fused, require, results

SHAPES = ((6, 7), (3, 4))
FLAT = [6, 7, 3, 4]


def inputs(dtype=torch.float32, gradient=True):
    tensors = [t.float() for t in case(SHAPES, B=2, Q=9, M=2, D=16)]
    return [t.to(dtype if i == 0 else torch.float32).requires_grad_(gradient) for i, t in enumerate(tensors)]


@pytest.mark.parametrize("backend", ["cpu", "embedding_bag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    require(backend)
    value, reference, offsets, logits = inputs(dtype)
    grad = torch.ones(2, 9, 32, dtype=dtype)
    plain = [t.detach() for t in (value, reference, offsets, logits)]
    with ops.use_backend(backend):
        torch.library.opcheck(operators.attention, (value, FLAT, reference, offsets, logits))
        torch.library.opcheck(operators.attention, (value, FLAT, None, offsets, logits))
        for needs_reference_grad in (True, False):
            arguments = (grad, plain[0], FLAT, *plain[1:], needs_reference_grad)
            torch.library.opcheck(operators.attention_backward, arguments)
        torch.library.opcheck(operators.attention_backward, (grad, plain[0], FLAT, None, *plain[2:], False))


def test_compile_full_graph_with_gradients():
    compiled = torch.compile(fused(SHAPES), fullgraph=True, backend="aot_eager")
    assert_near(results(compiled, inputs()), results(fused(SHAPES), [t.double() for t in inputs()]), 1e-5)


class Attention(torch.nn.Module):
    def forward(self, value, reference, offsets, logits):
        return ops.deformable_attention(value, SHAPES, reference, offsets, logits)


def test_export_with_dynamic_batch_and_queries():
    tensors = inputs(gradient=False)
    batch, queries = torch.export.Dim("batch", max=64), torch.export.Dim("queries", max=900)
    dynamic = ({0: batch}, *({0: batch, 1: queries} for _ in range(3)))
    program = torch.export.export(Attention(), tuple(tensors), dynamic_shapes=dynamic)
    assert "deformable_detr.attention" in program.graph_module.code
    other = [t.float() for t in case(SHAPES, B=3, Q=5, M=2, D=16, seed=1)]
    assert torch.equal(program.module()(*other), Attention()(*other))
    with ops.use_backend("reference"):
        program = torch.export.export(Attention(), tuple(tensors), dynamic_shapes=dynamic)
    assert "deformable_detr" not in program.graph_module.code


def test_export_with_dynamic_spatial_shapes():
    class Pixels(torch.nn.Module):
        def forward(self, pixels, reference, offsets, logits):
            height, width = pixels.shape[-2:]
            value = pixels.flatten(2).transpose(1, 2).unflatten(-1, (2, 8))
            return ops.deformable_attention(value, ((height, width),), reference, offsets, logits)

    rest = [torch.rand(1, 9, 1, 2), torch.randn(1, 9, 2, 1, 3, 2), torch.randn(1, 9, 2, 1, 3)]
    sides = {2: torch.export.Dim("height", max=99), 3: torch.export.Dim("width", max=99)}
    program = torch.export.export(Pixels(), (torch.randn(1, 16, 5, 6), *rest), dynamic_shapes=(sides, {}, {}, {}))
    other = torch.randn(1, 16, 8, 3)
    assert torch.equal(program.module()(other, *rest), Pixels()(other, *rest))


def test_float64_double_backward():
    tensors = [t.requires_grad_() for t in case(((3, 4),), B=1, Q=2, M=1, D=2, P=2)]
    gradient = torch.autograd.grad(fused(((3, 4),))(*tensors).square().sum(), tensors[0], create_graph=True)[0]
    assert torch.autograd.grad(gradient.sum(), tensors[3])[0].abs().max() > 0


def test_backends_list_has_a_detail_each():
    listed = {backend.name: backend for backend in ops.backends()}
    assert set(listed) >= {"cpu", "triton", "embedding_bag", "reference"}
    assert all(backend.detail for backend in listed.values())
    assert listed["embedding_bag"].available
    assert listed["reference"].available


def test_missing_backend_fails_only_on_explicit_request(monkeypatch):
    monkeypatch.setattr(library, "status", lambda: (None, "not built"))
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="not built"):
        fused(SHAPES)(*inputs(gradient=False))
    actual = results(fused(SHAPES), inputs())
    assert_near(actual, results(fused(SHAPES), [t.double() for t in inputs()]), 1e-5)
    assert not next(b for b in ops.backends() if b.name == "cpu").available


def test_backend_is_logged_once(monkeypatch, caplog):
    for status, level, words in (
        ((object(), "compiled library, avx9"), logging.INFO, "runs on cpu (compiled library, avx9"),
        ((None, "not built"), logging.WARNING, "runs on embedding_bag (plain PyTorch, slower"),
    ):
        operators._log_once.cache_clear()
        monkeypatch.setattr(library, "status", lambda status=status: status)
        caplog.clear()
        with caplog.at_level(logging.INFO, "deformable_detr.ops"):
            operators._fast_backend("cpu")
            operators._fast_backend("cpu")
        assert [(r.levelno, words in r.getMessage()) for r in caplog.records] == [(level, True)]


def test_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match="embedding_bag"), ops.use_backend("cuda"):
        pass
    code = "import deformable_detr.ops as o; o.deformable_attention"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"DEFORMABLE_DETR_BACKEND": "nothing"}, capture_output=True, text=True
    )
    assert done.returncode
    assert "unknown backend 'nothing'" in done.stderr


def dense_inputs(levels=2):
    shapes = ((12, 9), (5, 6))[:levels]
    return shapes, [t.float() for t in case(shapes, B=2, Q=138, M=2, D=32)]


@pytest.mark.parametrize("threads", [2, 5])  # 5 exceeds the heads, so that levels are split too
@pytest.mark.parametrize("levels", [1, 2])
def test_thread_count_does_not_change_results(threads, levels):
    require("cpu")
    shapes, tensors = dense_inputs(levels)
    tensors[3] = tensors[3].bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single_threaded = results(fused(shapes), tensors)
        torch.set_num_threads(threads)
        multi_threaded = results(fused(shapes), tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(single_threaded, multi_threaded, strict=True))


def test_concurrent_callers_get_correct_results():
    require("cpu")
    shapes, tensors = dense_inputs()
    expected = results(fused(shapes), tensors)
    actual: list[list[torch.Tensor]] = []

    def work() -> None:
        for _ in range(5):
            actual.append(results(fused(shapes), tensors))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(actual) == 20
    assert all(torch.equal(a, b) for result in actual for a, b in zip(result, expected, strict=True))
    assert len(library._kept) <= library.KEEP


def _in_child(shapes, tensors, queue) -> None:
    queue.put((library._forked, fused(shapes)(*tensors).sum().item()))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this platform")
def test_forked_child_runs_on_one_thread():
    require("cpu")
    shapes, tensors = dense_inputs()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = fused(shapes)(*tensors).sum().item()  # starts OpenMP's threads in this process
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(shapes, tensors, queue))
        child.start()
        child.join(60)
        hung = child.is_alive()
        if hung:
            child.kill()
    finally:
        torch.set_num_threads(before)
    assert not hung
    assert child.exitcode == 0
    assert queue.get() == (True, expected)
    assert not library._forked
