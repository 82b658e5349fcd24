"""Dropout and the feed-forward network compared with PyTorch's."""

import pytest
import torch
from torch import nn

from deformable_detr.model.layers import Dropout, FeedForward, inverse_sigmoid
from tests.support.autograd import SavedBytes, all_close, gradients


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p):
    torch.manual_seed(0)
    x = torch.ones(300, 1001)
    y = Dropout(p)(x)
    assert float((y == 0).float().mean()) == pytest.approx(
        p, abs=0.005
    )  # ten standard deviations, plus the 1/65536 resolution
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=2e-4)
    assert float(y.mean()) == pytest.approx(1, abs=0.02)
    dropped = (y == 0).float()
    assert float(dropped.mean(0).std()) < 0.04  # no correlation within a column or row
    assert float(dropped.mean(1).std()) < 0.03
    correlation = torch.corrcoef(torch.stack((dropped[:, :-1].flatten(), dropped[:, 1:].flatten())))[0, 1]
    assert abs(float(correlation)) < 0.01  # neighbors share a random number but are independent


def test_dropout_is_reproducible_from_the_seed():
    x = torch.ones(7, 9)
    first, second, third = (torch.manual_seed(seed) and Dropout(0.5)(x) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_dropout_in_eval_mode_and_at_0_and_1():
    x = torch.randn(5, 3)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 3))


def test_gradients_pass_where_values_do_not_drop():
    x = torch.randn(50, 40, requires_grad=True)
    y = Dropout(0.25)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, y == 0)
    assert torch.allclose(gradient * x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_saves_one_byte_per_element(dtype):
    x = torch.randn(64, 1000, dtype=dtype, requires_grad=True)
    with SavedBytes(x) as saved:
        y = Dropout(0.1)(x)
    assert y.dtype == dtype
    assert saved.bytes <= x.numel() + 8
    with SavedBytes(x) as saved:
        nn.Dropout(0.1)(x)
    assert saved.bytes >= 2 * x.numel()


def test_fused_relu_dropout_matches_separate_operations():
    torch.manual_seed(0)
    ffn = FeedForward(8, 32, "relu", 0.3).double()
    x = torch.randn(5, 7, 8, dtype=torch.double, requires_grad=True)
    leaves = (x, *ffn.parameters())
    torch.manual_seed(1)
    out = ffn(x)
    torch.manual_seed(1)
    expected = ffn.linear2(ffn.dropout(ffn.linear1(x).relu()))
    assert all_close([out, *gradients(out, *leaves)], [expected, *gradients(expected, *leaves)])
    torch.manual_seed(2)
    other = ffn(x)
    assert not all_close([out], [other])


@pytest.mark.parametrize(("activation", "hidden_tensors"), [("relu", 1), ("gelu", 3)])
def test_memory_saved_by_the_feed_forward_network(activation, hidden_tensors):
    ffn = FeedForward(8, 32, activation, 0.1)
    x = torch.randn(100, 8, requires_grad=True)
    with SavedBytes(x, *ffn.parameters()) as saved:
        ffn(x)
    assert saved.bytes <= hidden_tensors * 100 * 32 * 4


def test_inverse_sigmoid_of_0_and_1_is_finite_in_half_precision():
    values = inverse_sigmoid(torch.tensor([0.0, 1e-7, 0.5, 1.0], dtype=torch.float16))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
