"""Figure 2: the blocked search for the most similar pairs against all pairs at once, and the command."""
import json

import numpy as np
import pytest
import torch
from conftest import call, quietly

import evaluate
from downstream import connectivity
from engine.settings import resolve
from support.cli import BadInput


def all_pairs(x, texts):
    """Inner products of all pairs from different texts, descending, one at a time."""
    return sorted((float(x[i] @ x[j]) for i in range(len(x)) for j in range(i) if texts[i] != texts[j]),
                  reverse=True)


@pytest.mark.parametrize("block", (1, 7, 10, 29, 30, 64))
@pytest.mark.parametrize("count", (1, 50, 10 ** 6))
def test_top_pairs_are_those_of_all_pairs(block, count):
    """Small integers: products are exact, and many are tied, also at the last place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (30, 4), generator=generator).float()
    for texts in (torch.arange(30), torch.arange(30) // 4, torch.randint(5, (30,), generator=generator)):
        expected = all_pairs(x, texts)[:count]
        assert connectivity.top_pairs(x, texts, count, block).tolist() == expected
        assert count != 50 or expected.count(expected[-1]) > 1


def test_mean_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator)
    for texts in (torch.arange(30), torch.randint(5, (30,), generator=generator)):
        assert connectivity.mean_product(x, texts) == pytest.approx(np.mean(all_pairs(x, texts)), abs=1e-6)


def test_connectivity_summarises_both_kinds_of_similarity():
    x, texts = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 2
    result = connectivity.similarities(x, texts, 300)
    assert (result["features"], result["texts"], result["pairs"]) == (40, 20, 300)
    unit = x / x.norm(dim=1, keepdim=True)
    for name, rows in (("inner_product", x), ("cosine", unit)):
        products = all_pairs(rows, texts)
        top, found = np.array(products[:300]), result[name]
        assert found["mean"] == pytest.approx(top.mean(),
                                              rel=1e-5) and found["least"] == pytest.approx(top[-1], rel=1e-5)
        assert found["mean_of_all"] == pytest.approx(np.mean(products), abs=1e-5)
        for q, value in found["quantiles"].items():
            assert value == pytest.approx(np.quantile(top, float(q)), rel=1e-5)
        ranks = found["curve"]["rank"]
        assert ranks[0] == 1 and ranks[-1] == 300 and sorted(set(ranks)) == ranks
        np.testing.assert_allclose(found["curve"]["similarity"], top[np.array(ranks) - 1], rtol=1e-5)
    assert connectivity.similarities(x, texts, 10 ** 6)["pairs"] == 40 * 39 // 2 - 20
    with pytest.raises(BadInput, match="different texts"):
        connectivity.similarities(x, torch.zeros(40))


@pytest.mark.parametrize("count, each", ((6, 1), (24, 4)))
def test_features_are_of_contexts_of_every_text(way, make_run, monkeypatch, count, each):
    objective, path = way
    run = make_run(objective, path, length=16)
    sequences = torch.randint(11, (6, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(connectivity, "evaluation_sequences", lambda run, data,
                        count: (sequences[:count], 1, "x"))
    features, targets, texts = connectivity.features_of(run, None, count)
    assert features.shape == (len(texts), run.model.config.width)
    fewest = int((objective.groups(500, 16, torch.Generator().manual_seed(0)) > 1).sum(1).min())
    assert all(min(each, fewest) <= n <= each for n in texts.bincount(minlength=6))
    assert all(target in sequences[text] for target, text in zip(targets, texts))
    # f(X) of a prefix that the target follows
    if path == "causal":
        f = torch.arange(1, 17).expand(6, -1)
        every = run.model(sequences, f, torch.arange(1, 16).expand(6, -1), path).float()
        for feature, target, text in zip(features, targets, texts):
            at = (every[text] - feature).abs().amax(1).argmin()
            assert torch.allclose(every[text, at], feature, atol=1e-5) and sequences[text, 1 + at] == target
    again = connectivity.features_of(run, None, count)
    assert all(torch.equal(a, b) for a, b in zip((features, targets, texts), again))
    assert not torch.equal(targets, connectivity.features_of(run, None, count, seed=1)[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on one text, and one of another length: folders."""
    base = tmp_path_factory.mktemp("runs")
    (base / "text.txt").write_text("".join(f"line {k} of {k * k % 97} words. " for k in range(3000)))
    for name, options in {"ar": {}, "vl": {"objective": "vl"}, "long": {"length": 32}}.items():
        settings = resolve(**{"data": str(base / "text.txt"), "length": 16, "steps": 2, "batch_size": 4,
                              **options})
        quietly(settings, base / name)
    return base


def test_command(runs, capsys):
    few = ("--features", "200", "--top", "500", "--json", "-")
    x = json.loads(call(capsys, "connectivity", runs / "ar", runs / "vl", *few))
    assert x["command"] == "evaluate.py connectivity" and x["same_sequences"] and x["settings"]["top"] == 500
    assert [row["label"] for row in x["checkpoints"]] == ["ar", "vl 0.15,0.3"]
    for row in x["checkpoints"]:
        assert (row["features"], row["texts"], row["pairs"], row["step"]) == (200, 200, 500, 2)
        assert -1 <= row["cosine"]["least"] <= row["cosine"]["mean"] <= 1 + 1e-6
        assert row["inner_product"]["mean_of_all"] < row["inner_product"]["mean"]
    text = call(capsys, "connectivity", runs / "ar", runs / "long", "--features", "60", "--top", "5")
    assert "ar ar" in text and "long ar" in text and "not the same cuts" in text
    alone = json.loads(call(capsys, "connectivity", runs / "vl", *few))
    # a checkpoint's numbers are its own
    assert alone["checkpoints"] == x["checkpoints"][1:]


def test_an_untrained_run_reads_the_text_that_its_folder_keeps(runs, capsys, monkeypatch):
    (runs / "text.txt").rename(runs / "gone.txt")
    try:
        x = json.loads(call(capsys, "connectivity", f"untrained:{runs / 'ar'}", "--features", "50",
                            "--top", "9", "--json", "-"))
    finally:
        (runs / "gone.txt").rename(runs / "text.txt")
    assert x["data"] == str(runs / "ar" / "data") and x["checkpoints"][0]["step"] == 0


@pytest.mark.parametrize("argv, says", [
    (["{ar}", "nowhere"], "nowhere"), ([], "CKPT"), (["{ar}", "--top", "0"], "at least 1"),
    (["{ar}", "--features", "1"], "at least two"), (["{ar}", "--data", "no.txt"], "no.txt does not exist"),
    (["{ar}", "--plot", "no/such/x.png"], "no such folder")])
def test_wrong_uses_are_refused(runs, argv, says):
    with pytest.raises(BadInput, match=says):
        evaluate.main(["connectivity", *(part.format(ar=runs / "ar") for part in argv)])


def test_picture_extras(runs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    call(capsys, "connectivity", runs / "ar", runs / "vl", "--features", "50", "--top", "100", "--plot",
         tmp_path / "figure2.png")
    assert (tmp_path / "figure2.png").read_bytes()[:4] == b"\x89PNG"
