"""Layers of any network are packed with the activation after them only where that changes no value."""

import pytest
import torch
from torch import nn

from deformable_detr.runtimes.fused.onednn import PackedConv2d, is_available
from deformable_detr.runtimes.fused.packing import CastInput, pack_layers


class Network(nn.Module):
    """Convolutions and a linear layer; `kind` says what happens between the first convolution and its activation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU(inplace=kind == "activation in place")
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        y = self.first(x)
        if self.kind == "read twice":
            return self.linear((self.act(y) + y).mean((2, 3)))
        if self.kind == "changed in place":
            y += 1
        if self.kind == "function before":
            y = y * 2
        if self.kind == "activation of two layers":
            y = self.act(y)
        y = self.second(self.act(y))
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("kind", "fuses"),
    [
        ("plain", True),
        ("activation in place", True),
        ("read twice", False),
        ("changed in place", False),
        ("function before", False),
        ("activation of two layers", False),
    ],
)
def test_outputs_are_equal(kind, fuses, packed):
    if packed and not is_available(torch.float32):
        pytest.skip("no packed layers on this processor")
    torch.manual_seed(0)
    network = Network(kind).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 5)
    expected = network(x)
    pack_layers(network, lambda: network(x[:1]), lambda name: torch.float32, packed)
    assert isinstance(network.first, PackedConv2d)
    assert isinstance(network.linear, CastInput)
    assert (network.first.activation is not None) == fuses
    assert isinstance(network.act, nn.Identity) == fuses
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=0)


def test_dtypes():
    torch.manual_seed(0)
    network = Network("plain").eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 5)
    expected = network(x)
    pack_layers(network, lambda: network(x), lambda name: torch.bfloat16 if name == "linear" else torch.float32, False)
    output = network(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0)
