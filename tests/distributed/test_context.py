"""What needs no second process: what the launcher says, and a world of one."""

import pytest

from deformable_detr.distributed import launch
from deformable_detr.distributed.context import DistributedContext
from deformable_detr.utils.errors import UserError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_the_launcher_says_who_this_is(monkeypatch):
    assert (launch.processes(), launch.is_first(), launch.restarted()) == (1, True, False)
    for name, value in {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.processes(), launch.is_first(), launch.restarted()) == (4, False, True)
    world = DistributedContext("cpu")
    assert (world.rank, world.size, world.is_rank_zero, world.device.type) == (1, 4, False, "cpu")


def test_a_world_size_alone_is_no_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it everywhere
    assert launch.processes() == 1


def test_alone_nothing_needs_agreement():
    with DistributedContext("cpu") as world:
        assert world.gather([1, 2.5]) == [[1, 2.5]]
        assert world.all_gather_object("x") == ["x"]
        assert world.collect("x") == ["x"]
        assert world.broadcast_object("x") == "x"
        assert world.on_rank_zero(lambda: 3) == 3
        assert world.local_rank_zero_first(lambda: 4) == 4
    with pytest.raises(UserError, match="bad"), DistributedContext("cpu") as world, world.sync_errors():
        raise UserError("bad")


def test_devices_that_several_processes_cannot_share(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cpu or cuda"):
        DistributedContext("meta")
