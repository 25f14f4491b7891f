"""Shared by all tests: the modules' folder on the path, one thread, and a tiny Transformer whose output matters."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.runs import Run
from engine.settings import Settings
from model import Config, Transformer
from objectives import choose_path, from_options
from text.tokenizers import ByteTokenizer

# objective options, streams
WAYS = [
    ({"objective": "ar"}, 1), ({"objective": "ar"}, 2),
    ({"objective": "dar", "t": 1}, 2), ({"objective": "dar", "t": 2}, 2), ({"objective": "dar", "t": 3}, 2),
    ({"objective": "mlm", "mask": 0.3}, 1), ({"objective": "mlm", "mask": 0.3}, 2),
    ({"objective": "vl", "mask": (0.2, 0.6)}, 1), ({"objective": "vl", "mask": (0.2, 0.6)}, 2),
    ({"objective": "permutation"}, 2), ({"objective": "prefix"}, 2),
]

IMAGE_WAYS = [
    ({"objective": "ar"}, 1), ({"objective": "ar"}, 2), ({"objective": "dar", "t": 2}, 2), ({"objective": "dar", "t": (1, 3)}, 2),
    ({"objective": "mlm", "mask": 0.6}, 1), ({"objective": "mlm", "mask": 0.6}, 2),
    ({"objective": "vl", "mask": (0.3, 0.8)}, 1), ({"objective": "vl", "mask": (0.3, 0.8)}, 2), ({"objective": "permutation"}, 2),
]


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny; two threads would mostly wait for each other


def name_of(way):
    options, streams = way
    return "-".join(str(value) for value in options.values()) + f"-streams{streams}"


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    """(objective, path) for every objective in every architecture that can run it."""
    options, streams = request.param
    objective = from_options(**options)
    return objective, choose_path(objective, streams)


@pytest.fixture(params=IMAGE_WAYS, ids=name_of)
def image_way(request):
    """(objective, path) for images."""
    options, streams = request.param
    objective = from_options(**options)
    return objective, choose_path(objective, streams, images=True)


@pytest.fixture
def make_image_model():
    """A function that builds a ViT over 3 x 3 patches of 4 x 4 pixels in float64, for the same reason with large weights."""

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
    """A function that builds a small Transformer in float64 with weights several times their initial size. At the
    initial size all its outputs are nearly the same, and a test of what they depend on would prove nothing."""

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
        settings = Settings(length=model.config.length)
        return Run(model, objective, path, ByteTokenizer(), settings, 0, "test")

    return make
