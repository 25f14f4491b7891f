"""What bench.py times is a whole training step, in turn with the others; FLOPs, memory and peers are what it
says."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import words

import bench
from engine.settings import resolve
from engine.steps import make_optimizer
from experiments import gpu, speed
from experiments.peers import make_peer, peer_inputs
from experiments.speed import (
    Case,
    counted_flops,
    doubled,
    in_turn,
    make_draw,
    set_up,
    speed_ratio,
    step_flops,
)
from model import SIZES, Config, Transformer
from objectives import choose_path, from_options, loss_sum
from support.cli import BadInput

CPU = torch.device("cpu")


def text(
    objective,
    streams=None,
    vocab=23,
    length=8,
    layers=2,
    width=16,
    heads=2,
    batch=3,
    dtype=torch.float32,
    **options,
):
    objective = from_options(objective, **options)
    return Case(
        objective, choose_path(objective, streams), Config(vocab, length, layers, width, heads), batch, dtype
    )


def image(mask=0.75, batch=3):
    config = Config(
        0,
        length=16,
        layers=2,
        width=16,
        heads=2,
        patch=4,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        decoder=(2, 8, 2),
    )
    return Case(from_options("mlm", mask=mask), "mae", config, batch, torch.float32)


CASES = {
    "ar": text("ar"),
    "dar": text("dar", t=2),
    "mlm": text("mlm", mask=0.3),
    "vl": text("vl", mask=(0.2, 0.5)),
    "mae": image(),
}


def test_functions_run_in_turn():
    calls = []
    values = in_turn({name: lambda name=name: calls.append(name) or len(calls) for name in "ABC"}, rounds=3)
    assert "".join(calls) == "ABCABCABC"
    assert values == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}


@pytest.mark.parametrize("name", CASES)
def test_a_timed_step_is_a_whole_training_step(name):
    """The weights after three timed steps are those of a plain loop over the same batches."""
    case = CASES[name]
    run, model = set_up(case, CPU)
    assert run(1) > 0 and run(2) > 0
    torch.manual_seed(0)
    plain = Transformer(case.config)
    start = [p.clone() for p in plain.parameters()]
    settings, draw = resolve(optimizer="adamw"), make_draw(case)
    optimizer = make_optimizer(plain, settings)
    for _ in range(3):
        batch, count = draw()
        assert count == batch.weight.sum()
        optimizer.zero_grad()
        (loss_sum(plain, batch, case.path) / count).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip)
        optimizer.step()
    for timed, expected, first in zip(model.parameters(), plain.parameters(), start):
        torch.testing.assert_close(timed, expected)
        assert expected.grad is None or not torch.equal(timed, first)


def test_the_clock_covers_every_step(monkeypatch):
    """A loop of n steps reports the time of one, and counts the batches: one more than the steps, drawn
    ahead."""
    ticks, drawn, batch = iter([10.0, 16.0]), [], make_draw(CASES["ar"])()
    monkeypatch.setattr(speed, "make_draw", lambda case: lambda: drawn.append(1) or batch)
    run, _ = set_up(CASES["ar"], CPU, clock=lambda: next(ticks))
    assert run(4) == 1.5 and len(drawn) == 5


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_pytorch_counts(name):
    """The formula against the products that really run, to the last one. For images it counts every product
    three times, but the gradient of the input pixels is not computed."""
    case = CASES[name]
    c = case.config
    counted = case.batch * counted_flops(replace(case, batch=1), Transformer(c))
    assert step_flops(case) == counted + (2 * case.batch * c.length * c.values * c.width if c.patch else 0)


def test_doubling_changes_one_thing():
    case = text("ar", length=16, width=32, heads=4)
    for what, larger in doubled(case).items():
        changed = {
            name for name in vars(case.config) if getattr(case.config, name) != getattr(larger.config, name)
        }
        if what == "batch":
            assert (
                not changed and larger.batch == 2 * case.batch and step_flops(larger) == 2 * step_flops(case)
            )
        else:
            assert changed == {"width": {"width", "heads"}}.get(what, {what}) and larger.batch == case.batch
            assert 1.5 < step_flops(larger) / step_flops(case) < 4
    picture = image()
    assert doubled(picture)["image side"].config.size == 2 * picture.config.size


def test_ratios_are_of_medians_and_show_the_range():
    a, b = (
        {
            "name": name,
            "dtype": "fp32",
            "ms_per_step": ms[1],
            "ms_rounds": ms,
            "peak_memory": memory,
            "flops_per_step": flops,
        }
        for name, ms, memory, flops in (("a", [2.0, 4.0, 10.0], 50, 3), ("b", [6.0, 8.0, 10.0], 100, 6))
    )
    r = speed_ratio(a, b)
    assert (r["speed"], r["speed_low"], r["speed_high"], r["memory"], r["flops"]) == (2.0, 1.0, 3.0, 0.5, 0.5)
    assert speed_ratio({**a, "peak_memory": None}, b)["memory"] is None


@pytest.fixture
def quick(monkeypatch):
    """Short rounds, and a small matrix product for the peak."""
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "SQUARES", {True: (256,)})


def test_command_line_writes_all_fields(tmp_path, capsys, quick):
    """Also that memory is measured: weights, gradients and two moments take 16 bytes for each parameter."""
    out = tmp_path / "bench.json"
    argv = [
        *words("--objectives ar --layers 1 --width 128 --heads 2 --length 8 --batch-size 2 --vocab 16384 "
        "--rounds 2 --device cpu --dtype fp32 --json"), str(out)]
    assert bench.main(argv) == 0
    content = json.loads(out.read_text())
    assert content["command"] == "bench.py" and content["threads"] == torch.get_num_threads()
    assert content["settings"]["length"] == 8 and content["matrix_product_flops"]["fp32"] > 1e9
    [r] = content["results"]
    assert (r["name"], r["path"], r["dtype"], r["peer"], r["compiled"]) == (
        "ar",
        "causal",
        "fp32",
        "",
        False,
    )
    assert len(r["ms_rounds"]) == 2 and min(r["ms_rounds"]) <= r["ms_per_step"] <= max(r["ms_rounds"])
    assert r["tokens_per_second"] == pytest.approx(2 * 8 / r["ms_per_step"] * 1e3)
    assert r["mfu"] == pytest.approx(
        r["flops_per_step"] / r["ms_per_step"] * 1e3 / content["matrix_product_flops"]["fp32"]
    )
    assert r["first_step_seconds"] > 0 and 0 < r["mfu"] < 1
    assert 16 * r["parameters"] < r["peak_memory"] < 16 * r["parameters"] + 100e6
    assert "ar fp32" in capsys.readouterr().out


def test_command_line_compares_and_doubles(capsys, monkeypatch, quick):
    monkeypatch.setattr(speed, "cpu_memory", lambda case: 1000 * case.batch)
    bench.main([
        *words("--objectives ar,vl --mask 0.2,0.4 --layers 1 --width 16 --heads 2 --length 8 --batch-size 2 "
        "--vocab 50 --rounds 2 --device cpu --dtype bf16,fp32 --scaling --json -")])
    content = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["dtype"]) for r in content["results"][:4]] == [
        ("ar", "bf16"),
        ("ar", "fp32"),
        ("vl 0.2,0.4", "bf16"),
        ("vl 0.2,0.4", "fp32"),
    ]
    assert [(r["name"], r["other"], r["dtype"], r["other_dtype"]) for r in content["against_causal"]] == [
        ("vl 0.2,0.4", "ar", dtype, dtype) for dtype in ("bf16", "fp32")
    ]
    assert len(content["scaling"]) == 4 * 4 and len(content["results"]) == 4 + 16
    for g in content["scaling"]:
        assert g["time"] > 0 and g["memory"] == (2 if g["doubled"] == "batch" else 1)


@pytest.mark.parametrize("flag, options, name", [("dar", ["--t", "3"], "dar t=3"), ("vl", [], "vl 0.15,0.3")])
def test_the_share_of_the_loop_is_that_of_its_log_after_the_start(flag, options, name, quick, capsys,
                                                                  monkeypatch):
    """A bare step of 2 s against a log of 10 s for the first ten steps and 2.5 s for each later one; the same
    sizes."""
    seen = {}

    def train(settings, out, **machine):
        seen["train"], lines = settings, range(10, settings.steps + 1, 10)
        with open(f"{out}/metrics.jsonl", "w") as file:
            file.writelines(
                json.dumps({"step": step, "seconds": 10 + 2.5 * (step - 10)}) + "\n" for step in lines
            )
            file.write(json.dumps({"step": settings.steps, "val_loss": 1.0}) + "\n")

    def prepare(case, device):
        seen["bare"] = case
        return (lambda steps: 2.0), None

    real = speed.set_up
    monkeypatch.setattr(speed, "train", train)
    monkeypatch.setattr(speed, "cpu_memory", lambda case: None)
    monkeypatch.setattr(
        speed, "set_up", lambda case, *rest: (prepare if case.config.vocab == 257 else real)(case, *rest)
    )
    bench.main([
        "--objectives", flag, *options,
        *words("--preset tiny --length 16 --batch-size 2 --rounds 2 --device cpu --dtype fp32 --loop "
              "--json -")])
    (loop,) = json.loads(capsys.readouterr().out)["loop"]
    assert loop == {"name": name, "dtype": loop["dtype"], "share": 0.8, "rounds": [0.8, 0.8]}
    settings, case = seen["train"], seen["bare"]
    assert (settings.objective, settings.preset, settings.length, settings.batch_size) == (
        flag,
        "tiny",
        16,
        2,
    )
    assert settings.task()[0] == case.objective
    assert (case.config.length, case.config.layers, case.batch) == (16, SIZES["tiny"]["layers"], 2)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--objectives", "ar,gpt"], "gpt"),
        (["--dtype", "fp64"], "fp64"),
        (["--t", "3", "--objectives", "ar"], "--t belongs to dar"),
        (["--mask", "0.3", "--objectives", "vl"], "--mask 0.3"),
        (["--preset", "vit-tiny", "--size", "30"], "--size 30"),
        (["--json", "/nowhere/x.json"], "/nowhere"),
        (["--width", "30"], "30"),
        (["--length", "1"], "1"),
        (["--rounds", "0"], "0"),
        (["--loop", "--width", "32"], "--width"),
        (["--loop", "--clock", "cpu"], "--clock cpu"),
    ],
)
def test_bad_input_is_refused_in_one_line(argv, words):
    with pytest.raises(BadInput) as error:
        bench.main([*argv, "--device", "cpu"])
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- peers


def peer(name, scale=1.0):
    """A peer's case, its model in float32 with larger weights, so that its output depends on its input, and a
    batch."""
    pytest.importorskip("transformers")
    case = replace(CASES[name], peer="transformers")
    torch.manual_seed(0)
    model = make_peer(case)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    batch, _ = make_draw(case)()
    return case, model, batch


def test_extras_peers_have_the_size_that_is_claimed():
    """Parameter counts by hand: same width, depth, vocabulary; feed-forward 4 x width; no dropout."""
    D, L, V, S = 16, 2, 23, 8
    # q, k, v, out; D -> 4 D -> D; biases; two norms
    layer = 12 * D * D + 13 * D
    ours = sum(p.numel() for p in Transformer(CASES["ar"].config).parameters())
    # GEGLU at 2 D is six of the ten, here eight of twelve
    assert ours == V * D + L * (10 * D * D + 2 * D) + 3 * D + 1
    sizes = {
        "ar": V * D + S * D + L * layer + 2 * D,
        "mlm": V * D + S * D + 2 * D + 2 * D + L * layer + D * D + D + 2 * D + V,
        # segments; the head's extra layer
        "dar": V * D + D + V + L * (layer + D * D - 4 * D + 3 * D + 2 * D),
    }  # + positions' keys; other biases
    for name, size in sizes.items():
        case, model, batch = peer(name)
        assert sum(p.numel() for p in model.parameters()) == size
        inputs = peer_inputs(batch, case)
        model.train()
        assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    attention = {name: peer(name)[1].config._attn_implementation for name in CASES}
    assert attention == {"ar": "sdpa", "mlm": "sdpa", "vl": "sdpa", "mae": "sdpa", "dar": "eager"}


@pytest.mark.parametrize("name", ["ar", "dar", "mlm", "vl"])
def test_extras_peers_score_the_same_targets(name):
    """The loss they train on is the mean over exactly this batch's targets of -log P of their true ids."""
    case, model, batch = peer(name, 5.0)
    logits = model(**peer_inputs(batch, case)).logits
    nll = []
    for b in range(case.batch):
        for k, (position, label) in enumerate(zip(batch.targets[b].tolist(), batch.labels[b].tolist())):
            if batch.groups[b, position] > 1:
                row = {"causal": position - 1, "mask": position, "two-stream": k}[case.path]
                nll.append(F.cross_entropy(logits[b, row], torch.tensor(label)))
    assert len(nll) == batch.weight.sum()
    torch.testing.assert_close(model(**peer_inputs(batch, case)).loss, torch.stack(nll).mean())


def test_extras_xlnet_predictions_see_their_groups_context_and_nothing_else():
    """Whether a prediction changes with a token, for every pair, against 0 < f(j) < f(i)."""
    case, model, batch = peer("dar", 8.0)
    model.eval()
    assert set(batch.groups[:, 1].tolist()) == {1, 2}, "both sizes of the first group should occur"
    with torch.no_grad():
        logits = model(**peer_inputs(batch, case)).logits
        for j in range(case.config.length):
            tokens = batch.tokens.clone()
            tokens[:, j] = (tokens[:, j] + 1) % case.config.vocab
            other = model(**peer_inputs(batch._replace(tokens=tokens), case)).logits
            changed = (other != logits).any(-1)  # (B, n)
            context = batch.groups[:, j : j + 1] < batch.groups.gather(1, batch.targets)
            assert torch.equal(changed | (batch.weight == 0), context | (batch.weight == 0))


def test_extras_mae_peer_hides_as_many_patches():
    case, model, batch = peer("mae")
    c, seen = case.config, []
    model.vit.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    out = model(**peer_inputs(batch, case))
    assert seen == [(case.batch, 1 + batch.given.shape[1], c.width)]  # and a class token
    assert torch.equal(out.mask.sum(1), batch.weight.sum(1)) and out.logits.shape == (
        case.batch,
        c.length,
        c.values,
    )
    decoder = model.decoder.decoder_layers
    assert (
        len(decoder),
        model.decoder.decoder_embed.out_features,
        model.config.decoder_num_attention_heads,
    ) == c.decoder
    assert model.config.decoder_intermediate_size == 4 * c.decoder[1]


def test_extras_peers_and_flops(capsys, monkeypatch, quick):
    """One objective against its peer in both precisions; the peer's FLOPs by hand."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(speed, "cpu_memory", lambda case: 2000 if case.peer else 1000)
    bench.main([
        *words("--objectives ar --layers 2 --width 16 --heads 2 --length 8 --batch-size 2 --vocab 23 "
        "--rounds 2 --device cpu --dtype fp32,bf16 --peers --json -")])
    content = json.loads(capsys.readouterr().out)
    pairs = [(r["dtype"], r["other_dtype"]) for r in content["ratios"]]
    assert pairs == [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]
    D, L, V, S, B = 16, 2, 23, 8, 2
    flops = 6 * B * (L * (S * 12 * D * D + S * S * D) + S * D * V)
    for r in content["results"]:
        assert not r["peer"] or r["name"] == "GPT2LMHeadModel" and r["flops_per_step"] == flops
    assert all(r["memory"] == 0.5 and r["flops"] < 1 for r in content["ratios"])


def nanogpt(folder):
    """A stand-in for a clone of nanoGPT: a model.py with its interface."""
    folder.mkdir()
    (folder / "model.py").write_text("""
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
""")
    return folder


def test_nanogpt_is_a_peer_of_the_causal_path_and_scores_the_next_tokens(tmp_path, capsys, monkeypatch,
                                                                        quick):
    monkeypatch.setattr(speed, "cpu_memory", lambda case: 1)
    folder = nanogpt(tmp_path / "nanoGPT")
    case = replace(CASES["ar"], peer=str(folder))
    model, (batch, count) = make_peer(case), make_draw(case)()
    logits = model.table(batch.tokens)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(speed.make_loss(case)(model, batch, "causal"), expected)
    compiled = torch.compile(speed.make_loss(case), backend="eager")
    torch.testing.assert_close(compiled(model, batch, "causal"), expected)
    assert count == batch.tokens[:, 1:].numel() and capsys.readouterr().out == ""
    bench.main([
        *words("--objectives ar,mlm --layers 1 --width 16 --heads 2 --length 8 --vocab 23 --batch-size 2 "
        "--rounds 2 --device cpu --dtype fp32 --peer-nanogpt"), str(folder), "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in found["results"]] == ["ar", "mlm 0.15", "nanoGPT"]
    assert [(r["name"], r["other"]) for r in found["ratios"]] == [("ar", "nanoGPT")]
    with pytest.raises(BadInput, match="no model.py"):
        make_peer(replace(case, peer=str(tmp_path)))


def test_extras_the_report_for_a_gpu_runs_every_section_here_too(tmp_path, capsys, monkeypatch, quick):
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    monkeypatch.setattr(speed, "cpu_memory", lambda case: 1)
    monkeypatch.setattr(gpu, "loop_share", lambda *args, **kwargs: [0.9, 1.0, 0.95])
    monkeypatch.setattr(gpu, "time_cases", lambda cases, device, rounds: speed.time_cases(cases, device, 1))
    monkeypatch.setattr(gpu, "SIZES", {name: {"layers": 1, "width": 32, "heads": 2} for name in gpu.SIZES})
    out = tmp_path / "gpu.json"
    bench.main(["--report", str(out), "--device", "cpu", "--minutes", "30"])
    found = json.loads(out.read_text())["sections"]
    assert len(found) == 9 and not [
        title for title, content in found.items() if {"failed", "left_out"} & set(content)
    ]
    assert found["two streams, long sequences: FlexAttention against the dense mask"]["times_as_fast"] > 0
    assert found["decoding JPEG files"]["images_per_second"] > 0
    assert "MAE" in capsys.readouterr().out
    bench.main(["--report", str(out), "--device", "cpu", "--minutes", "0"])  # the first begins in any case
    assert [
        "no time left" in str(content) for content in json.loads(out.read_text())["sections"].values()
    ] == [True] * 9
