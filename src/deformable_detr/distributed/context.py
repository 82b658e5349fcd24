"""The processes of a run: start-up, agreement on errors and values, and a common end."""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..utils.device import pick_device
from ..utils.errors import UserError, first_line
from . import launch

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)  # until a process that does not respond counts as lost
_FAILURE_KEY = "deformable-detr/failure"  # in torchrun's store: which process failed first


class DistributedContext:
    """This process among all processes of the run. Without torchrun the world size is 1.

    Entering it connects the processes; an error in one process ends all of them. Numbers and objects travel over the
    CPU (gloo), gradients over the backend of the device (NCCL on CUDA).

    Attributes:
        rank: Index of this process, 0 to world_size − 1.
        device: Device of this process.
        exit_synced: Set when all processes leave for the same reason at the same place.
    """

    def __init__(self, device: str = "auto", world_size: int | None = None) -> None:
        """Read torchrun's environment, unless `world_size` is 1. "auto" and "cuda" give each process its own GPU."""
        self.world_size = launch.world_size() if world_size is None else world_size
        self.rank = int(os.environ["RANK"]) if self.world_size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0
        self.device = self._pick_device(device)
        self.exit_synced = False
        self._store: Any = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files and messages for the run."""
        return self.rank == 0

    def _pick_device(self, name: str) -> torch.device:
        device = pick_device(name)
        if self.world_size == 1:
            return device
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"torchrun needs device cpu or cuda, not {device.type}: pass --device cpu")
        if device.type == "cuda":
            if device.index is not None:
                raise UserError(f"--device {name} names one GPU: with torchrun pass --device cuda")
            if int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1)) > torch.cuda.device_count():
                raise UserError(
                    f"torchrun started more processes on {socket.gethostname()} than it has GPUs "
                    f"({torch.cuda.device_count()}): lower --nproc-per-node"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def __enter__(self) -> Self:
        if self.world_size > 1:
            try:
                store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
                self._store = _store_of_attempt(store, rank, size)
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=_TIMEOUT)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"the processes of the run cannot connect: {first_line(error)}") from None
            if not self.is_rank_zero:  # rank 0 logs for all
                logging.getLogger("deformable_detr").setLevel(logging.ERROR)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world_size == 1:
            return
        if error is None or self.exit_synced:
            dist.destroy_process_group()
            if isinstance(error, UserError) and not self.is_rank_zero:  # rank 0 reports it
                raise SystemExit(2) from None
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Tell the other processes that this one fails, or exit silently because another one failed first."""
        code = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
        own = {"rank": self.rank, "code": code}
        if isinstance(error, UserError):
            error.one_process = True
        try:  # `compare_set` returns the value that an earlier process set
            first = json.loads(self._store.compare_set(_FAILURE_KEY, "", json.dumps(own)))
        except RuntimeError:  # the store ended with the process that held it
            first = own
        if _is_lost_peer(error):
            if first != own:
                raise SystemExit(first["code"]) from None
            lost = UserError(
                "another process of the run ended unexpectedly: see above for its error, if it printed one; "
                "resume from the last checkpoint with --resume"
            )
            lost.one_process = True
            raise lost from None

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, by rank. Each process passes equally many."""
        if self.world_size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own)
        return [values.tolist() for values in gathered]

    def all_gather_object(self, item: T) -> list[T]:
        """Return the items of every process, by rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Replace the values by their mean over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def raise_first(self, error: UserError | None) -> None:
        """Raise the error of the lowest rank that has one. All processes must call it, and one has an error."""
        messages = self.all_gather_object(None if error is None else str(error))
        rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        self.exit_synced = True
        raise UserError(message if rank == 0 else f"rank {rank} of {self.world_size}: {message}") from None

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Raise a `UserError` from inside in every process. The code inside must not communicate."""
        error = None
        try:
            yield
        except UserError as failure:
            if self.exit_synced or self.world_size == 1:
                raise
            error = failure
        if any(failed for (failed,) in self.all_gather([error is not None])):
            self.raise_first(error)

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only; return its result, or raise its `UserError`, in every process."""
        results: list[Any] = [None]
        with self.sync_errors():
            if self.is_rank_zero:
                results = [action()]
        if self.world_size > 1:
            dist.broadcast_object_list(results, device=torch.device("cpu"))
        return results[0]

    def local_rank_zero_first(self, action: Callable[[], T]) -> T:
        """Run `action` in every process, first on one of each machine, so that the others find its downloads."""
        result: Any = None
        for turn in (True, False):
            with self.sync_errors():
                if (self.local_rank == 0) is turn:
                    result = action()
        return result


def _store_of_attempt(store: Store, rank: int, world_size: int) -> Store:
    """Return the part of torchrun's store that belongs to this attempt.

    torchrun keeps its store when it restarts processes (seen in PyTorch 2.15), and the addresses of the killed ones
    would be used again. Rank 0 numbers the attempts and tells the number to every process that asks by a new name.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"attempt/name/{rank}", name)
        store.wait([f"attempt/number/{name}"], _TIMEOUT)
        attempt = store.get(f"attempt/number/{name}").decode()
        store.set(f"attempt/joined/{attempt}/{rank}", "1")
        return PrefixStore(attempt, store)
    attempt = str(store.add("attempt/count", 1))
    missing, deadline = set(range(1, world_size)), time.monotonic() + _TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"attempt/name/{other}"]):  # perhaps of an earlier attempt, then replaced soon
                store.set(f"attempt/number/{store.get(f'attempt/name/{other}').decode()}", attempt)
        missing = {other for other in missing if not store.check([f"attempt/joined/{attempt}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"no sign of rank {min(missing)} in {_TIMEOUT}")
        time.sleep(0.02)
    return PrefixStore(attempt, store)


def _is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective operation failed because another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
