"""What the launcher says about this process; nothing here needs torch."""

from __future__ import annotations

import os


def processes() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one of the run that writes and speaks."""
    return processes() == 1 or os.environ["RANK"] == "0"


def restarted() -> bool:
    """Whether torchrun started this process again after a failure: the run in the folder then goes on."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
