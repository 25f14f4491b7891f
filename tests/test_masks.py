"""Group indices and attention masks against plain transcriptions of their definitions."""

import math

import pytest
import torch

from masks import (
    content_mask,
    dar_groups,
    draw,
    masked_groups,
    query_mask,
    random_order,
    stratified,
)


def f_of_paper(i, t, first):
    """Appendix B.3: the group of token i, counted from 1, after a first group of `first` tokens."""
    return 1 if i <= first else 1 + math.ceil((i - first) / t)


@pytest.mark.parametrize("length", range(2, 10))
@pytest.mark.parametrize("t", range(1, 6))
def test_dar_groups_for_every_small_case(length, t):
    expected = [[f_of_paper(i, t, first) for i in range(1, length + 1)] for first in range(1, t + 1)]
    assert [dar_groups(length, t, first).tolist() for first in range(1, t + 1)] == expected
    assert dar_groups(length, t, torch.arange(1, t + 1)).tolist() == expected
    each_its_own = torch.full((t,), t), torch.arange(1, t + 1)
    assert dar_groups(length, *each_its_own).tolist() == expected


def test_masks_against_eq_24():
    """Any f, holes included, and more queries than there are tokens, at any cuts."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 5, (20, 7), generator=generator)
    cuts = torch.randint(0, 7, (20, 9), generator=generator)
    M_h, M_g, M_c = content_mask(groups), query_mask(groups), query_mask(groups, cuts)
    assert M_h.shape == M_g.shape == (20, 7, 7) and M_c.shape == (20, 9, 7)
    for f, c, *masks in zip(groups.tolist(), cuts.tolist(), M_h.tolist(), M_g.tolist(), M_c.tolist()):
        assert masks == [[[f_i >= f_j > 0 for f_j in f] for f_i in f],
                         [[f_i > f_j > 0 for f_j in f] for f_i in f],
                         [[c_k > f_j > 0 for f_j in f] for c_k in c]]


@pytest.mark.parametrize("ratio, hidden", [(0.15, 19), (0.3, 38), (0.001, 1), (0.999, 127), (0.5, 64)])
def test_masked_groups_hide_an_exact_count(ratio, hidden):
    groups = masked_groups(50, 128, ratio, torch.Generator().manual_seed(0))
    assert groups.shape == (50, 128) and set(groups.unique().tolist()) == {1, 2}
    assert ((groups == 2).sum(1) == hidden).all()


def test_random_orders_and_stratified_numbers():
    """The first token is given and the others come in a uniform order; of 127 numbers each comes once."""
    orders = random_order(12_000, 4, torch.Generator().manual_seed(0))
    found, counts = orders.unique(dim=0, return_counts=True)
    assert (found[:, 0] == 0).all() and len(found) == 6 and (counts - 2000).abs().max() < 4 * math.sqrt(1667)
    numbers = [stratified(batch, 127, torch.Generator().manual_seed(1)) for batch in (127, 1270)]
    assert [sorted(x.tolist()) for x in numbers] == [list(range(1, 128)), sorted([*range(1, 128)] * 10)]


def test_drawing_shows_who_sees_whom():
    lines = draw(dar_groups(4, 2, 1), [(1, 2, 1.0), (3, 2, 0.5)]).splitlines()
    assert lines[1].split()[-4:] == ["1", "2", "2", "3"]
    seen = ["".join(line.split()[1:5]) for line in lines[4:8]]
    assert seen == ["■···", "■■■·", "■■■·", "■■■■"]
    assert lines[10].split() == ["2", *"■···"] and lines[11].split()[:5] == ["4", *"■···"]
    assert lines[11].endswith("cut 2, weight 0.5")
