"""The distributed context without a second process: launcher variables and a world size of one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from deformable_detr.distributed import launch
from deformable_detr.distributed.context import DistributedContext, _store_of_attempt
from deformable_detr.utils.errors import UserError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_rank_and_world_size_come_from_the_launcher(monkeypatch):
    assert (launch.world_size(), launch.is_rank_zero(), launch.restarted()) == (1, True, False)
    for name, value in {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.world_size(), launch.is_rank_zero(), launch.restarted()) == (4, False, True)
    context = DistributedContext("cpu")
    assert (context.rank, context.world_size, context.is_rank_zero, context.device.type) == (1, 4, False, "cpu")


def test_world_size_variable_alone_is_ignored(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it everywhere
    assert launch.world_size() == 1


def test_collectives_of_a_single_process():
    with DistributedContext("cpu") as context:
        assert context.all_gather([1, 2.5]) == [[1, 2.5]]
        assert context.all_gather_object("x") == ["x"]
        assert context.on_rank_zero(lambda: 3) == 3
        assert context.local_rank_zero_first(lambda: 4) == 4
    with pytest.raises(UserError, match="bad"), DistributedContext("cpu") as context, context.sync_errors():
        raise UserError("bad")


def test_unsupported_distributed_device_is_rejected(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cpu or cuda"):
        DistributedContext("meta")


def test_restarted_processes_do_not_see_the_keys_of_earlier_attempts():
    store = dist.HashStore()
    seen = []
    for attempt in range(3):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(lambda rank: _store_of_attempt(store, rank, 3), range(3)))
        seen.append([each.check(["address"]) for each in stores])
        stores[0].set("address", str(attempt))
        assert [each.get("address").decode() for each in stores] == [str(attempt)] * 3
    assert seen == [[False] * 3] * 3
