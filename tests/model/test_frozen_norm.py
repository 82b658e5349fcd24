"""Frozen batch norm compared with timm's and torchvision's."""

import copy

import pytest
import torch
from torch import nn

from deformable_detr.model.frozen_norm import FrozenBatchNorm
from tests.support.autograd import SavedBytes, all_close, gradients


def reference_norm(act):
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
def test_frozen_norm_matches_timm_and_torchvision(act, training):
    theirs = reference_norm(act).train(training)
    ours = FrozenBatchNorm(copy.deepcopy(theirs)).train(training)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 6, 5, 7, dtype=torch.double, requires_grad=True)
    out, expected = ours(x), theirs(x)
    assert all_close([out, *gradients(out, x)], [expected, *gradients(expected, x)])
    ours.weight[0] *= 1.001
    assert not all_close([ours(x)], [expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_norm_saves_no_activation_and_keeps_the_dtype(dtype):
    norm = FrozenBatchNorm(reference_norm(False).float())
    x = torch.randn(2, 6, 50, 70).to(memory_format=torch.channels_last).requires_grad_()
    with SavedBytes(*norm.buffers()) as saved:
        y = norm(x)
    assert saved.bytes == 0
    with SavedBytes(*norm.buffers()) as saved:
        norm.eval()(x)
    assert saved.bytes >= x.nbytes  # in eval mode PyTorch saves the input
    norm.train()
    assert y.is_contiguous(memory_format=torch.channels_last)
    half = x.detach().to(dtype).requires_grad_()
    y = norm(half)
    (gradient,) = torch.autograd.grad(y.sum(), half)
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    assert torch.allclose(y.float(), norm(x), atol=0.05, rtol=0.02)


def test_frozen_norm_loads_batch_norm_weights():
    batch_norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        batch_norm.weight.normal_()
    norm = FrozenBatchNorm(reference_norm(False))
    norm.load_state_dict(batch_norm.state_dict())
    assert torch.equal(norm.weight, batch_norm.weight.double())
