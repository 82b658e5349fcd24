"""What needs no second process: what the launcher says, and a world of one."""

import pytest

from deformable_detr.distributed import launch
from deformable_detr.distributed.context import World
from deformable_detr.utils.errors import UserError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_the_launcher_says_who_this_is(monkeypatch):
    assert (launch.processes(), launch.is_first(), launch.restarted()) == (1, True, False)
    for name, value in {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.processes(), launch.is_first(), launch.restarted()) == (4, False, True)
    world = World("cpu")
    assert (world.rank, world.size, world.first, world.device.type) == (1, 4, False, "cpu")


def test_a_world_size_alone_is_no_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it everywhere
    assert launch.processes() == 1


def test_alone_nothing_needs_agreement():
    with World("cpu") as world:
        assert world.gather([1, 2.5]) == [[1, 2.5]]
        assert world.gather_objects("x") == ["x"]
        assert world.collect("x") == ["x"]
        assert world.share("x") == "x"
        assert world.on_first(lambda: 3) == 3
        assert world.one_by_one(lambda: 4) == 4
    with pytest.raises(UserError, match="bad"), World("cpu") as world, world.together():
        raise UserError("bad")


def test_devices_that_several_processes_cannot_share(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cpu or cuda"):
        World("meta")
