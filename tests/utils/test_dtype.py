"""Number formats of tensors."""

import torch

from deformable_detr.utils.dtype import upcast


def test_upcast_widens_half_precision_only():
    assert upcast(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert upcast(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
