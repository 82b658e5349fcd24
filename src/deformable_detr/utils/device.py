"""Which processor to compute on."""

from __future__ import annotations

import torch

from .errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto: cuda where there is one, then mps, else cpu. UserError where unusable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device '{name}' cannot be used here: {reason}") from None
    return device
