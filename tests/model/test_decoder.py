"""Self-attention of the decoder compared with PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deformable_detr.model.decoder import SelfAttention
from tests.support.autograd import all_close, gradients


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # 1e-12 takes the dropout path but drops nothing
def test_self_attention_matches_pytorch(masked, dropout):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, dropout=0.0, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    ours = SelfAttention(12, 3, dropout).double()
    ours.load_state_dict(theirs.state_dict())
    x, position = (torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True) for _ in range(2))
    attn_mask = torch.rand(5, 5) < 0.4 if masked else None
    if attn_mask is not None:
        attn_mask.fill_diagonal_(False)
    out = ours(x, position, attn_mask)
    with_position = x + position
    expected, _ = theirs(with_position, with_position, x, attn_mask=attn_mask, need_weights=False)
    leaves = list(theirs.parameters())
    assert all_close(
        [out, *gradients(out, x, position, *ours.parameters())],
        [expected, *gradients(expected, x, position, *leaves)],
    )
    if masked:
        assert not all_close([ours(x, position)], [expected])


def test_dropout_applies_to_attention_probabilities():
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, 0.5)
    x, position = torch.randn(1, 9, 12), torch.randn(1, 9, 12)
    first, second = attention(x, position), attention(x, position)
    assert not torch.allclose(first, second)
    attention.eval()
    assert torch.equal(attention(x, position), attention(x, position))
    probabilities = torch.full((1, 3, 9, 9), 1 / 9)
    assert int((attention.train().attn_dropout(probabilities) == 0).sum()) > 50
    assert F.dropout(probabilities, 0.0).min() > 0
