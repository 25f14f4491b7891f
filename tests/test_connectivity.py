"""Figure 2: the blocked search for the most similar pairs against all pairs at once, and the command."""

import numpy as np
import pytest
import torch
from conftest import call_both, call_json, seeded

from data import Corpus
from tasks import connectivity


def all_pairs(x, texts):
    """Inner products of all pairs from different texts, descending, one at a time."""
    return sorted((float(x[i] @ x[j]) for i in range(len(x)) for j in range(i) if texts[i] != texts[j]),
                  reverse=True)


@pytest.mark.parametrize("count", (1, 50, 10 ** 6))
def test_top_pairs_are_those_of_all_pairs(count):
    """Small integers: products are exact, and many are tied, also at the last place."""
    generator = seeded()
    x = torch.randint(-2, 3, (20, 4), generator=generator).float()
    for texts in (torch.arange(20), torch.arange(20) // 4, torch.randint(5, (20,), generator=generator)):
        expected = all_pairs(x, texts)
        for block in (1, 7, 20, 64):
            assert connectivity.top_pairs(x, texts, count, block).tolist() == expected[:count]
        assert connectivity.mean_product(x, texts) == pytest.approx(np.mean(expected), abs=1e-6)


def test_both_kinds_of_similarity():
    x, texts = 3 * torch.randn(40, 5, generator=seeded()), torch.arange(40) // 2
    result = connectivity.similarities(x, texts, 300)
    assert (result["features"], result["texts"], result["pairs"]) == (40, 20, 300)
    for name, rows in (("inner_product", x), ("cosine", x / x.norm(dim=1, keepdim=True))):
        products, found = np.array(all_pairs(rows, texts)), result[name]
        assert found["mean"] == pytest.approx(products[:300].mean(), rel=1e-5)
        assert found["mean_of_all"] == pytest.approx(products.mean(), abs=1e-5)
        ranks = np.array(found["curve"]["rank"])
        assert (ranks[0], ranks[-1]) == (1, 300)
        np.testing.assert_allclose(found["curve"]["similarity"], products[ranks - 1], rtol=1e-5)


@pytest.mark.parametrize("count, each", ((6, 1), (24, 4)))
def test_features_are_of_contexts_of_every_text(way, make_run, count, each):
    objective, path = way
    run = make_run(objective, path, length=16)
    tokens = torch.randint(11, (6 * 16,), generator=seeded()).numpy()
    corpus = Corpus("x", run.tokenizer, tokens[:0], tokens, len(tokens))
    features, texts = connectivity.features_of(run, corpus, count)
    assert features.shape == (len(texts), run.model.config.width)
    fewest = int((objective.groups(500, 16, seeded()) > 1).sum(1).min())
    assert all(min(each, fewest) <= n <= each for n in texts.bincount(minlength=6))
    assert torch.equal(features, connectivity.features_of(run, corpus, count)[0])
    assert not torch.equal(features, connectivity.features_of(run, corpus, count, seed=1)[0])


def test_command(trained, tmp_path):
    pytest.importorskip("matplotlib")
    ar, vl, few = trained("ar"), trained("vl --mask 0.15,0.3"), "--features 60 --top 100 --dtype fp32"
    x = call_json(f"evaluate.py connectivity {ar} {vl} {few} --plot {tmp_path / 'figure2.png'}")
    assert [row["objective"] for row in x["checkpoints"]] == ["ar", "vl 0.15,0.3"]
    for row in x["checkpoints"]:
        assert (row["features"], row["pairs"], row["step"]) == (60, 100, 20)
        assert -1 <= row["cosine"]["least"] <= row["cosine"]["mean"] <= 1 + 1e-6
        assert row["inner_product"]["mean_of_all"] < row["inner_product"]["mean"]
    assert (tmp_path / "figure2.png").read_bytes()[:4] == b"\x89PNG"
    said, alone = call_both(f"evaluate.py connectivity {vl} {few}")
    assert "cosine" in said and alone["checkpoints"] == x["checkpoints"][1:]  # its numbers are its own
