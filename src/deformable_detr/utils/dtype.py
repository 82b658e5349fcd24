"""Number formats of tensors."""

import torch
from torch import Tensor


def upcast(values: Tensor) -> Tensor:
    """Return the values in at least float32, for arithmetic that half precision rounds away or overflows."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
