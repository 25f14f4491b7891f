"""Group indices and attention masks against plain transcriptions of their definitions."""

import pytest
import torch
from conftest import seeded

from masks import content_mask, masked_groups, query_mask, stratified


def test_masks_against_eq_24():
    """Any f, holes included, and more queries than there are tokens, at any cuts."""
    generator = seeded()
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
    groups = masked_groups(50, 128, ratio, seeded())
    assert groups.shape == (50, 128) and set(groups.unique().tolist()) == {1, 2}
    assert ((groups == 2).sum(1) == hidden).all()


def test_of_127_stratified_numbers_each_comes_once():
    for times in (1, 10):
        assert sorted(stratified(127 * times, 127, seeded(1)).tolist()) == sorted([*range(1, 128)] * times)
