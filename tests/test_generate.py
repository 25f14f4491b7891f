"""Text in three orders against plain loops and enumeration; what completed images read."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, call_both, call_json, seeded

import evaluate
from data import ByteTokenizer
from images import write_png
from masks import Objective
from objectives import from_options, target_nll
from tasks import generate
from util import BadInput


def test_generation_beyond_a_sequence(way, make_run):
    run, ids = make_run(*way), list(range(7))
    texts = [generate.generate(run, ids, 10, temperature=5.0, seed=seed) for seed in (0, 0, 1)]
    assert all(len(text) == 10 and all(0 <= i < 11 for i in text) for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_greedy_generation_takes_the_most_likely_token(exact_way, make_run):
    run, prompt = make_run(*exact_way), [1, 2, 3, 4]
    for new in range(3):
        token = generate.generate(run, prompt, 1, temperature=0, order="left")[0]
        texts = torch.tensor([[*prompt, k] + [0] * (3 - new) for k in range(11)])
        *_, nll = evaluate.left_to_right(run, texts).values()
        assert token == nll[:, len(prompt) - 1].argmin()
        prompt.append(token)


def test_watch_shows_each_step(trained):
    line = f"evaluate.py generate {trained('diffusion')} --prompt ab --tokens 5 --watch --seed 1"
    steps = call(line).splitlines()
    assert [step.count("·") for step in steps[:5]] == [4, 3, 2, 1, 0]
    assert all(step.startswith("ab") and "\x1b" not in step for step in steps[:5])


def test_a_terminal_shows_the_newest_token_in_colour(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    generate.show_step(ByteTokenizer(), torch.tensor([97, 98, 99, 0]), torch.tensor([1, 2, 3, 0]))
    assert capsys.readouterr().out == "\x1b[H\x1b[Jab\x1b[1;32mc\x1b[0m·\n"


def fill_by_hand(run, tokens, blank):
    """The surest of the blanks again and again, each by a pass of its own."""
    tokens, blank = torch.tensor([tokens]), list(blank)
    while blank:
        f = torch.tensor([[2 if i in blank else 1 for i in range(tokens.shape[1])]])
        features = run.model(tokens, f, torch.arange(tokens.shape[1])[None], run.path)
        p = run.model.logits(features)[0].softmax(-1)
        best = max(blank, key=lambda i: p[i].max())
        tokens[0, best] = p[best].argmax()
        blank.remove(best)
    return tokens[0].tolist()


@pytest.mark.parametrize("name", ["mlm", "diffusion"])
def test_most_confident_first(name, make_run):
    """Alone, before a suffix, and beyond a sequence: then from the last half of it."""
    run = make_run(from_options(name), "mask")
    ours = generate.generate(run, [1, 2, 3], 3, temperature=0, order="confident", suffix=[7, 8])
    assert ours == fill_by_hand(run, [1, 2, 3, 0, 0, 0, 7, 8], [3, 4, 5])[3:6]
    first = fill_by_hand(run, [1, 2, 3, 0, 0, 0, 0, 0], range(3, 8))
    then = fill_by_hand(run, [*first[4:], 0, 0], (4, 5))
    assert generate.generate(run, [1, 2, 3], 7, temperature=0, order="confident") == first[3:] + then[4:]


def test_spans_fill_a_gap_in_order(make_run):
    run, text = make_run(from_options("spans"), "two-stream"), [1, 2, 0, 0, 0, 7, 8]
    ours = generate.generate(run, [1, 2], 3, temperature=0, suffix=[7, 8])
    for k, p in enumerate((2, 3, 4)):
        f = torch.tensor([[1, 1, *(2 + i if i <= k else 0 for i in range(3)), 1, 1]])
        features = run.model(torch.tensor([text]), f, torch.tensor([[p]]), "two-stream")
        text[p] = int(run.model.logits(features).argmax())
    assert ours == text[2:5]


def test_random_order_samples_the_mixture(make_run):
    """Texts of two tokens against P = E_o P_o by enumeration: chi-squared."""
    run = make_run(from_options("diffusion"), "mask", vocab=3, length=3, layers=2, scale=2.0)
    V, draws = 3, 300
    sequences = torch.tensor([(1, a, b) for a, b in itertools.product(range(V), repeat=2)])

    def probability(f, p):
        f, p = torch.tensor([f]).expand(9, -1), torch.tensor([[p]]).expand(9, -1)
        return (-target_nll(run.model, sequences, f, p, "mask")[:, 0].double()).exp()

    left = probability([1, 2, 2], 1) * probability([1, 1, 2], 2)
    right = probability([1, 2, 2], 2) * probability([1, 2, 1], 1)
    p = (left + right) / 2
    assert draws * ((left - p).square() / p).sum() > 40  # the test would notice the one order alone
    seen = torch.zeros(9)
    for seed in range(draws):
        a, b = generate.generate(run, [1], 2, temperature=1.0, top_k=0, order="random", seed=seed)
        seen[a * V + b] += 1
    assert ((seen - draws * p).square() / (draws * p)).sum() < 8 + 5 * math.sqrt(16)


class Infilling(Objective):
    def decoding(self, order, given):
        return 1 + (order == 0).long()


class Backward(Objective):
    def chain(self, length):
        return torch.arange(length - 1, -1, -1)

    def left_to_right(self, length, path):
        return {"from right to left": torch.arange(length, 0, -1)[None]}


@pytest.mark.parametrize("objective", [Objective(), Backward()], ids=repr)
@pytest.mark.parametrize("order", [None, "left", "confident", "random"])
def test_what_an_objective_lacks_for_writing_is_named(objective, order, make_run):
    with pytest.raises(BadInput, match="`decoding`.*`left_to_right`"):
        generate.generate(make_run(objective, "two-stream"), [1, 2], 3, order=order)


def test_what_fills_in_needs_no_left_to_right(make_run):
    run = make_run(Infilling(), "two-stream")
    assert len(generate.generate(run, [1, 2], 3)) == len(generate.generate(run, [1, 2], 3, suffix=[1])) == 3


def test_a_suffix_that_is_not_seen_is_refused(make_run):
    """Blocks behind the one that is filled in are not; a suffix within that block is."""
    run = make_run(from_options("blocks", block=4), "two-stream")
    with pytest.raises(BadInput, match="block=4 writes without seeing"):
        generate.generate(run, [1, 2], 3, suffix=[5])
    assert len(generate.generate(run, [1, 2], 2, suffix=[5])) == 2


def test_generate_command(trained):
    filled = call(f"evaluate.py generate {trained('spans --mask 0.3')} --prompt the --suffix mat. --tokens 5")
    assert filled.startswith("the") and filled.rstrip("\n").endswith("mat.")
    line = f"evaluate.py generate {trained('ar')} --samples 2 --tokens 40 --dtype fp32"
    texts = call_json(line)["texts"]
    assert len(texts) == 2 and texts[0] != texts[1] and texts == call_json(line)["texts"]
    line = f"evaluate.py generate {trained('diffusion')} --prompt 'The\x1b[2J' --tokens 5 --order random"
    assert call(line).startswith("The\\x1b[2J")                          # for a terminal to show, not to obey
    assert call_json(line)["texts"][0].startswith("The\x1b[2J")


@pytest.fixture
def run(image_way, make_run):
    return make_run(*image_way, images=True)


def some_patches(count=3):
    return torch.randn(count, 9, 48, dtype=torch.float64, generator=seeded())


def test_hidden_pixels_are_never_read(run):
    patches, hidden = some_patches(), generate.hidden_patches(3, 9, 0.5)
    filled = generate.reconstruct(run, patches, hidden)
    kept = torch.ones(3, 9, dtype=torch.bool).scatter(1, hidden, False)
    secret = patches.masked_fill(~kept[..., None], math.nan)
    assert torch.equal(generate.reconstruct(run, secret, hidden), filled)
    assert torch.equal(filled[kept], patches[kept]) and not torch.isclose(filled, patches)[~kept].any()


def test_each_prediction_has_its_own_context(run):
    """Which patches the j-th prediction depends on, by changing them one at a time: the known ones, before it
    where the objective goes from left to right. Earlier predictions pass on what they have seen."""
    patches, hidden = some_patches(1), generate.hidden_patches(1, 9, 0.4, seed=4)
    base, gaps, reached = generate.reconstruct(run, patches, hidden), hidden[0].tolist(), {}
    forward = run.objective.one_stream != "mask" and run.objective.left_to_right(9, run.path) is not None
    for target in gaps:
        context = {i for i in range(9) if (i not in gaps or i in reached) and (i < target or not forward)}
        reached[target] = set().union(*(reached.get(i, {i}) for i in context))
        for i in sorted(set(range(9)) - set(gaps))[::3]:
            other = patches.clone()
            other[0, i] += 1
            changed = not torch.equal(generate.reconstruct(run, other, hidden)[0, target], base[0, target])
            assert changed == (i in reached[target]), (target, i)


def test_at_once_is_one_pass_from_the_visible_patches(run):
    patches, hidden = some_patches(), generate.hidden_patches(3, 9, 0.75)
    if run.objective.one_stream != "mask" and run.objective.left_to_right(9, run.path):
        with pytest.raises(BadInput, match="--at-once"):
            generate.reconstruct(run, patches, hidden, at_once=True)
        return
    filled = generate.reconstruct(run, patches, hidden, at_once=True)
    for n in range(3):
        gaps = hidden[n].tolist()
        f = torch.tensor([[2 if i in gaps else 1 for i in range(9)]])
        pixels = run.model.pixels(run.model(patches[n:n + 1], f, hidden[n:n + 1], run.path))
        assert torch.allclose(filled[n, gaps], pixels[0], atol=1e-9)


def test_all_images_of_a_folder_that_was_not_trained_on(tmp_path):
    pytest.importorskip("PIL")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 64, 64, 3), np.uint8)
    for name, image in zip(("train/a", "train/b", "val/a", "val/b"), pixels):
        (tmp_path / name).mkdir(parents=True)
        write_png(tmp_path / name / "0.png", image, gap=0)
    photos, same = str(tmp_path), str(tmp_path / "train" / "..")
    other, own = (SimpleNamespace(settings=SimpleNamespace(data=data), total=2, name="run")
                  for data in ("shapes", same))
    images = generate.images_of(photos, [other], 64, 100, seed=0)
    assert {image.tobytes() for image in images.images} == {image.tobytes() for image in pixels}
    for data, runs, count in ((photos, [other], 3), (photos, [other, own], 2), (None, [own], 2)):
        assert len(generate.images_of(data, runs, 64, 3, seed=0)) == count
    own.total += 1                                             # the folder has changed since the training
    with pytest.raises(BadInput, match="trained on"):
        generate.images_of(None, [own], 64, 100, seed=0)


def test_hidden_patches_are_uniform_subsets_without_the_first():
    hidden = generate.hidden_patches(4000, 5, 0.5)
    assert hidden.shape == (4000, 2) and hidden.min() == 1 and (hidden[:, 0] < hidden[:, 1]).all()
    _, counts = hidden.unique(dim=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 4000 / 6).abs() < 4 * math.sqrt(4000 / 6)).all()


def test_measures_and_mean_colour_against_plain_formulas(make_image_model):
    config = make_image_model("causal").config
    patches, hidden = some_patches() * 0.3, torch.tensor([[1, 4], [2, 3], [7, 8]])
    filled = patches.clone()
    filled[torch.arange(3)[:, None], hidden] += 0.1 * torch.arange(1.0, 4.0)[:, None, None]
    result = generate.measures(config, patches, filled, hidden)
    assert torch.allclose(result["l2"], torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))
    x, y = ((x * 0.25 + 0.5).clamp(0, 1) for x in (patches, filled))
    assert torch.allclose(result["psnr"], 10 * (1 / (x - y).square().mean((1, 2))).log10())
    mean = generate.with_mean(patches[:1], torch.tensor([[2, 5]]))
    for c in range(3):
        expected = patches[0, [0, 1, 3, 4, 6, 7, 8], 16 * c:16 * (c + 1)].mean()
        assert torch.allclose(mean[0, [2, 5], 16 * c:16 * (c + 1)], expected)


def test_reconstruct_command_with_picture_and_lpips(trained, tmp_path, monkeypatch):
    """The same hidden patches for every checkpoint; LPIPS by a stand-in for that package."""
    distance = SimpleNamespace(eval=lambda: lambda x, y: (x - y).abs().mean(dim=(1, 2, 3), keepdim=True))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: distance))
    run, picture = trained("mlm --mask 0.75", data="shapes"), tmp_path / "grid.png"
    text, x = call_both(f"evaluate.py reconstruct {run} untrained:{run} --max-images 12 --hide 0.2 "
                        f"--lpips alex --picture {picture}")
    assert "one by one" in text and "untrained mlm 0.75 (mae)" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert 8 * 60 < int.from_bytes(picture.read_bytes()[20:24], "big") < 8 * 75
    assert (x["images"], x["hidden"], x["patches"]) == (12, 3, 16)
    mean, ours, untrained = x["rows"]
    assert ours["step"] == 20 and untrained["step"] == 0 and ours["l2"] != untrained["l2"]
    for name in ("l2", "psnr", "lpips"):
        values = np.array(ours[f"{name}_of_images"])
        assert ours[name] == pytest.approx(values.mean(), rel=1e-4) and name in mean
        assert ours[f"{name}_stderr"] == pytest.approx(values.std(ddof=1) / 12 ** 0.5, rel=1e-4)
