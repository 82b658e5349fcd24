"""The decoder's self-attention against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deformable_detr.model.decoder import SelfAttention
from tests.support.autograd import gradients, near


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
