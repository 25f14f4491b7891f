"""Left-to-right likelihood against enumeration and plain loops, the any-order bound, and the commands."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, call_both, call_json, seeded

import evaluate
from data import Corpus, TrainedTokenizer
from objectives import from_options, target_nll
from run import held_out_text, load_run
from tasks import hub
from util import BadInput


def some_tokens(count, length=8, vocab=11):
    return torch.randint(vocab, (count, length), generator=seeded())


def test_probabilities_of_all_continuations_sum_to_one(exact_way, make_run):
    """Exactly: vocabulary 3, length 4, all 27 continuations of each first token, in every regime."""
    run = make_run(*exact_way, vocab=3, length=4)
    for first in range(3):
        sequences = torch.tensor([(first, *rest) for rest in itertools.product(range(3), repeat=3)])
        for name, nll in evaluate.left_to_right(run, sequences).items():
            probability = (-nll.double().sum(1)).exp()
            assert probability.sum().item() == pytest.approx(1, abs=1e-5), name
            assert probability.max() > 0.1  # not the uniform 1/27 of a network that says nothing


def test_each_token_sees_its_whole_prefix_and_nothing_else(exact_way, make_run):
    """By changing one token at a time. The size of the batches changes nothing."""
    run, tokens = make_run(*exact_way), some_tokens(3)
    results = evaluate.left_to_right(run, tokens)
    for k in range(8):
        other = tokens.clone()
        other[:, k] = (other[:, k] + 1) % 11
        for name, changed in evaluate.left_to_right(run, other).items():
            same = (changed == results[name]).all(0)                        # of the tokens from the second on
            assert same[:max(0, k - 1)].all() and not same[k:].any()
    for name, small in evaluate.left_to_right(run, tokens, tokens_at_once=16).items():
        assert torch.allclose(results[name], small, atol=1e-6)


def test_masked_regimes_against_a_plain_loop(make_run):
    run, sequences = make_run(from_options("mlm", mask=0.3), "mask"), some_tokens(3)
    results = evaluate.left_to_right(run, sequences)
    assert set(results) == {"padded", "truncated"}
    for b, k in itertools.product(range(3), range(1, 8)):
        for regime, length in (("padded", 8), ("truncated", k + 1)):
            f = torch.tensor([[1] * k + [2] * (length - k)])
            features = run.model(sequences[b:b + 1, :length], f, torch.arange(length)[None], "mask")
            expected = -run.model.logits(features)[0, k].log_softmax(0)[sequences[b, k]].item()
            assert results[regime][b, k - 1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flag, path", [("mlm", "mask"), ("diffusion", "mask"), ("mlm", "two-stream"),
                                        ("permutation", "two-stream")])
def test_bound_is_the_mean_over_orders(flag, path, make_run):
    """S = 3: the orders x_2 x_3 and x_3 x_2, by enumeration; it is above -log of the mixture of both."""
    run = make_run(from_options(flag), path, vocab=3, length=3, scale=2.0)
    sequences = some_tokens(4, 3, 3)

    def nll(f, p):
        f, p = (torch.tensor([x]).expand(4, -1) for x in (f, [p]))
        return target_nll(run.model, sequences, f, p, path)[:, 0].double()

    hidden = {"permutation": ([1, 2, 3], [1, 3, 2])}.get(flag, ([1, 2, 2], [1, 2, 2]))
    last = {"permutation": ([1, 2, 3], [1, 3, 2])}.get(flag, ([1, 1, 2], [1, 2, 1]))
    orders = torch.stack([nll(hidden[0], 1) + nll(last[0], 2), nll(hidden[1], 2) + nll(last[1], 1)])
    found = evaluate.any_order(run, sequences, draws=1000) * 2
    assert torch.allclose(found, orders.mean(0), rtol=0.04)
    assert (found > math.log(2) - (-orders).logsumexp(0) - 0.04).all()


def test_summary_and_lengths():
    nll = torch.tensor([[1.0, 3.0, 2.0], [2.0, 4.0, 3.0], [3.0, 5.0, 4.0]])
    result = evaluate.summary(nll, 0.5)
    assert result["nll"] == 3 and result["perplexity"] == pytest.approx(math.exp(3)) and result["tokens"] == 9
    assert result["stderr"] == pytest.approx(1 / math.sqrt(3)) and result["sequence_nll"] == [2, 3, 4]
    assert result["bits_per_byte"] == pytest.approx(3 / math.log(2) / 2)
    curve = evaluate.by_length(nll)
    assert curve["nll"] == [2, 4, 3]
    assert curve["bins"] == [{"first": 1, "last": 1, "sequence_nll": [1, 2, 3]},
                             {"first": 2, "last": 3, "sequence_nll": [2.5, 3.5, 4.5]}]


def test_unigram_loss_by_counting():
    tokenizer = SimpleNamespace(vocab=4)
    corpus = Corpus("x", tokenizer, np.array([0, 0, 0, 1, 1, 2]), np.array([3]), 1)
    found = evaluate.unigram_nll(corpus, torch.tensor([[3, 0, 1], [2, 2, 3]]))
    assert np.allclose(found.exp(), [[10 / 4, 10 / 3], [10 / 2, 10 / 1]])
    alone = Corpus("x", tokenizer, np.array([], int), np.array([3, 3]), 1)  # a text that is all held out
    assert np.allclose(evaluate.unigram_nll(alone, torch.tensor([[0, 3, 1]])).exp(), [[2, 6]])


@pytest.mark.parametrize("flags, regimes", [("ar", ["next"]), ("dar --t 2", ["next"]),
                                            ("vl --mask 0.15,0.3", ["padded", "truncated"])])
def test_perplexity_command(trained, flags, regimes):
    line = f"evaluate.py perplexity {trained(flags)} --max-sequences 6 --by-length --dtype fp32"
    text, content = call_both(line)
    results = content["results"]
    assert list(results["regimes"]) == regimes and content["step"] == 20 and results["length"] == 32
    for regime, result in results["regimes"].items():
        bins = result["by_length"]["bins"]
        assert [(b["first"], b["last"]) for b in bins] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
        of_all = np.average([b["sequence_nll"] for b in bins], axis=0, weights=[1, 2, 4, 8, 16])
        assert of_all == pytest.approx(result["sequence_nll"], rel=1e-5) and result["sequences"] == 6
        # bytes are tokens here, and one separator stands behind each text
        assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2), rel=0.01)
        assert regime in text and f"{result['perplexity']:.2f}" in text
    assert results["unigram_nll"] == results["unigram"]["nll"] < math.log(257)


def test_perplexity_of_other_text_a_file_and_an_untrained_run(trained, tmp_path):
    (tmp_path / "other.txt").write_text("the mat sat on the cat. " * 40)
    run, few = trained("ar"), "--max-sequences 5 --dtype fp32"
    own = call_json(f"evaluate.py perplexity {run} {few}")["results"]["regimes"]
    assert call_json(f"evaluate.py perplexity {run}/ckpt.pt {few}")["results"]["regimes"] == own
    other = call_json(f"evaluate.py perplexity {run} --data {tmp_path / 'other.txt'} {few}")
    untrained = call_json(f"evaluate.py perplexity untrained:{run} {few}")
    assert other["results"]["regimes"]["next"]["nll"] != own["next"]["nll"]
    assert untrained["step"] == 0 and untrained["results"]["regimes"]["next"]["nll"] > own["next"]["nll"]


def test_regime_and_picture(trained, tmp_path):
    pytest.importorskip("matplotlib")
    vl, ar, pictures = trained("vl --mask 0.15,0.3"), trained("ar"), (tmp_path / "1.png", tmp_path / "2.png")
    one, two = (call_json(f"evaluate.py perplexity {runs} --max-sequences 2 --regime padded --plot {picture}")
                for runs, picture in zip((vl, f"{vl} {ar}"), pictures))
    rows = [one["results"], *two["checkpoints"]]
    assert [list(row["regimes"]) for row in rows] == [["padded"], ["padded"], ["next"]]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)


def test_several_checkpoints_on_one_text(trained):
    """Each as alone; the difference is paired where the sequences are the same."""
    names = [trained("ar"), trained("vl --mask 0.15,0.3"), trained("ar", extra="--length 16")]
    said, content = call_both(f"evaluate.py perplexity {' '.join(map(str, names))} --max-sequences 6")
    a, b, short = content["checkpoints"]
    for name, row in zip(names, (a, b, short)):
        alone = call_json(f"evaluate.py perplexity {name} --max-sequences 6")["results"]
        assert alone == {key: row[key] for key in alone} and row["checkpoint"] == str(name)
    gap = np.subtract(b["regimes"]["padded"]["sequence_nll"], a["regimes"]["next"]["sequence_nll"])
    found, half = b["difference"], 1.96 * gap.std(ddof=1) / math.sqrt(6)
    assert found["nll"] == pytest.approx(gap.mean())
    assert found["interval"] == pytest.approx([gap.mean() - half, gap.mean() + half])
    assert "difference" not in a and short["difference"] is None
    assert f"{found['nll']:+.4f}" in said and "not paired" in said and said.count("unigram") == 3


def test_another_tokenizer_reads_the_same_text(trained):
    pytest.importorskip("tokenizers")
    first, other = load_run(trained("ar")), load_run(trained("ar"))
    corpus = held_out_text(first)
    text = first.tokenizer.decode(corpus.val)
    other.tokenizer = TrainedTokenizer.train("bpe", 300, [text])
    again = hub.same_text(other, first, corpus)
    assert again.name == corpus.name and again.val_bytes == pytest.approx(corpus.val_bytes, rel=0.01)
    assert other.tokenizer.decode(again.val).strip() == text.strip()
    assert hub.same_text(first, first, corpus) is corpus
    first.tokenizer.kind = "wordpiece"
    with pytest.raises(BadInput, match="data"):
        hub.same_text(other, first, corpus)


def test_bound_command(trained):
    line = f"evaluate.py bound {trained('diffusion')} --max-sequences 4 --draws 6 --dtype fp32"
    text, content = call_both(line)
    results = content["results"]
    bound, exact = results["any_order"]["bound"], results["left_to_right"]["padded"]
    assert bound["sequences"] == exact["sequences"] == 4 and bound["tokens"] == exact["tokens"] == 4 * 31
    gap = np.array(bound["sequence_nll"]) - np.array(exact["sequence_nll"])
    found = results["difference"]["padded"]
    assert [found["nll"], found["stderr"]] == pytest.approx([gap.mean(), gap.std(ddof=1) / 2], abs=1e-5)
    assert f"{bound['perplexity']:.2f}" in text and f"{exact['perplexity']:.2f}" in text
    again = call_json(f"{line} --seed 1")["results"]
    assert again["any_order"] != results["any_order"] and again["left_to_right"] == results["left_to_right"]


def write_run(folder, losses, data="books"):
    """A run folder with these losses, whose last line is cut off since it is still going."""
    folder.mkdir()
    lines = [{"step": 10 * k, "loss": loss, "lr": 1e-3, "tokens": 1000 * k, "tokens_per_second": 50 * k}
             for k, loss in enumerate(losses, 1)]
    for line in lines[1::2]:
        line["val_loss"] = line["loss"] and line["loss"] + 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 10')
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder


def test_curves_command(tmp_path):
    pytest.importorskip("matplotlib")
    a, b = write_run(tmp_path / "a", [4, 3, 2, 1]), write_run(tmp_path / "b", [5, 4])
    x = evaluate.read_curves(a)
    assert x == {"name": "a", "unit": "tokens", "data": "books", "not_finite": 0, "loss": [4, 3, 2, 1],
                 "seen": [1000, 2000, 3000, 4000], "lr": [1e-3] * 4, "speed": [50, 100, 150, 200],
                 "val_seen": [2000, 4000], "val_loss": [3.5, 1.5]}
    said, content = call_both(f"evaluate.py curves {a} {b}")
    assert "validation 1.5000" in said and "validation 4.5000" in said and "bits per byte" not in said
    assert content["results"][0] == x and (a / "curves.png").exists()
    assert "bits per byte" in call(f"evaluate.py curves {a} {write_run(tmp_path / 'c', [3, 2], 'words')}")


def test_curves_of_a_diverged_run(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [4, 3, math.nan, math.inf, None])
    said, content = call_both(f"evaluate.py curves {run}")
    x = content["results"][0]
    assert (x["loss"], x["val_loss"], x["seen"], x["not_finite"]) == ([4, 3], [3.5], [1000, 2000], 3)
    assert "3 losses are not finite" in said and (run / "curves.png").exists()
    with pytest.raises(BadInput, match="no finite losses"):
        call(f"evaluate.py curves {write_run(tmp_path / 'none', [math.nan, None])}")


def test_perplexity_of_a_diverged_model_is_infinite(trained, tmp_path):
    pytest.importorskip("matplotlib")
    content = torch.load(trained("ar") / "ckpt.pt", weights_only=True)
    for name, weight in content["model"].items():
        weight.mul_(1000 if name in ("embedding.weight", "norm.weight") else 1)
    torch.save(content, tmp_path / "ckpt.pt")
    said, content = call_both(f"evaluate.py perplexity {tmp_path} --max-sequences 3 --by-length")
    found = content["results"]["regimes"]["next"]
    assert found["perplexity"] is None and found["nll"] > 1000 and "inf" in said


def test_bound_of_an_objective_without_exact_likelihood(trained, monkeypatch):
    run = load_run(trained("diffusion"))
    monkeypatch.setattr(type(run.objective), "left_to_right", lambda *_: None)
    found = evaluate.bound(run, max_sequences=4, draws=4)
    assert found["left_to_right"] == {} and found["any_order"]["bound"]["nll"] > 0


def test_report_at_the_end_of_training(trained, capsys):
    """The same beginning, from the held-out text, for every objective, and 120 tokens on."""
    starts = set()
    for flags, exact in (("ar", True), ("vl --mask 0.15,0.3", True), ("spans --mask 0.3", False)):
        evaluate.report(trained(flags), "cpu")
        said, _, sample = capsys.readouterr().out.partition("given:\n")
        assert ("perplexity" in said and "unigram" in said) == exact and len(sample.encode()) >= 120
        starts.add(sample[:15])
    run = load_run(trained("ar"))
    assert len(starts) == 1 and starts.pop() in run.tokenizer.decode(held_out_text(run).val)
    folder = trained("mlm --mask 0.75", data="shapes")
    evaluate.report(folder, "cpu")
    assert "at once" in capsys.readouterr().out
    assert (folder / "completed.png").read_bytes()[:4] == b"\x89PNG"
