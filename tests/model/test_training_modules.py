"""Parts that were written anew for a faster training step compute what PyTorch's, timm's and torchvision's do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deformable_detr.model.decoder import SelfAttention
from deformable_detr.model.frozen_norm import FrozenBatchNorm
from deformable_detr.model.layers import Dropout, FeedForward

EXACT = 1e-10


def gradients(out, *leaves):
    """Of a sum with weights that differ."""
    return torch.autograd.grad((out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), leaves)


def near(first, second):
    return all(a.shape == b.shape and bool((a - b).abs().max() <= EXACT) for a, b in zip(first, second, strict=True))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward pass keeps for the backward pass beside what the caller already has."""

    def __init__(self, *own):
        self.places, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in own}, 0
        super().__init__(self.pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in self.places:
            self.places.add(place)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


# -- dropout


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
    with Kept(x) as kept:
        y = Dropout(0.1)(x)
    assert y.dtype == dtype
    assert kept.bytes <= x.numel() + 8
    with Kept(x) as kept:
        nn.Dropout(0.1)(x)
    assert kept.bytes >= 2 * x.numel()


# -- feed-forward network


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
    with Kept(x, *ffn.parameters()) as kept:
        ffn(x)
    assert kept.bytes <= hidden_tensors * 100 * 32 * 4


# -- frozen batch norm


def timms(act):
    from timm.layers.norm_act import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    norm = FrozenBatchNormAct2d(6, act_layer=nn.ReLU6, inplace=False) if act else FrozenBatchNorm2d(6)
    for name in ("weight", "bias", "running_mean"):
        norm.get_buffer(name).normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2)
    return norm.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [True, False])
def test_frozen_norm_is_timms(act, training):
    theirs = timms(act).train(training)
    ours = FrozenBatchNorm(copy.deepcopy(theirs)).train(training)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 6, 5, 7, dtype=torch.double, requires_grad=True)
    out, wanted = ours(x), theirs(x)
    assert near([out, *gradients(out, x)], [wanted, *gradients(wanted, x)])
    ours.weight[0] *= 1.001
    assert not near([ours(x)], [wanted])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_norm_keeps_no_map_and_the_precision(dtype):
    norm = FrozenBatchNorm(timms(False).float())
    x = torch.randn(2, 6, 50, 70).to(memory_format=torch.channels_last).requires_grad_()
    with Kept(*norm.buffers()) as kept:
        y = norm(x)
    assert kept.bytes == 0
    with Kept(*norm.buffers()) as kept:
        norm.eval()(x)
    assert kept.bytes >= x.nbytes  # PyTorch's own gradient needs the input
    norm.train()
    assert y.is_contiguous(memory_format=torch.channels_last)
    half = x.detach().to(dtype).requires_grad_()
    y = norm(half)
    (gradient,) = torch.autograd.grad(y.sum(), half)
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    assert torch.allclose(y.float(), norm(x), atol=0.05, rtol=0.02)


def test_frozen_norm_reads_the_weights_of_one_that_is_not():
    whole = nn.BatchNorm2d(6)
    with torch.no_grad():
        whole.weight.normal_()
    norm = FrozenBatchNorm(timms(False))
    norm.load_state_dict(whole.state_dict())
    assert torch.equal(norm.weight, whole.weight.double())


# -- self-attention


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # the latter takes the way of dropout, and nothing goes
def test_self_attention_is_pytorchs(masked, dropout):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, dropout=0.0, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours = SelfAttention(12, 3, dropout).double()
    ours.load_state_dict(theirs.state_dict())
    x, position = (torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True) for _ in range(2))
    unseen = torch.rand(5, 5) < 0.4 if masked else None
    if unseen is not None:
        unseen.fill_diagonal_(False)
    out = ours(x, position, unseen)
    together = x + position
    wanted, _ = theirs(together, together, x, attn_mask=unseen, need_weights=False)
    leaves = list(theirs.parameters())
    assert near(
        [out, *gradients(out, x, position, *ours.parameters())],
        [wanted, *gradients(wanted, x, position, *leaves)],
    )
    if masked:
        assert not near([ours(x, position)], [wanted])


def test_self_attention_drops_what_is_heard():
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, 0.5)
    x, position = torch.randn(1, 9, 12), torch.randn(1, 9, 12)
    first, second = attention(x, position), attention(x, position)
    assert not torch.allclose(first, second)
    attention.eval()
    assert torch.equal(attention(x, position), attention(x, position))
    probabilities = torch.full((1, 3, 9, 9), 1 / 9)
    assert int((attention.train().drop(probabilities) == 0).sum()) > 50
    assert F.dropout(probabilities, 0.0).min() > 0
