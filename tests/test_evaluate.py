"""Left-to-right likelihood against enumeration and against plain loops; generation."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import evaluate
import train as training
from downstream import generation
from engine.settings import Settings
from objectives import choose_path, from_options
from support.cli import BadInput


def test_probabilities_of_all_continuations_sum_to_one(way, make_run):
    """Exactly: vocabulary 3, length 4, all 27 continuations of each first token, in every regime."""
    objective, path = way
    run = make_run(objective, path, vocab=3, length=4)
    for first in range(3):
        sequences = torch.tensor([(first, *rest) for rest in itertools.product(range(3), repeat=3)])
        for name, nll in evaluate.left_to_right(run, sequences).items():
            probability = (-nll.double().sum(1)).exp()
            assert probability.sum().item() == pytest.approx(1, abs=1e-5), name
            assert probability.max() > 0.1  # not the uniform 1/27 of a network that says nothing


def test_no_token_looks_ahead(way, make_run):
    """-log P(x_p | x_<p) does not change when later tokens do."""
    objective, path = way
    run = make_run(objective, path)
    a = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    b = torch.cat([a[:, :5], (a[:, 5:] + 1) % 11], dim=1)
    for left, right in zip(evaluate.left_to_right(run, a).values(), evaluate.left_to_right(run, b).values()):
        assert torch.equal(left[:, :4], right[:, :4]) and not torch.equal(left[:, 4:], right[:, 4:])


def test_masked_regimes_against_a_plain_loop(make_run):
    run = make_run(from_options("mlm", mask=0.3), "mask")
    sequences = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    results = evaluate.left_to_right(run, sequences)
    assert set(results) == {"padded", "truncated"}
    for b in range(3):
        for k in range(1, 8):
            for regime, length in (("padded", 8), ("truncated", k + 1)):
                f = torch.tensor([[1] * k + [2] * (length - k)])
                features = run.model(sequences[b:b + 1, :length], f, torch.arange(length)[None], "mask")
                expected = -run.model.logits(features)[0, k].log_softmax(0)[sequences[b, k]].item()
                assert results[regime][b, k - 1].item() == pytest.approx(expected, abs=1e-5)


def test_dar_takes_each_target_where_it_is_first_in_its_group(make_run):
    t, S = 3, 8
    run = make_run(from_options("dar", t=t), "two-stream")
    sequences = torch.randint(11, (2, S), generator=torch.Generator().manual_seed(0))
    ours = evaluate.left_to_right(run, sequences)["next"]
    total = count = 0
    for g1 in range(1, t + 1):
        f = torch.tensor([1 + max(0, math.ceil((i - g1) / t)) for i in range(1, S + 1)])
        for p in range(g1, S):
            features = run.model(sequences, f.expand(2, -1), torch.full((2, 1), p), "two-stream")
            nll = -run.model.logits(features)[:, 0].log_softmax(-1).gather(1, sequences[:, p:p + 1])[:, 0]
            total, count = total + nll.sum().item(), count + 2
            if (p - g1) % t == 0:
                assert torch.allclose(ours[:, p - 1].double(), nll, atol=1e-5)
    assert evaluate.training_order_nll(run, sequences) == pytest.approx(total / count, rel=1e-5)


def test_training_order_is_not_reported_where_it_is_the_same(make_run):
    sequences = torch.randint(11, (2, 8))
    assert evaluate.training_order_nll(make_run(from_options("ar"), "causal"), sequences) is None
    assert evaluate.training_order_nll(make_run(from_options("dar", t=1), "two-stream"), sequences) is None


def test_summary():
    nll = torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    result = evaluate.summary(nll, 0.5)
    assert result["nll"] == 3 and result["perplexity"] == pytest.approx(math.exp(3))
    assert result["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert result["bits_per_byte"] == pytest.approx(3 / math.log(2) / 2) and result["tokens"] == 6


def test_batches_do_not_change_the_result(way, make_run):
    objective, path = way
    run = make_run(objective, path)
    sequences = torch.randint(11, (5, 8))
    for a, b in zip(evaluate.left_to_right(run, sequences).values(),
                    evaluate.left_to_right(run, sequences, tokens_at_once=16).values()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("prompt, count", [(3, 4), (7, 20), (20, 10)])
def test_generation_of_any_length(way, make_run, prompt, count):
    objective, path = way
    run = make_run(objective, path)
    ids = list(range(8)) * 3
    texts = [generation.generate(run, ids[:prompt], count, temperature=5.0, seed=seed) for seed in (0, 0, 1)]
    assert all(len(text) == count and all(0 <= i < 11 for i in text) for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_greedy_generation_takes_the_most_likely_token(way, make_run):
    objective, path = way
    run = make_run(objective, path)
    prompt = [1, 2, 3, 4]
    for new in range(3):
        token = generation.generate(run, prompt, 1, temperature=0)[0]
        *_, nll = evaluate.left_to_right(run, torch.tensor([[*prompt, k] + [0] * (3 - new) for k in range(11)])).values()
        assert token == nll[:, len(prompt) - 1].argmin()
        prompt.append(token)


def test_dar_generates_a_group_at_once(make_run, monkeypatch):
    run = make_run(from_options("dar", t=3), "two-stream")
    calls, forward = [], run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *args: calls.append(args[2].shape[1]) or forward(*args))
    ids = generation.generate(run, [1, 2], 6, temperature=0, at_once=True)
    assert calls == [3, 3] and len(ids) == 6
    single = generation.generate(run, [1, 2], 1, temperature=0)
    assert ids[0] == single[0]  # the first of a group has its whole prefix either way


def test_most_confident_first(make_run):
    run = make_run(from_options("mlm", mask=0.3), "mask")
    ours = generation.generate(run, [1, 2, 3], 4, temperature=0, confident=True)
    tokens, blank = torch.tensor([[1, 2, 3, 0, 0, 0, 0]]), [3, 4, 5, 6]
    while blank:
        f = torch.tensor([[2 if i in blank else 1 for i in range(7)]])
        p = run.model.logits(run.model(tokens, f, torch.arange(7)[None], "mask"))[0].softmax(-1)
        best = max(blank, key=lambda i: p[i].max())
        tokens[0, best] = p[best].argmax()
        blank.remove(best)
    assert ours == tokens[0, 3:].tolist()
    with pytest.raises(BadInput, match="dar t=2"):
        generation.generate(make_run(from_options("dar"), "two-stream"), [1], 2, confident=True)
    with pytest.raises(BadInput, match="one sequence"):
        generation.generate(run, [1, 2, 3], 6, confident=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Small runs on repeating text: {name: folder}."""
    base = tmp_path_factory.mktemp("runs")
    text = base / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    folders = {}
    for name, options in {"ar": {}, "dar": {"objective": "dar"}, "vl": {"objective": "vl"}}.items():
        folders[name] = base / name
        settings = Settings(data=str(text), length=16, steps=10, batch_size=8, **options)
        training.train(settings, folders[name], device="cpu", dtype="fp32", quiet=True)
    return folders


def call(capsys, *argv):
    evaluate.main([*map(str, argv), "--device", "cpu", "--dtype", "fp32"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name, regimes", [("ar", ["next"]), ("dar", ["next"]), ("vl", ["padded", "truncated"])])
def test_perplexity_command(trained, capsys, tmp_path, name, regimes):
    out = tmp_path / "result.json"
    text = call(capsys, "perplexity", trained[name], "--by-length", "--json", out)
    content = json.loads(out.read_text())
    assert list(content["results"]["regimes"]) == regimes and content["step"] == 10
    assert content["objective"] == {"ar": "ar", "dar": "dar t=2", "vl": "vl 0.15,0.3"}[name]
    for regime in regimes:
        result = content["results"]["regimes"][regime]
        curve = result["by_length"]
        assert curve["prefix"] == list(range(1, 16)) and sum(curve["nll"]) / 15 == pytest.approx(result["nll"])
        bins = [(b["first"], b["last"]) for b in curve["bins"]]
        assert bins == [(1, 1), (2, 3), (4, 7), (8, 15)]
        for (low, high), b in zip(bins, curve["bins"]):
            assert np.mean(b["sequence_nll"]) == pytest.approx(np.mean(curve["nll"][low - 1:high]))
        of_all = np.average([b["sequence_nll"] for b in curve["bins"]], axis=0, weights=[1, 2, 4, 8])
        assert of_all == pytest.approx(result["sequence_nll"])
        assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
        # bytes are tokens here, and one separator stands behind the text
        assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2), rel=0.01)
        assert regime in text and f"{result['perplexity']:.2f}" in text
    assert ("in groups" in text) == (name == "dar") and "8-15" in text


def test_perplexity_of_other_text(trained, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("the mat sat on the cat. " * 20)
    own = json.loads(call(capsys, "perplexity", trained["ar"], "--json", "-"))
    other = json.loads(call(capsys, "perplexity", trained["ar"] / "ckpt.pt", "--data", tmp_path / "other.txt", "--json", "-",
                            "--max-sequences", "5"))
    assert other["results"]["regimes"]["next"]["sequences"] == 5
    file = json.loads(call(capsys, "perplexity", trained["ar"] / "ckpt.pt", "--json", "-"))
    assert file["results"]["regimes"] == own["results"]["regimes"]  # the validation part, also from the file
    assert own["results"]["regimes"]["next"]["nll"] != other["results"]["regimes"]["next"]["nll"]


def test_generate_command(trained, capsys):
    assert call(capsys, "generate", trained["vl"], "--prompt", "the cat", "--tokens", "5").startswith("the cat")
    content = json.loads(call(capsys, "generate", trained["ar"], "--samples", "2", "--tokens", "30", "--json", "-"))
    assert len(content["texts"]) == 2 and content["texts"][0] != content["texts"][1]


@pytest.mark.parametrize("argv, says", [
    (["perplexity", "nowhere"], "nowhere"), (["perplexity", "{ar}", "--regime", "padded"], "one regime"),
    (["perplexity", "{ar}", "--data", "no.txt"], "no.txt does not exist"), (["perplexity", "{ar}", "--data", "{short}"], "at least two"),
    (["generate", "{ar}", "--temperature", "-1"], "at least 0"), (["generate", "{ar}", "--temperature", "nan"], "nan"),
    (["perplexity", "{ar}", "--json", "no/such/x.json"], "no such folder"), (["generate", "{ar}", "--order", "confident"], "mlm or vl"),
    (["generate", "{ar}", "--at-once"], "at-once"), (["generate", "{vl}", "--at-once"], "at-once"),
    (["perplexity", "{ar}", "--max-sequences", "1"], "at least two"),
    (["perplexity", "{junk}"], "not a whole checkpoint"), (["sing", "{ar}"], "invalid choice"), ([], "command")])
def test_wrong_uses_are_refused(trained, tmp_path, argv, says):
    (tmp_path / "short.txt").write_text("tiny")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    places = {"ar": trained["ar"], "vl": trained["vl"], "short": tmp_path / "short.txt", "junk": tmp_path / "junk.pt"}
    with pytest.raises(BadInput, match=says):
        evaluate.main([part.format(**places) for part in argv])


def test_path_of_a_masked_run_through_two_streams(make_run):
    objective = from_options("vl")
    run = make_run(objective, choose_path(objective, 2))
    assert list(evaluate.left_to_right(run, torch.randint(11, (2, 8)))) == ["next"]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.plot_by_length(tmp_path / "curve.png", {"ar": {"prefix": [1, 2, 3], "nll": [3, 2, 1], "stderr": [0.1] * 3}})
    assert (tmp_path / "curve.png").stat().st_size > 5000
