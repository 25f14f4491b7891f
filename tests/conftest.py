"""Shared by all tests: commands run in this process, small data, small runs trained once, and tiny models."""

import contextlib
import importlib
import io
import json
import random
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import SIZES, Config, Transformer
from objectives import OBJECTIVES, choose_path, describe, from_options
from util import BadInput


@pytest.fixture(autouse=True)
def registry():
    """Objectives that a test registers are gone after it."""
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


LITTLE = {"layers": 2, "width": 32, "heads": 2}

# Options that suit 8 tokens and 9 patches; an objective that is not listed is tested as it comes.
SMALL = {"dar": [{"t": 2}, {"t": 3}], "mlm": [{"mask": 0.3}], "vl": [{"mask": (0.2, 0.6)}], "mtp": [{"t": 3}],
         "blocks": [{"block": 3}], "spans": [{"mask": 0.4}]}
SMALL_IMAGES = {"dar": [{"t": 2}, {"t": (1, 3)}], "mlm": [{"mask": 0.6}], "vl": [{"mask": (0.3, 0.8)}],
                "segments": [{"segment": 1}]}


def ways(small, length, images=False):
    """(objective, path) for every registered objective on every path that can run it."""
    for name in OBJECTIVES:
        for options in small.get(name, [{}]):
            objective = from_options(name, **options)
            try:
                objective.check(length)
                paths = [choose_path(objective, streams, images) for streams in (None, 2)]
            except BadInput:  # its options are for longer sequences, or for images
                continue
            yield from ((objective, path) for path in dict.fromkeys(paths))


def name_of(way):
    return f"{describe(way[0])} {way[1]}".replace(" ", "-")


WAYS = list(ways(SMALL, 8))
LEFT_TO_RIGHT = [way for way in WAYS if way[0].left_to_right(8, way[1])]
IMAGE_WAYS = list(ways(SMALL_IMAGES, 9, images=True))


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    """(objective, path) for text."""
    return request.param


@pytest.fixture(params=LEFT_TO_RIGHT, ids=name_of)
def exact_way(request):
    """The same where texts have an exact likelihood."""
    return request.param


@pytest.fixture(params=IMAGE_WAYS, ids=name_of)
def image_way(request):
    """(objective, path) for images."""
    return request.param


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny; two threads would wait for each other
    # What is trained in this process is smaller than its preset. Processes of their own train the real sizes.
    SIZES["tiny"], SIZES["vit-tiny"] = LITTLE, {**LITTLE, "decoder": (1, 16, 2)}


# ---------------------------------------------------------------------------- commands

def call(line):
    """Run a command line of the project in this process, say "evaluate.py bound RUN" -> what it prints."""
    name, *argv = shlex.split(str(line))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(name.removesuffix(".py")).main(argv)
    return out.getvalue()


def call_json(line):
    """The object that a command writes with --json."""
    return json.loads(call(f"{line} --json -"))


def call_both(line):
    """What a command prints, and the object that it writes to a file with --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        return call(f"{line} --json {path}"), json.loads(path.read_text())


def logged(run):
    """The lines that training logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- data and runs

WORDS = "the cat sat on a mat while rain fell and nobody saw how quiet streets turned to light under trees"


def sentence(rng, count):
    return " ".join(rng.choice(WORDS.split()) for _ in range(count)).capitalize() + "."


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder of 24 text files."""
    folder, rng = tmp_path_factory.mktemp("data") / "books", random.Random(7)
    folder.mkdir()
    for i in range(24):
        text = "\n".join(sentence(rng, rng.randint(4, 12)) for _ in range(40))
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A table of 160 texts, half of them with the label pos."""
    path, rng = tmp_path_factory.mktemp("data") / "reviews.csv", random.Random(8)
    ends = ('dreadful",neg', 'lovely",pos')
    rows = [f'"{sentence(rng, 5)} {ends[i % 2]}' for i in range(160)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.fixture(scope="session")
def trained(books, tmp_path_factory):
    """A function of an objective's flags that trains a small run once -> its folder. No test changes it.

    trained("mlm --mask 0.3"), trained("ar --streams 2", data="shapes"), trained("ar", extra="--steps 40")
    """
    folders = {}

    def train(flags, data=None, extra=""):
        key = (flags, data, extra)
        if key not in folders:
            out = tmp_path_factory.mktemp("runs") / "run"
            size = "--size 32 --patch 8" if data == "shapes" else "--length 32"
            size = "" if str(data).startswith("toy") else size
            call(f"train.py --objective {flags} --data {data or books} {size} --steps 20 --batch-size 8 "
                 f"--seed 3 --device cpu --dtype fp32 --threads 1 --no-report {extra} --out {out}")
            folders[key] = out
        return folders[key]

    return train


# ---------------------------------------------------------------------------- models

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(model, scale):
    """At its initial size all outputs of a model are nearly the same, and a test of what they depend on would
    prove nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model.eval()


@pytest.fixture
def make_model():
    """A function that builds a small Transformer, in float64 unless told, whose output matters."""

    def make(vocab=11, length=8, layers=3, width=16, heads=2, scale=3.0, dtype=torch.float64):
        torch.manual_seed(0)
        return scaled(Transformer(Config(vocab, length, layers, width, heads)).to(dtype), scale)

    return make


@pytest.fixture
def make_image_model():
    """The same over 3 x 3 patches of 4 x 4 pixels."""

    def make(path, **kwargs):
        torch.manual_seed(0)
        config = Config(0, 9, 3, 16, 2, patch=4, mean=(0.5,) * 3, std=(0.25,) * 3,
                        decoder=(2, 8, 2) if path == "mae" else (), **kwargs)
        return scaled(Transformer(config).double(), 3.0)

    return make


@pytest.fixture
def make_run(make_model, make_image_model):
    """A function that wraps such a model as the Run that evaluation works on."""
    from data import ByteTokenizer
    from objectives import flag
    from run import Run, Settings

    def make(objective, path, images=False, **kwargs):
        model = make_image_model(path, **kwargs) if images else make_model(**kwargs)
        settings = Settings(flag(objective), vars(objective), length=model.config.length,
                            preset="vit-tiny" if images else "tiny")
        return Run(model, objective, path, None if images else ByteTokenizer(), settings, 0, "test")

    return make
