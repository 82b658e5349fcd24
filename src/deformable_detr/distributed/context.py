"""The processes of a run and how they agree: who torchrun started, who failed, what all must know."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ..utils.device import pick_device
from ..utils.errors import UserError
from . import launch

T = TypeVar("T")

log = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=30)  # until a process that does not answer counts as lost
_FAILURE = "deformable-detr/failure"  # in the launcher's store: why the first process left


class DistributedContext:
    """This process among those of the run: `rank` of `size`, with its `device`. A run without torchrun is a world of 1.

    Use it as a context: it connects the processes, and ends all of them where one fails. Numbers and messages travel
    over the CPU (gloo), gradients over what the device has (nccl on CUDA).
    """

    def __init__(self, device: str = "auto", size: int | None = None) -> None:
        """device: see `pick_device`; "auto" and "cuda" give each process of a machine its own GPU.

        size: 1 keeps to this process, whatever the launcher says.
        """
        self.size = launch.processes() if size is None else size
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.size > 1 else 0
        self.device = self._device(device)
        self.agreed = False  # whether all processes leave for the same reason, at the same place
        self._store: Any = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def _device(self, name: str) -> torch.device:
        device = pick_device(name)
        if self.size == 1:
            return device
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"several processes need device cpu or cuda, not {device.type}")
        if device.type == "cuda":
            if device.index is not None:
                raise UserError(f"device '{name}' is one GPU: with torchrun say cuda, each process takes its own")
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started more processes on {socket.gethostname()} than it has GPUs "
                    f"({torch.cuda.device_count()}): lower --nproc-per-node"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    # --- coming and going ---------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self.size > 1:
            try:
                self._store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=_PATIENCE)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"the processes of the run cannot reach each other: {reason}") from None
            if not self.is_rank_zero:  # what all would say, the first one says
                logging.getLogger("deformable_detr").setLevel(logging.ERROR)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.size == 1:
            return
        if error is None or self.agreed:
            dist.destroy_process_group()
            if isinstance(error, UserError) and not self.is_rank_zero:  # the first one tells it
                raise SystemExit(2) from None
        else:
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Tells the others why this process goes; one that goes because another did says nothing of its own."""
        code = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, UserError) else 1
        reason = {"rank": self.rank, "code": code}
        known = self._failure() if _is_lost_peer(error) else None
        if known is not None:
            raise SystemExit(known["code"]) from None
        try:
            # Only the first to go is heard.
            heard = json.loads(self._store.compare_set(_FAILURE, "", json.dumps(reason)))
        except RuntimeError:  # the store went with the process that held it
            heard = reason
        if _is_lost_peer(error):
            if heard != reason:
                raise SystemExit(heard["code"]) from None
            raise UserError(
                "a process of the run ended unexpectedly (look above for its words, or the system killed it); "
                "the last checkpoint is good: go on with --resume"
            ) from None

    def _failure(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None
        except RuntimeError:
            return None

    # --- agreeing -----------------------------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, by rank; each gives as many."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return [numbers.tolist() for numbers in everyone]

    def all_gather_object(self, item: T) -> list[T]:
        """The items of every process, by rank, for every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def collect(self, item: T) -> list[T] | None:
        """The items of every process, by rank, for the first process; None for the others."""
        if self.size == 1:
            return [item]
        items: list[Any] | None = [None] * self.size if self.is_rank_zero else None
        dist.gather_object(item, items)
        return items

    def broadcast_object(self, item: T) -> T:
        """The first process's item."""
        if self.size == 1:
            return item
        items = [item if self.is_rank_zero else None]
        dist.broadcast_object_list(items, device=torch.device("cpu"))
        return cast("T", items[0])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def raise_if_any(self, error: UserError | None) -> None:
        """Raises in every process if one of them has an error; all must call it."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        if any(failed for (failed,) in self.gather([error is not None])):
            self.raise_on_all_ranks(error)

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Raises the error of the first process that has one; all must call it, and one has one."""
        if self.size == 1:
            assert error is not None
            raise error
        messages = self.all_gather_object(None if error is None else str(error))
        rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        self.agreed = True
        raise UserError(message if rank == 0 else f"process {rank} of {self.size}: {message}") from None

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A `UserError` of one process inside becomes that of all. Nothing inside may need another process."""
        try:
            yield
        except UserError as error:
            if self.agreed or self.size == 1:
                raise
            self.raise_if_any(error)
        else:
            self.raise_if_any(None)

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """What `action` gives in the first process, which alone runs it; its `UserError` is that of all."""
        result: Any = None
        with self.sync_errors():
            if self.is_rank_zero:
                result = action()
        return self.broadcast_object(result)

    def local_rank_zero_first(self, action: Callable[[], T]) -> T:
        """`action` in every process, first in one of each machine: it may fetch files that the others then find."""
        result: Any = None
        for turn in (True, False):
            with self.sync_errors():
                if (self.local_rank == 0) is turn:
                    result = action()
        return result


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
