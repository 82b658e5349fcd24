"""The compiled CPU library through ctypes: no Python extension, so one wheel fits every Python and torch version."""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..reference import OpInputs
from . import openmp
from .build import LIBRARY, SOURCES

ABI = 5
MAX_SAMPLES = 64  # L · P
MAX_CHANNELS = 256  # D
DTYPES = (torch.float32, torch.bfloat16)

_log = logging.getLogger("deformable_detr.ops")
_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Call(ctypes.Structure):
    """msda_call in call.h."""

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
    library = ctypes.CDLL(os.fspath(SOURCES / LIBRARY))
    if library.msda_abi() != ABI or library.msda_call_size() != ctypes.sizeof(_Call):
        raise OSError(f"{LIBRARY} was built for another version of this package; reinstall it")
    library.msda_instruction_set.restype = ctypes.c_char_p
    library.msda_scratch.restype, library.msda_scratch.argtypes = _pointer, [_long]
    library.msda_release.restype, library.msda_release.argtypes = None, [_pointer]
    library.msda_use_openmp.restype, library.msda_use_openmp.argtypes = None, [_pointer, _pointer]
    for function in (library.msda_forward, library.msda_backward):
        function.argtypes = [ctypes.POINTER(_Call)]
    for function in (library.msda_plain_allowed, library.msda_scratch_bytes):
        function.argtypes = [ctypes.POINTER(_Call), ctypes.c_int]
    library.msda_scratch_bytes.restype = _long
    return library


@functools.cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, its instruction set and threads, or None and why it is not available."""
    if not (SOURCES / LIBRARY).exists():
        return None, "this installation has no compiled library (built without a compiler, or for another platform)"
    try:
        library = _open()
    except OSError as error:
        return None, str(error)
    detail = f"compiled library, {library.msda_instruction_set().decode()}"
    addresses = openmp.entry_points()
    if addresses is None:
        _log.warning("deformable attention runs on one thread: PyTorch has loaded no OpenMP runtime that it can share")
        return library, f"{detail}, one thread"
    library.msda_use_openmp(*addresses)
    return library, f"{detail}, PyTorch's threads"


KEEP = 2  # blocks of scratch memory kept between calls: faulting in huge pages takes longer than the work in them
_kept: list[tuple[int, int]] = []  # (bytes, address)
_lock = threading.Lock()
_forked = False


@contextmanager
def _borrow_scratch(library: ctypes.CDLL, size: int) -> Iterator[int | None]:
    """Yield the address of at least `size` bytes, or None for 0 bytes."""
    if not size:
        yield None
        return
    with _lock:
        _kept.sort()
        available, address = _kept.pop() if _kept else (0, None)
    if available < size:
        library.msda_release(address)
        available, address = size, library.msda_scratch(size)
    if not address:
        raise MemoryError(f"deformable attention: cannot allocate {size} bytes of scratch memory")
    try:
        yield address
    finally:
        with _lock:
            keep = len(_kept) < KEEP
            if keep:
                _kept.append((available, address))
        if not keep:
            library.msda_release(address)


def release_scratch() -> None:
    """Return the memory that is kept between calls to the system."""
    library, _ = status()
    while library is not None and _kept:
        library.msda_release(_kept.pop()[1])


def _after_fork() -> None:
    # OpenMP's threads do not survive a fork, and waiting for them would hang; the lock may have been held.
    global _forked, _lock
    _forked, _lock = True, threading.Lock()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _raise_if_error(code: int) -> None:
    if code:
        raise ValueError(f"deformable attention: the CPU library does not support these sizes (error {code})")


def _describe(inputs: OpInputs) -> tuple[ctypes.CDLL, _Call, tuple[object, ...]]:
    """The library, the call without results and scratch, and the objects that must live until it returns."""
    library, reason = status()
    if library is None:
        raise RuntimeError(reason)
    value, shapes, reference_points, offsets, logits = inputs
    for tensor in (value, offsets, logits):
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise TypeError(f"deformable attention: the CPU library does not support {tensor.dtype} on {tensor.device}")
    value, offsets, logits = value.contiguous(), offsets.contiguous(), logits.contiguous()
    B, S, M, D = value.shape
    _, Q, _, L, P, _ = offsets.shape
    table = (_long * len(shapes))(*shapes)
    call = _Call(
        value=value.data_ptr(), shapes=ctypes.addressof(table), offsets=offsets.data_ptr(), logits=logits.data_ptr(),
        B=B, S=S, Q=Q, M=M, D=D, L=L, P=P,
        value_bf16=value.dtype == torch.bfloat16, offsets_bf16=offsets.dtype == torch.bfloat16,
        logits_bf16=logits.dtype == torch.bfloat16, threads=1 if _forked else torch.get_num_threads(),
    )  # fmt: skip
    if reference_points is not None:
        reference_points = reference_points.to(torch.float32).contiguous()
        call.reference, call.reference_size = reference_points.data_ptr(), reference_points.shape[-1]
    return library, call, (value, offsets, logits, reference_points, table)


def _scratch_bytes(library: ctypes.CDLL, call: _Call, backward: bool) -> int:
    """Scratch memory of the call; 0 where it reads values in place."""
    size = library.msda_scratch_bytes(call, backward)
    _raise_if_error(-size if size < 0 else 0)
    # Packing all values costs 3 × the time of sampling them for the few queries of a decoder.
    return 0 if call.Q * 4 < call.S and library.msda_plain_allowed(call, backward) else size


def forward(inputs: OpInputs) -> Tensor:
    """Return the weighted sums (B, Q, M·D) of fp32 or bf16 inputs in `value`'s dtype."""
    library, call, alive = _describe(inputs)
    output = inputs.value.new_empty((call.B, call.Q, call.M * call.D))
    call.output = output.data_ptr()
    with _borrow_scratch(library, _scratch_bytes(library, call, backward=False)) as call.scratch:
        _raise_if_error(library.msda_forward(call))
    del alive
    return output


def backward(
    grad_output: Tensor, inputs: OpInputs, reference_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return gradients of value, reference_points (None unless asked for), offsets and logits, each like its tensor."""
    value, _, reference_points, offsets, logits = inputs
    library, call, alive = _describe(inputs)
    grad_output = grad_output.to(value.dtype).contiguous()
    if grad_output.shape != (call.B, call.Q, call.M * call.D):
        raise ValueError(f"deformable attention: output gradient of shape {tuple(grad_output.shape)}")
    grad_value, grad_offsets, grad_logits = (t.new_empty(t.shape) for t in (value, offsets, logits))
    call.grad_output, call.grad_value = grad_output.data_ptr(), grad_value.data_ptr()
    call.grad_offsets, call.grad_logits = grad_offsets.data_ptr(), grad_logits.data_ptr()
    per_head = None
    if reference_points is not None and reference_gradient:
        per_head = torch.empty(call.B, call.M, call.Q, call.L, call.reference_size)
        call.grad_reference = per_head.data_ptr()
    split = call.threads > call.M  # more threads than heads: split each head's work by level
    with (
        _borrow_scratch(library, _scratch_bytes(library, call, backward=True)) as call.scratch,
        _borrow_scratch(library, call.Q * call.M * call.L * call.P * 4 if split else 0) as call.weight_scratch,
    ):
        _raise_if_error(library.msda_backward(call))
    del alive
    grad_points = None if per_head is None or reference_points is None else per_head.sum(1).to(reference_points.dtype)
    return grad_value, grad_points, grad_offsets, grad_logits
