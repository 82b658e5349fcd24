"""What torchrun says about this process, read from the environment without importing torch."""

import os


def world_size() -> int:
    """Return the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def is_rank_zero() -> bool:
    """Return whether this process writes files and messages for the run."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def is_local_rank_zero() -> bool:
    """Return whether this process prints errors that every process of its machine has, such as a wrong option."""
    return world_size() == 1 or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"


def restarted() -> bool:
    """Return whether torchrun restarted this process after a failure, so that the run must be resumed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
