"""Selection of the device to compute on."""

import torch

from .errors import UserError, first_line


def pick_device(name: str = "auto") -> torch.device:
    """Return a PyTorch device by name; "auto" selects CUDA if available, then MPS, then the CPU.

    Raises UserError if the device does not exist or does not work.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises AssertionError
        raise UserError(f"device '{name}' cannot be used here: {first_line(error)}") from None
    return device
