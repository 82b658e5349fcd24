"""The frozen batch norm against timm's and torchvision's."""

import copy

import pytest
import torch
from torch import nn

from deformable_detr.model.frozen_norm import FrozenBatchNorm
from tests.support.autograd import SavedBytes, gradients, near


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
    with SavedBytes(*norm.buffers()) as kept:
        y = norm(x)
    assert kept.bytes == 0
    with SavedBytes(*norm.buffers()) as kept:
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
