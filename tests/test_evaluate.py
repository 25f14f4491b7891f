"""Left-to-right likelihood against enumeration and against plain loops; generation."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import WAYS, call, name_of

import evaluate
from downstream import by_length, generation
from objectives import choose_path, from_options
from support.cli import BadInput

LEFT_TO_RIGHT = [way for way in WAYS if way[0].left_to_right(8, way[1])]
OWN_ORDER = [way for way in WAYS if way[0].decoding(torch.tensor([1, 0]), 1) is not None]
left_to_right_ways = pytest.mark.parametrize("way", LEFT_TO_RIGHT, ids=name_of)


@left_to_right_ways
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


@left_to_right_ways
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
    assert evaluate.as_trained(run, sequences) == pytest.approx(total / count, rel=1e-5)


def test_training_order_is_not_reported_where_it_is_the_same(make_run):
    sequences = torch.randint(11, (2, 8))
    assert evaluate.as_trained(make_run(from_options("ar"), "causal"), sequences) is None
    assert evaluate.as_trained(make_run(from_options("dar", t=1), "two-stream"), sequences) is None


def test_summary():
    nll = torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    result = evaluate.summary(nll, 0.5)
    assert result["nll"] == 3 and result["perplexity"] == pytest.approx(math.exp(3))
    assert result["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert result["bits_per_byte"] == pytest.approx(3 / math.log(2) / 2) and result["tokens"] == 6


@left_to_right_ways
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


@left_to_right_ways
def test_greedy_generation_takes_the_most_likely_token(way, make_run):
    objective, path = way
    run = make_run(objective, path)
    prompt = [1, 2, 3, 4]
    for new in range(3):
        token = generation.generate(run, prompt, 1, temperature=0, order="left")[0]
        texts = torch.tensor([[*prompt, k] + [0] * (3 - new) for k in range(11)])
        *_, nll = evaluate.left_to_right(run, texts).values()
        assert token == nll[:, len(prompt) - 1].argmin()
        prompt.append(token)


@pytest.mark.parametrize("order", [None, *generation.ORDERS])
@pytest.mark.parametrize("extra", [{}, {"per_step": 3}, {"at_once": True}, {"suffix": [3, 4]}], ids=str)
def test_kept_keys_and_values_change_nothing(way, order, extra, make_run, monkeypatch):
    """Two streams step by step, over a text that outgrows the sequence, against whole passes."""
    objective, path = way
    run, behind, steps = make_run(objective, path), generation.Asker.behind, []

    def checked(self, tokens, f, targets, cut):
        ours = behind(self, tokens, f, targets, cut)
        inputs = (tokens[None, :len(f)], f[None], targets[None], path, torch.full_like(targets, cut)[None])
        assert torch.allclose(ours, self.model(*inputs)[0], atol=1e-9)
        steps.append(len(targets))
        return ours

    monkeypatch.setattr(generation.Asker, "behind", checked)
    count = 3 if "suffix" in extra else 12
    try:
        ids = generation.generate(run, [1, 2, 3], count, temperature=3.0, order=order, **extra)
    except BadInput:
        own, given = way in OWN_ORDER, order or objective.generation
        assert (given != "left" and not own or given == "left"
                and (way not in LEFT_TO_RIGHT or "suffix" in extra)
                or "at_once" in extra and (given != "left" or objective.one_stream))
        return
    assert len(ids) == count and (bool(steps) == (path == "two-stream"))


def test_finished_blocks_are_computed_once(make_run):
    """Each step encodes the visible tokens of its own block, and those of a finished one once more."""
    run, rows = make_run(from_options("blocks", block=2), "two-stream"), []
    run.model.embedding.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    generation.generate(run, [1], 6, temperature=0)
    # x_1; a visible token of the first block; the block, finished; a visible one of the second; and so on
    assert rows == [1, 1, 2, 1, 2, 1]


def test_parts_that_are_predicted_in_parallel(make_run):
    """--at-once takes for dar the whole group, for mtp all heads of the prefix, from one pass each."""
    for name, options in (("dar", {"t": 3}), ("mtp", {"t": 3})):
        run = make_run(from_options(name, **options), "two-stream")
        ids = generation.generate(run, [1, 2], 6, temperature=0, at_once=True)
        prompt = [1, 2]
        for _ in range(2):
            p = len(prompt)
            f = torch.tensor([[1] * p + [2] * 3] if name == "dar" else [list(range(1, p + 4))])
            f = f if name == "mtp" or p == 2 else torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3]])
            tokens, rows = torch.tensor([prompt + [0] * 3]), torch.arange(p, p + 3)[None]
            features = run.model(tokens, f, rows, "two-stream", torch.full_like(rows, int(f[0, p])))
            prompt += run.model.logits(features)[0].argmax(-1).tolist()
        assert ids == prompt[2:]


def fill_by_hand(run, tokens, blank, order):
    """The surest (or, by `order`, the first) of the blanks again and again, each by a pass of its own."""
    tokens = torch.tensor([tokens])
    while blank:
        f = torch.tensor([[2 if i in blank else 1 for i in range(tokens.shape[1])]])
        features = run.model(tokens, f, torch.arange(tokens.shape[1])[None], run.path)
        p = run.model.logits(features)[0].softmax(-1)
        best = max(blank, key=lambda i: p[i].max()) if order == "confident" else blank[0]
        tokens[0, best] = p[best].argmax()
        blank.remove(best)
    return tokens[0].tolist()


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
def test_most_confident_first(name, make_run):
    run = make_run(from_options(name), "mask")
    ours = generation.generate(run, [1, 2, 3], 4, temperature=0, order="confident")
    assert ours == fill_by_hand(run, [1, 2, 3, 0, 0, 0, 0], [3, 4, 5, 6], "confident")[3:]
    ours = generation.generate(run, [1, 2, 3], 3, temperature=0, order="confident", suffix=[7, 8])
    assert ours == fill_by_hand(run, [1, 2, 3, 0, 0, 0, 7, 8], [3, 4, 5], "confident")[3:6]


def test_a_text_longer_than_the_sequence_is_filled_from_its_last_half(make_run):
    """--order confident too: all that fits, the surest first, and then behind the last half of that."""
    run = make_run(from_options("diffusion"), "mask")
    first = fill_by_hand(run, [1, 2, 3, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7], "confident")
    then = fill_by_hand(run, [*first[4:], 0, 0], [4, 5], "confident")
    found = generation.generate(run, [1, 2, 3], 7, temperature=0, order="confident")
    assert found == first[3:] + then[4:]


def test_spans_fill_a_gap_in_order(make_run):
    run, text = make_run(from_options("spans"), "two-stream"), [1, 2, 0, 0, 0, 7, 8]
    ours = generation.generate(run, [1, 2], 3, temperature=0, suffix=[7, 8])
    for k, p in enumerate((2, 3, 4)):
        f = torch.tensor([[1, 1, *(2 + i if i <= k else 0 for i in range(3)), 1, 1]])
        features = run.model(torch.tensor([text]), f, torch.tensor([[p]]), "two-stream")
        text[p] = int(run.model.logits(features).argmax())
    assert ours == text[2:5]
    with pytest.raises(BadInput, match="one sequence"):
        generation.generate(run, [1, 2, 3], 5, suffix=[7, 8])


def test_random_order_samples_the_mixture(make_run):
    """Texts of two tokens against P = E_o P_o by enumeration: chi-squared."""
    run, V = make_run(from_options("diffusion"), "mask", vocab=3, length=3, layers=2, scale=2.0), 3
    sequences = torch.tensor([(1, a, b) for a in range(V) for b in range(V)])

    def probability(f, p):
        f, p = torch.tensor([f]).expand(9, -1), torch.tensor([[p]]).expand(9, -1)
        return (-evaluate.target_nll(run.model, sequences, f, p, "mask")[:, 0].double()).exp()

    left = probability([1, 2, 2], 1) * probability([1, 1, 2], 2)
    right = probability([1, 2, 2], 2) * probability([1, 2, 1], 1)
    p, draws, seen = (left + right) / 2, 1000, torch.zeros(9)
    assert [left.sum().item(), right.sum().item()] == pytest.approx([1, 1], abs=1e-5)
    assert draws * ((left - p).square() / p).sum() > 40  # the test would notice the one order alone
    for seed in range(draws):
        a, b = generation.generate(run, [1], 2, temperature=1.0, top_k=0, order="random", seed=seed)
        seen[a * V + b] += 1
    assert ((seen - draws * p).square() / (draws * p)).sum() < 8 + 5 * math.sqrt(16)


def test_as_trained_by_its_definition(make_run):
    """mtp: Eq. 3's mean over prefixes of the mean over their next tokens."""
    S, t = 8, 3
    run = make_run(from_options("mtp", t=t), "two-stream")
    sequences = torch.randint(11, (2, S), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for k in range(1, S):
        rows = torch.arange(k, min(k + t, S)).expand(2, -1)
        f = torch.arange(1, S + 1).expand(2, -1)
        cuts = torch.full_like(rows, k + 1)
        nll = evaluate.target_nll(run.model, sequences, f, rows, "two-stream", cuts=cuts)
        total += nll.mean().item() / (S - 1)
    assert evaluate.as_trained(run, sequences) == pytest.approx(total, rel=1e-5)


def test_an_f_with_a_hole_is_not_cut_short(make_run, monkeypatch):
    """One token has f = 0 and the last f > 0: the pass reaches up to the last and never sees the hole."""
    run = make_run(from_options("mlm", mask=0.3), "mask")
    a = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    holes = torch.tensor([[1, 0, 1, 2, 2, 2, 2, 2]])
    monkeypatch.setattr(type(run.objective), "left_to_right", lambda self, S, path: {"padded": holes})
    monkeypatch.setattr(evaluate, "scores_next", lambda f: f > 1)
    found = evaluate.left_to_right(run, a)["padded"][:, 2:]
    features = run.model(a, holes.expand(2, -1), torch.arange(3, 8).expand(2, -1), "mask")
    nll = -run.model.logits(features).log_softmax(-1).gather(2, a[:, 3:, None])[..., 0]
    assert torch.allclose(found.double(), nll, atol=1e-5)


def test_no_left_to_right_likelihood_is_said_in_a_line(make_run):
    with pytest.raises(BadInput, match="spans.*no exact left-to-right likelihood"):
        run = make_run(from_options("spans"), "two-stream")
        evaluate.left_to_right(run, torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize("flag", ["ar", "dar", "prefix", "mtp", "spans"])
def test_no_bound_is_said_in_a_line(flag, make_run):
    with pytest.raises(BadInput, match=f"{flag}.*no any-order bound"):
        evaluate.any_order(make_run(from_options(flag), "two-stream"), torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize("name, regimes", [
    ("ar", ["next"]), ("dar", ["next"]), ("vl", ["padded", "truncated"])])
def test_perplexity_command(text_runs, capsys, tmp_path, name, regimes):
    out = tmp_path / "result.json"
    text = call(capsys, "perplexity", text_runs[name], "--by-length", "--json", out)
    content = json.loads(out.read_text())
    assert list(content["results"]["regimes"]) == regimes and content["step"] == 10
    assert content["objective"] == {"ar": "ar", "dar": "dar t=2", "vl": "vl 0.15,0.3"}[name]
    for regime in regimes:
        result = content["results"]["regimes"][regime]
        curve = result["by_length"]
        assert curve["prefix"] == list(range(1, 16))
        assert sum(curve["nll"]) / 15 == pytest.approx(result["nll"])
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
    assert ("as trained" in text) == (name == "dar") and "8-15" in text


def test_perplexity_of_other_text(text_runs, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("the mat sat on the cat. " * 20)
    own = json.loads(call(capsys, "perplexity", text_runs["ar"], "--json", "-"))
    other = json.loads(call(capsys, "perplexity", text_runs["ar"] / "ckpt.pt", "--data",
                            tmp_path / "other.txt", "--json", "-",
                            "--max-sequences", "5"))
    assert other["results"]["regimes"]["next"]["sequences"] == 5
    file = json.loads(call(capsys, "perplexity", text_runs["ar"] / "ckpt.pt", "--json", "-"))
    assert file["results"]["regimes"] == own["results"]["regimes"]  # the validation part, also from the file
    assert own["results"]["regimes"]["next"]["nll"] != other["results"]["regimes"]["next"]["nll"]


def test_bound_command(text_runs, capsys, tmp_path):
    """Both distributions of one network, each under its own name; the mixture's bound is the tighter one."""
    out = tmp_path / "result.json"
    text = call(capsys, "bound", text_runs["diffusion"], "--max-sequences", "5", "--draws", "30", 
                "--orders", "4",                 "--json", out)
    results = json.loads(out.read_text())["results"]
    bound, mixture = results["any_order"]["bound"], results["any_order"]["mixture"]
    exact = results["left_to_right"]["padded"]
    assert bound["sequences"] == exact["sequences"] == 5 and bound["tokens"] == exact["tokens"] == 75
    assert mixture["nll"] < bound["nll"] + 4 * bound["stderr"]
    gap = np.array(bound["sequence_nll"]) - np.array(exact["sequence_nll"])
    assert results["difference"]["padded"]["nll"] == pytest.approx(gap.mean(), abs=1e-5)
    assert results["difference"]["padded"]["stderr"] == pytest.approx(gap.std(ddof=1) / 5 ** 0.5, abs=1e-5)
    mixed, chain = text.split("The chain from left to right, another distribution: exactly")
    assert f"<={bound['perplexity']:9.2f}" in mixed and f"= {exact['perplexity']:9.2f}" in chain
    assert "mixture" in mixed and "mixture" not in chain
    again = json.loads(call(capsys, "bound", text_runs["diffusion"], "--max-sequences", "5", "--draws", "30",
                            "--seed", "1", "--json", "-"))["results"]
    assert again["any_order"]["bound"]["nll"] != bound["nll"]
    assert again["left_to_right"] == results["left_to_right"]


def test_unknown_tokens_are_counted_and_told(make_run, monkeypatch, capsys):
    run = make_run(from_options("ar"), "causal")
    sequences = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 3], [3, 3, 1, 1, 1, 1, 1, 1]])
    monkeypatch.setattr(evaluate, "evaluation_sequences", lambda *args: (sequences, 0.25, "text"))
    assert "unknown" not in evaluate.perplexity(run)
    capsys.readouterr()
    monkeypatch.setattr(run.tokenizer, "unknown", 3, raising=False)
    monkeypatch.setattr(run.tokenizer, "kind", "wordpiece", raising=False)
    results = evaluate.perplexity(run)
    assert results["unknown"] == 4 / 16 and results["wordpiece"]
    evaluate.print_perplexity(results)
    assert "25.00% of these tokens are [UNK]. WordPiece also drops spacing" in capsys.readouterr().out


def test_generate_command(text_runs, capsys):
    filled = call(capsys, "generate", text_runs["spans"], "--prompt", "the", "--suffix", "mat.",
                  "--tokens", 5)
    assert filled.startswith("the") and filled.rstrip("\n").endswith("mat.")
    text = call(capsys, "generate", text_runs["vl"], "--prompt", "the cat", "--tokens", 5)
    assert text.startswith("the cat")
    two = call(capsys, "generate", text_runs["ar"], "--samples", 2, "--tokens", 30, "--json", "-")
    content = json.loads(two)
    assert len(content["texts"]) == 2 and content["texts"][0] != content["texts"][1]


@pytest.mark.parametrize("argv, says", [
    (["perplexity", "nowhere"], "nowhere"), (["perplexity", "{ar}", "--regime", "padded"], "knows only next"),
    (["perplexity", "{ar}", "--data", "no.txt"], "no.txt does not exist"),
    (["perplexity", "{ar}", "--data", "{short}"], "at least two"),
    (["generate", "{ar}", "--temperature", "-1"], "at least 0"),
    (["generate", "{ar}", "--temperature", "nan"], "nan"),
    (["perplexity", "{ar}", "--json", "no/such/x.json"], "no such folder"),
    (["generate", "{ar}", "--order", "confident"], "left to right only"),
    (["perplexity", "{spans}"], "no exact left-to-right"), (["bound", "{spans}"], "no any-order bound"),
    (["generate", "{spans}", "--order", "left"], "not trained from left to right"),
    (["generate", "{ar}", "--suffix", "x"], "nobody sees"),
    (["generate", "{ar}", "--at-once"], "at-once"), (["generate", "{vl}", "--at-once"], "at-once"),
    (["perplexity", "{ar}", "--max-sequences", "1"], "at least two"),
    (["perplexity", "{junk}"], "not a whole checkpoint"), (["sing", "{ar}"], "invalid choice"),
    ([], "command")])
def test_wrong_uses_are_refused(text_runs, tmp_path, argv, says):
    (tmp_path / "short.txt").write_text("tiny")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    places = {**text_runs, "short": tmp_path / "short.txt", "junk": tmp_path / "junk.pt"}
    with pytest.raises(BadInput, match=says):
        evaluate.main([part.format(**places) for part in argv])


def test_path_of_a_masked_run_through_two_streams(make_run):
    objective = from_options("vl")
    run = make_run(objective, choose_path(objective, 2))
    assert list(evaluate.left_to_right(run, torch.randint(11, (2, 8)))) == ["next"]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    by_length.plot_by_length(tmp_path / "curve.png",
                             {"ar": {"prefix": [1, 2, 3], "nll": [3, 2, 1], "stderr": [0.1] * 3}})
    assert (tmp_path / "curve.png").stat().st_size > 5000
