"""The faster dropout and feed-forward network against PyTorch's."""

import pytest
import torch
from torch import nn

from deformable_detr.model.layers import Dropout, FeedForward, inverse_sigmoid
from tests.support.autograd import SavedBytes, gradients, near


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_so_many_go_and_the_others_make_up_for_them(p):
    torch.manual_seed(0)
    x = torch.ones(300, 1001)
    y = Dropout(p)(x)
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.005)  # ten standard deviations and 1/65536
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=2e-4)
    assert float(y.mean()) == pytest.approx(1, abs=0.02)
    share = (y == 0).float()
    assert float(share.mean(0).std()) < 0.04  # no column and no row that goes as a whole
    assert float(share.mean(1).std()) < 0.03
    near_by = torch.corrcoef(torch.stack((share[:, :-1].flatten(), share[:, 1:].flatten())))[0, 1]
    assert abs(float(near_by)) < 0.01  # neighbors share a number and go one by one all the same


def test_the_generator_decides_what_goes():
    x = torch.ones(7, 9)
    first, second, third = (torch.manual_seed(seed) and Dropout(0.5)(x) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_nothing_goes_without_a_reason():
    x = torch.randn(5, 3)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 3))


def test_gradients_pass_where_values_do():
    x = torch.randn(50, 40, requires_grad=True)
    y = Dropout(0.25)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)
    assert torch.allclose(gradient * x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_a_byte_an_element(dtype):
    x = torch.randn(64, 1000, dtype=dtype, requires_grad=True)
    with SavedBytes(x) as kept:
        y = Dropout(0.1)(x)
    assert y.dtype == dtype
    assert kept.bytes <= x.numel() + 8
    with SavedBytes(x) as kept:
        nn.Dropout(0.1)(x)
    assert kept.bytes >= 2 * x.numel()


def test_relu_and_dropout_in_one_are_those_two():
    torch.manual_seed(0)
    ffn = FeedForward(8, 32, "relu", 0.3).double()
    x = torch.randn(5, 7, 8, dtype=torch.double, requires_grad=True)
    leaves = (x, *ffn.parameters())
    torch.manual_seed(1)
    out = ffn(x)
    torch.manual_seed(1)
    wanted = ffn.linear2(ffn.dropout(ffn.linear1(x).relu()))
    assert near([out, *gradients(out, *leaves)], [wanted, *gradients(wanted, *leaves)])
    torch.manual_seed(2)
    other = ffn(x)
    assert not near([out], [other])


@pytest.mark.parametrize(("activation", "hidden_tensors"), [("relu", 1), ("gelu", 3)])
def test_what_the_feed_forward_network_keeps(activation, hidden_tensors):
    ffn = FeedForward(8, 32, activation, 0.1)
    x = torch.randn(100, 8, requires_grad=True)
    with SavedBytes(x, *ffn.parameters()) as kept:
        ffn(x)
    assert kept.bytes <= hidden_tensors * 100 * 32 * 4


def test_inverse_sigmoid_is_finite_at_the_ends_in_half_precision():
    values = inverse_sigmoid(torch.tensor([0.0, 1e-7, 0.5, 1.0], dtype=torch.float16))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
