"""What this machine can do at most, measured, and how much memory a call takes."""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops.native import library
from ..runtimes.fused import onednn
from ..utils.process import malloc_trim


@dataclass(frozen=True)
class Machine:
    """name: processor or card. cached_gb_s: reads from a thread's own cache (CPU) or the whole L2 (GPU).

    copy_gb_s: memory, read and written.
    """

    name: str
    device: str
    threads: int
    cached_gb_s: float
    copy_gb_s: float

    @classmethod
    def measured(cls, device: str) -> Machine:
        if device == "cuda":
            name, threads = torch.cuda.get_device_name(), 1
            cached = _best_rate(torch.empty(4 << 20, device=device), lambda t: t.sum(), 1)
            copied = _best_rate(torch.empty(256 << 20, device=device), lambda t: t.clone(), 2)
        else:
            name, threads = _processor(), torch.get_num_threads()
            # 256 KiB: in the second-level cache of every processor in use, and mostly not in the first.
            matrix, vector = torch.randn(128, 512), torch.randn(512)
            result = torch.empty(128)
            torch.set_num_threads(1)
            cached = _best_rate(matrix, lambda t: torch.mv(t, vector, out=result), 1)
            torch.set_num_threads(threads)
            target = torch.empty(16 << 20)
            copied = _best_rate(torch.ones(16 << 20), lambda t: target.copy_(t), 2)
        return cls(name, device, threads, cached, copied)

    def gather_ms(self, rows: int, channels: int) -> float:
        """The least time in which so many rows of fp32 channels can be read from the cache."""
        return rows * channels * 4 / (self.cached_gb_s * self.threads * 1e9) * 1e3


def _best_rate(tensor: torch.Tensor, call: Callable[[torch.Tensor], object], passes: int) -> float:
    """GB/s of the best of many runs: other people's work on the machine can only slow it down."""
    best = float("inf")
    repeats = max(1, (8 << 20) // tensor.nbytes)
    for _ in range(30):
        if tensor.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return tensor.nbytes * passes / best / 1e9


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_mib() -> float:
    """The process's memory now. Linux only, as the next."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def peak_resident_mib() -> float:
    """The most it has been so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_peak(call: Callable[[], object], device: str) -> float | None:
    """MiB that the call takes at its peak beyond what there is before and what it returns. None where unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - _size_mib(result)
    if sys.platform != "linux":
        return None
    library.release_scratch()
    malloc_trim()
    before, peak, done = resident_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, resident_mib())
    finally:
        done.set()
        watcher.join()
    return max(0.0, peak - before - _size_mib(result))


def _size_mib(result: object) -> float:
    tensors = result if isinstance(result, (tuple, list)) else [result]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) / 2**20


def gemm_gflops(dtype: torch.dtype, device: str = "cpu") -> float:
    """10⁹ operations a second of a linear layer as the encoder has it, by the fastest call, the best of many runs."""
    x, weight, bias = torch.randn(4096, 1024), torch.randn(256, 1024), torch.randn(256)
    x, weight, bias = (t.to(device=device, dtype=dtype) for t in (x, weight, bias))
    calls = [lambda: torch.nn.functional.linear(x, weight, bias)]
    if device == "cpu" and onednn.is_available(dtype):
        packed = onednn.PackedLinear(weight, bias, None, dtype, packed=True)
        calls.append(lambda: packed(x))
    best = float("inf")
    with torch.inference_mode():
        for call in calls * 12:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return 2 * 4096 * 1024 * 256 / best / 1e9
