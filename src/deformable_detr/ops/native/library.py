"""The CPU library from Python, through ctypes: no compiled extension, so one wheel serves every Python and torch.

`status()` says whether it is there; `forward` and `backward` run it. B images, S tokens, Q queries, M heads, D channels
a head, L levels, P points.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .build import LIBRARY, SOURCES

ABI = 4
MAX_SAMPLES = 64  # levels × points
MAX_CHANNELS = 256  # a head
DTYPES = (torch.float32, torch.bfloat16)
_RULES = {
    1: "an empty or negative dimension, or too many channels",
    2: "more levels × points than the library takes",
    3: "sizes beyond 32 bits",
    4: "reference points with neither 2 nor 4 coordinates",
    5: "spatial shapes that do not add up to the tokens of value",
    6: "no scratch memory for a call that needs it",
}

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Call(ctypes.Structure):
    """call.h's msda_call."""

    _fields_ = (
        *((name, _pointer) for name in (
            "value", "shapes", "reference", "offsets", "logits", "grad_output", "output", "grad_value",
            "grad_offsets", "grad_logits", "grad_reference", "scratch", "weight_scratch",
        )),
        *((name, _long) for name in ("B", "S", "Q")),
        *((name, _int) for name in (
            "M", "D", "L", "P", "reference_size", "value_bf16", "offsets_bf16", "logits_bf16", "threads",
        )),
    )  # fmt: skip


def _open() -> ctypes.CDLL:
    library = ctypes.CDLL(os.fspath(SOURCES / LIBRARY))  # torch is loaded: its OpenMP serves
    if library.msda_abi() != ABI or library.msda_call_size() != ctypes.sizeof(_Call):
        raise OSError(f"{LIBRARY} belongs to another version of this package: build it again")
    library.msda_instruction_set.restype = ctypes.c_char_p
    library.msda_scratch.restype, library.msda_scratch.argtypes = _pointer, [_long]
    library.msda_release.restype, library.msda_release.argtypes = None, [_pointer]
    for function in (library.msda_forward, library.msda_backward):
        function.argtypes = [ctypes.POINTER(_Call)]
    for function in (library.msda_plain_allowed, library.msda_scratch_bytes):
        function.argtypes = [ctypes.POINTER(_Call), ctypes.c_int]
    library.msda_scratch_bytes.restype = _long
    return library


@functools.cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """The library and the instruction set it runs, or None and why it is missing."""
    if not (SOURCES / LIBRARY).exists():
        return None, "this installation has no compiled library (no compiler when it was built, or another platform)"
    try:
        library = _open()
    except OSError as error:
        return None, str(error)
    return library, library.msda_instruction_set().decode()


class _Pool:
    """Scratch memory kept for the next call: a fresh huge page costs more than what is done in it."""

    KEEP = 2

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = []  # (bytes, address)

    @contextmanager
    def borrow(self, library: ctypes.CDLL, size: int) -> Iterator[int | None]:
        """The address of at least `size` bytes; None for 0."""
        if not size:
            yield None
            return
        with self._lock:
            self._free.sort()
            fitting = next((block for block in self._free if block[0] >= size), None)
            block = fitting or (self._free[0] if self._free else (0, 0))
            if block[1]:
                self._free.remove(block)
        if block[0] < size:
            if block[1]:
                library.msda_release(block[1])
            block = (size, library.msda_scratch(size))
            if not block[1]:
                raise MemoryError(f"no {size} bytes of scratch memory for deformable attention")
        try:
            yield block[1]
        finally:
            with self._lock:
                keep = len(self._free) < self.KEEP
                if keep:
                    self._free.append(block)
            if not keep:
                library.msda_release(block[1])


_pool = _Pool()
_forked = False


def release_scratch() -> None:
    """Gives the memory kept for the next call back to the system."""
    found, _ = status()
    if found is not None:
        blocks, _pool._free = _pool._free, []
        for _, address in blocks:
            found.msda_release(address)


def _after_fork() -> None:
    # OpenMP's threads do not survive a fork, and waiting for them would hang; a lock may have been held.
    global _forked
    _forked = True
    _pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _check(library_result: int) -> None:
    if library_result:
        raise ValueError(f"deformable attention: {_RULES.get(library_result, library_result)}")


def _describe(
    value: Tensor, shapes: list[int], reference: Tensor | None, offsets: Tensor, logits: Tensor
) -> tuple[_Call, tuple[object, ...]]:
    """The call without results and scratch, and what must stay alive while it runs."""
    B, S, M, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    for tensor in (value, offsets, logits):
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise TypeError(f"deformable attention: {tensor.dtype} on {tensor.device} is not for the CPU library")
    value, offsets, logits = value.contiguous(), offsets.contiguous(), logits.contiguous()
    table = (_long * len(shapes))(*shapes)
    call = _Call(
        value=value.data_ptr(), shapes=ctypes.addressof(table), offsets=offsets.data_ptr(), logits=logits.data_ptr(),
        B=B, S=S, Q=Q, M=M, D=D, L=L, P=P,
        value_bf16=value.dtype == torch.bfloat16, offsets_bf16=offsets.dtype == torch.bfloat16,
        logits_bf16=logits.dtype == torch.bfloat16, threads=1 if _forked else torch.get_num_threads(),
    )  # fmt: skip
    if reference is not None:
        reference = reference.to(torch.float32).contiguous()
        call.reference, call.reference_size = reference.data_ptr(), reference.shape[-1]
    return call, (value, offsets, logits, reference, table)


def _scratch_bytes(library: ctypes.CDLL, call: _Call, backward: bool) -> int:
    """Scratch memory that the call is to have: 0 where values are read as they lie."""
    size = library.msda_scratch_bytes(call, backward)
    _check(-size if size < 0 else 0)
    # Laying values out anew pays when most of them are read: for the decoder's few queries it would cost 3 × the time.
    return 0 if call.Q * 4 < call.S and library.msda_plain_allowed(call, backward) else size


def forward(value: Tensor, shapes: list[int], reference: Tensor | None, offsets: Tensor, logits: Tensor) -> Tensor:
    """(B, Q, M·D) of `value`'s dtype. Without `reference`, offsets are locations in 0..1 and logits are weights.

    value (B, S, M, D) and offsets (B, Q, M, L, P, 2), logits (B, Q, M, L, P): fp32 or bf16 each; reference
    (B, Q, L, 2 or 4). ValueError for shapes that do not fit together.
    """
    library, reason = status()
    if library is None:
        raise RuntimeError(reason)
    call, alive = _describe(value, shapes, reference, offsets, logits)
    output = value.new_empty((call.B, call.Q, call.M * call.D))
    call.output = output.data_ptr()
    with _pool.borrow(library, _scratch_bytes(library, call, backward=False)) as call.scratch:
        _check(library.msda_forward(call))
    del alive
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    reference: Tensor | None,
    offsets: Tensor,
    logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of value, reference (None unless asked for), offsets and logits: each like its tensor, contiguous."""
    library, reason = status()
    if library is None:
        raise RuntimeError(reason)
    call, alive = _describe(value, shapes, reference, offsets, logits)
    grad_output = grad_output.to(value.dtype).contiguous()
    if grad_output.shape != (call.B, call.Q, call.M * call.D):
        raise ValueError(f"deformable attention: output gradient of shape {tuple(grad_output.shape)}")
    grad_value, grad_offsets, grad_logits = (t.new_empty(t.shape) for t in (value, offsets, logits))
    call.grad_output, call.grad_value = grad_output.data_ptr(), grad_value.data_ptr()
    call.grad_offsets, call.grad_logits = grad_offsets.data_ptr(), grad_logits.data_ptr()
    by_head = None
    if reference is not None and reference_gradient:
        by_head = torch.empty(call.B, call.M, call.Q, call.L, call.reference_size)
        call.grad_reference = by_head.data_ptr()
    split = call.threads > call.M  # more threads than heads: levels are work of their own
    with (
        _pool.borrow(library, _scratch_bytes(library, call, backward=True)) as call.scratch,
        _pool.borrow(library, call.Q * call.M * call.L * call.P * 4 if split else 0) as call.weight_scratch,
    ):
        _check(library.msda_backward(call))
    del alive
    grad_reference = None if by_head is None or reference is None else by_head.sum(1).to(reference.dtype)
    return grad_value, grad_reference, grad_offsets, grad_logits
