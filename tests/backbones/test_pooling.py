"""Pooling: against plain loops."""

import pytest
import torch

from chipviz.backbones.pooling import last_positions, pool, pool_so_far


@pytest.mark.parametrize("left", [False, True])
def test_pooling_equals_a_loop_over_the_real_tokens_whatever_the_padding_side(left):
    hidden = torch.randn(4, 7, 5)
    lengths = [7, 1, 3, 6]
    mask = torch.zeros(4, 7, dtype=torch.int64)
    for i, n in enumerate(lengths):
        mask[i, 7 - n :] = 1 if left else 0
        mask[i, :n] = 0 if left and n < 7 else 1
        if left:
            mask[i, : 7 - n] = 0
            mask[i, 7 - n :] = 1
    for i, n in enumerate(lengths):
        real = hidden[i, 7 - n :] if left else hidden[i, :n]
        torch.testing.assert_close(pool(hidden, mask, "mean")[i], real.mean(dim=0))
        assert torch.equal(pool(hidden, mask, "last")[i], real[-1])


def test_the_last_position_ignores_padding_that_follows():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    assert last_positions(mask).tolist() == [1, 3, 2]


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_pooling_so_far_is_pooling_of_every_beginning(pooling):
    states = torch.randn(9, 4)
    so_far = pool_so_far(states, pooling)
    for end in range(1, 10):
        part = states[None, :end]
        whole = pool(part, torch.ones(1, end, dtype=torch.long), pooling)[0]
        torch.testing.assert_close(so_far[end - 1], whole)
