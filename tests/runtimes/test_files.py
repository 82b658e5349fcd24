"""Runtimes of exported files: errors."""

import pytest
import torch

from deformable_detr.runtimes.files import TorchRuntime
from deformable_detr.utils.errors import UserError


class Small(torch.nn.Module):
    def forward(self, pixels):
        return (pixels.mean(),)


def test_excluded_size_is_one_line(tmp_path):
    """torch.export makes a limit of every size on which the code branches."""
    height = torch.export.Dim("height", min=5, max=64)
    program = torch.export.export(Small(), (torch.zeros(1, 3, 8, 8),), dynamic_shapes=({2: height},))
    torch.export.save(program, tmp_path / "model.pt2")
    runtime = TorchRuntime(tmp_path / "model.pt2", "cpu", None)
    assert runtime([torch.ones(1, 3, 9, 8)]) == [1.0]
    with pytest.raises(UserError, match=r"model.pt2 fails in PyTorch: Expected input .* <= 64, but got 65$"):
        runtime([torch.ones(1, 3, 65, 8)])
