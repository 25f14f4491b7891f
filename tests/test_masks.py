"""Group indices and attention masks against plain transcriptions of their definitions."""
import math

import pytest
import torch

import objectives
from masks import ar_groups, by_group, content_mask, dar_groups, masked_groups, query_mask
from support.kernels import two_stream_bias


def f_of_paper(i, t, g1):
    """Appendix B.3: the group of token i, counted from 1, when the first group has g1 tokens and the others
    t."""
    if i <= g1:
        return 1
    return 1 + math.ceil((i - g1) / t)


@pytest.mark.parametrize("length", range(2, 10))
@pytest.mark.parametrize("t", range(1, 6))
def test_dar_groups_for_every_small_case(length, t):
    for g1 in range(1, t + 1):
        expected = [f_of_paper(i, t, g1) for i in range(1, length + 1)]
        assert dar_groups(length, t, g1).tolist() == expected
        assert max(expected) == 1 + max(0, math.ceil((length - g1) / t))
    batch = dar_groups(length, t, torch.arange(1, t + 1))
    assert batch.tolist() == [dar_groups(length, t, g1).tolist() for g1 in range(1, t + 1)]


def test_t_one_is_autoregressive():
    assert torch.equal(dar_groups(7, 1, 1), ar_groups(7))
    S = torch.arange(7)
    assert torch.equal(content_mask(ar_groups(7)), S[:, None] >= S)
    assert torch.equal(query_mask(ar_groups(7)), S[:, None] > S)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("s", [5, 6, 9])
def test_every_pair_of_eq_6_appears_once(s, t):
    """Over |G_1| = 1..t every pair of a context 1..k and a target p, k < p <= min(k + t, s), appears once."""
    found = []
    for g1 in range(1, t + 1):
        f = dar_groups(s, t, g1)
        for p in range(1, s + 1):
            if f[p - 1] > 1:
                context = query_mask(f)[p - 1].nonzero()[:, 0] + 1
                assert context.tolist() == list(range(1, len(context) + 1))
                found.append((len(context), p))
    assert sorted(found) == [(k, p) for k in range(1, s) for p in range(k + 1, min(k + t, s) + 1)]


def random_queries(seed=0):
    """Any f, holes included, and any 9 queries: more than there are tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 5, (20, 7), generator=generator), torch.randint(7, (20, 9), generator=generator),
            torch.randint(0, 7, (20, 9), generator=generator))


def test_masks_against_eq_24():
    groups, _, cuts = random_queries()
    M_h, M_g, M_c = content_mask(groups), query_mask(groups), query_mask(groups, cuts)
    assert M_c.shape == (20, 9, 7)
    for b in range(20):
        for j in range(7):
            f_j = groups[b, j].item()
            for i in range(7):
                f_i = groups[b, i].item()
                assert M_h[b, i, j].item() == (f_i >= f_j > 0)
                assert M_g[b, i, j].item() == (f_i > f_j > 0)
            for k in range(9):
                assert M_c[b, k, j].item() == (cuts[b, k].item() > f_j > 0)


def test_two_stream_bias_and_the_order_of_f_against_the_definition():
    """Row by row, wherever a row sees anything: S content rows, then a row for each (target, cut)."""
    groups, targets, cuts = random_queries(1)
    bias = two_stream_bias(groups, targets, cuts, torch.float32)
    order, rows, seen = by_group(groups, targets, cuts)
    assert bias.shape == (20, 1, 16, 7) and seen.shape == (20, 16)
    for b, f in enumerate(groups.tolist()):
        sees = [{j for j in range(7) if 0 < f[j] <= f[i]} for i in range(7)]
        sees += [{j for j in range(7) if 0 < f[j] < c} for c in cuts[b].tolist()]
        own = [*range(7), *targets[b].tolist()]
        in_order = [*order[b].tolist(), *(7 + rows[b]).tolist()]
        for row in range(16):
            assert set((bias[b, 0, row] == 0).nonzero()[:, 0].tolist()) == (sees[row] or {own[row]})
            if sees[in_order[row]]:
                assert set(order[b, :seen[b, row]].tolist()) == sees[in_order[row]]


def test_padding_is_neither_seen_nor_sees():
    groups = torch.tensor([1, 2, 0, 3, 0])
    for mask in (content_mask(groups), query_mask(groups)):
        assert not mask[:, [2, 4]].any() and not mask[[2, 4]].any()


@pytest.mark.parametrize("ratio, hidden", [(0.15, 19), (0.3, 38), (0.001, 1), (0.999, 127), (0.5, 64)])
def test_masked_groups_hide_an_exact_count(ratio, hidden):
    groups = masked_groups(50, 128, ratio, torch.Generator().manual_seed(0))
    assert groups.shape == (50, 128) and set(groups.unique().tolist()) == {1, 2}
    assert ((groups == 2).sum(1) == hidden).all()


def test_masked_positions_are_uniform():
    groups = masked_groups(20_000, 10, 0.3, torch.Generator().manual_seed(0))
    share = (groups == 2).double().mean(0)
    assert (share - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 20_000)


def test_range_draws_a_ratio_for_each_sequence():
    hidden = (masked_groups(5000, 100, (0.15, 0.3), torch.Generator().manual_seed(0)) == 2).sum(1)
    assert hidden.min() == 15 and hidden.max() == 30
    assert set(hidden.tolist()) == set(range(15, 31))
    assert abs(hidden.double().mean() - 22.5) < 4 * 4.4 / math.sqrt(5000)


def test_range_with_equal_ends_is_the_fixed_ratio():
    fixed, ranged = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):  # batch after batch: the generators stay in step
        assert torch.equal(masked_groups(6, 20, 0.25, fixed), masked_groups(6, 20, (0.25, 0.25), ranged))


def test_generator_decides():
    def draw(seed):
        return masked_groups(4, 30, (0.1, 0.9), torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("call", [
    lambda: dar_groups(5, 0, 1), lambda: dar_groups(5, 2, 0), lambda: masked_groups(1, 5, 0.0),
    lambda: masked_groups(1, 5, (0.5, 0.2)), lambda: masked_groups(1, 5, (0.5, 1.2))])
def test_wrong_values_are_refused(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------------------- drawing

def test_drawing_shows_f_and_both_masks(capsys):
    objectives.main(["dar", "--t", "2", "--length", "4"])
    text = capsys.readouterr().out
    assert "group f(i)   1  2  2  3" in text and "group f(i)   1  1  2  2" in text
    # row 3 of g1 = 1: the content stream sees 1, 2, 3 and the query stream sees 1
    assert "  3 ■ ■ ■ ·         3 ■ · · ·" in text


def test_drawing_shows_queries_where_they_are_not_the_default(capsys):
    objectives.main(["mtp", "--t", "2", "--length", "3"])
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "M_h, content stream      M_g, query stream",
        "  1 ■ · ·         2 ■ · ·  cut 2, weight 0.5",
        "  2 ■ ■ ·         3 ■ · ·  cut 2, weight 0.5",
        "  3 ■ ■ ■         3 ■ ■ ·  cut 3, weight 1", ""]


def test_draws_that_are_shown_are_typical(capsys):
    """The ratio of vl varies between them, and the hidden tokens of mlm do not come sorted into spans."""
    objectives.main(["vl", "--mask", "0.2,0.8", "--length", "20"])
    lines = capsys.readouterr().out.splitlines()
    hidden = [line.split().count("2") for line in lines if line.startswith("group")]
    assert len(hidden) == 3 and hidden == sorted(hidden) and 4 <= hidden[0] < hidden[1] < hidden[2] <= 16
    adjacent = 0
    for seed in range(20):
        objectives.main(["mlm", "--mask", "0.1", "--length", "20", "--seed", str(seed)])
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("group"):
                first, last = (i for i, x in enumerate(line.split()[2:]) if x == "2")
                adjacent += last - first == 1
    assert adjacent < 16  # of 60 pairs, one in ten: chance exceeds that in 1 of 10,000 cases


@pytest.mark.parametrize("names", [["mtp", "segments"], ["vl"]])
def test_sheets(tmp_path, names):
    pytest.importorskip("matplotlib")
    objectives.main([*names, "--plot", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
