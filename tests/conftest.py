"""Shared by all tests: the modules' folder on the path, one thread, and a tiny Transformer whose output
matters."""
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import spectral
import train as training
from engine.runs import Run, load_checkpoint
from engine.settings import Settings, resolve
from model import SIZES, VIT_SIZES, Config, Transformer
from objectives import OBJECTIVES, choose_path, describe, flag, from_options
from support import cli
from support.cli import BadInput
from text.tokenizers import ByteTokenizer

# Options that suit 8 tokens, and 9 patches; an objective that is not listed is tested as it comes.
SMALL = {"dar": [{"t": 2}, {"t": 3}], "mlm": [{"mask": 0.3}], "vl": [{"mask": (0.2, 0.6)}],
         "mtp": [{"t": 3}], "blocks": [{"block": 3}], "spans": [{"mask": 0.4}]}
SMALL_IMAGES = {"dar": [{"t": 2}, {"t": (1, 3)}], "mlm": [{"mask": 0.6}], "vl": [{"mask": (0.3, 0.8)}],
                "segments": [{"segment": 1}]}


def ways(small, length, images=False):
    """(objective, path) for every registered objective in every architecture that can run it."""
    for name in OBJECTIVES:
        for options in small.get(name, [{}]):
            objective = from_options(name, **options)
            try:
                objective.check(length)
                paths = [choose_path(objective, streams, images) for streams in (None, 2)]
            except BadInput:  # not for this kind, or its defaults are for longer sequences
                continue
            yield from ((objective, path) for path in dict.fromkeys(paths))


def name_of(way):
    return f"{describe(way[0])} {way[1]}".replace(" ", "-")


LITTLE, TINY, VIT_TINY = {"layers": 2, "width": 32, "heads": 2}, SIZES["tiny"], VIT_SIZES["vit-tiny"]
WAYS = list(ways(SMALL, 8))
IMAGE_WAYS = list(ways(SMALL_IMAGES, 9, images=True))


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny; two threads would mostly wait for each other
    cli.EVERY = 1e6           # a slow machine leaves no lines between those that tests look at
    # What is trained in this process is smaller than its preset says. Processes of their own (torchrun, the
    # commands as a user starts them) train the real ones.
    SIZES["tiny"], VIT_SIZES["vit-tiny"] = LITTLE, {**LITTLE, "decoder": (1, 16, 2)}


@pytest.fixture
def real_sizes(monkeypatch):
    """The presets as they are."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setitem(VIT_SIZES, "vit-tiny", VIT_TINY)


def words(line):
    """A command line as its list of arguments."""
    return line.split()


def quietly(settings, out, **kwargs):
    """train.train in the way that repeats bit for bit."""
    return training.train(settings, out, device="cpu", dtype="fp32", quiet=True, **kwargs)


def flip_a_weight(path):
    """Change one bit of a weight in a checkpoint: torch.load alone would not notice."""
    weight = load_checkpoint(path)["model"]["embedding.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


def call(capsys, *argv):
    """What evaluate.py prints."""
    evaluate.main([*map(str, argv), "--device", "cpu", "--dtype", "fp32"])
    return capsys.readouterr().out


@pytest.fixture
def text(tmp_path):
    """A file of text that repeats with a period of 7 bytes: easy to learn from any context."""
    path = tmp_path / "period.txt"
    path.write_text("abcdef\n" * 3000)
    return str(path)


@pytest.fixture(scope="session")
def text_runs(tmp_path_factory):
    """Small runs on repeating text, which no test changes: {objective: folder}."""
    base = tmp_path_factory.mktemp("text-runs")
    (base / "text.txt").write_text("the cat sat on the mat. " * 400)
    for name in ("ar", "dar", "vl", "diffusion", "spans"):
        quietly(resolve(objective=name, data=str(base / "text.txt"), length=16, steps=10, batch_size=8),
                base / name)
    return {name: base / name for name in ("ar", "dar", "vl", "diffusion", "spans")}


@pytest.fixture(scope="session")
def claims(tmp_path_factory):
    """The file of `python spectral.py all --json FILE`, made once without a warning."""
    path = tmp_path_factory.mktemp("claims") / "all.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral.main(["all", "--json", str(path)]) == 0
    return path


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    """(objective, path) for text."""
    return request.param


@pytest.fixture(params=IMAGE_WAYS, ids=name_of)
def image_way(request):
    """(objective, path) for images."""
    return request.param


@pytest.fixture
def make_image_model():
    """A function that builds a ViT over 3 x 3 patches of 4 x 4 pixels, as `make_model` does for text."""

    def make(path, **kwargs):
        torch.manual_seed(0)
        model = Transformer(Config(0, 9, 3, 16, 2, patch=4, mean=(0.5,) * 3, std=(0.25,) * 3,
                                   decoder=(2, 8, 2) if path == "mae" else (), **kwargs)).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(3)
        return model

    return make


@pytest.fixture
def make_model():
    """A function that builds a small Transformer in float64 with weights several times their initial size. At
    the initial size all its outputs are nearly the same, and a test of what they depend on would prove
    nothing."""

    def make(vocab=11, length=8, layers=3, width=16, heads=2, scale=3.0, dtype=torch.float64):
        torch.manual_seed(0)
        model = Transformer(Config(vocab, length, layers, width, heads)).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(scale)
        return model

    return make


@pytest.fixture
def make_run(make_model):
    """A function that wraps such a model as the Run that evaluate.py works on."""

    def make(objective, path, **kwargs):
        model = make_model(**kwargs)
        settings = Settings(flag(objective), vars(objective), length=model.config.length, preset="tiny")
        return Run(model, objective, path, ByteTokenizer(), settings, 0, "test")

    return make
