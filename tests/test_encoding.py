"""Texts to batches, and the features of an encoder, against plain computations."""
import dataclasses

import numpy as np
import pytest
import torch
from labelled_texts import some_texts

from downstream import encoding, probe
from objectives import Autoregressive, DiversityEnhanced, from_options
from support.cli import BadInput
from support.objective import Objective
from text.tokenizers import ByteTokenizer

CPU = torch.device("cpu")


@pytest.fixture
def run(make_run):
    """A small network in float32 over bytes, sequences of 24."""
    return make_run(from_options("mlm"), "mask", vocab=257, length=24, scale=1.0, dtype=torch.float32)


def test_truncation_takes_from_the_longer_part_first():
    for m in range(8):
        for n in range(8):
            for room in range(12):
                a, b = list(range(m)), list(range(n))
                while len(a) + len(b) > room:
                    (a if len(a) > len(b) else b).pop()
                assert encoding.truncate(list(range(m)), list(range(n)), room) == (a, b), (m, n, room)
    assert encoding.truncate([1, 2, 3], None, 2) == ([1, 2], None)


def test_layout_of_single_texts_and_pairs(run):
    inputs = encoding.tokenize(run, [("ab", "c"), ("", "x" * 40)])
    assert inputs.ids[0].tolist() == [97, 98, 256, 99, 256] and inputs.segments is None
    assert inputs.ids[1].tolist() == [256] + [120] * 22 + [256] and inputs.lengths.tolist() == [5, 24]
    assert [row.tolist() for row in encoding.tokenize(run, [("ab",), ("",)]).ids] == [[97, 98, 256], [256]]
    assert encoding.tokenize(run, [("y" * 40,)]).lengths.tolist() == [24]


class Pairs(ByteTokenizer):
    """A tokenizer with a layout of its own, as BERT's."""

    @staticmethod
    def pair(a, b=None):
        ids = [1, *a, 2] + ([] if b is None else [*b, 2])
        return ids, [0] * (2 + len(a)) + [1] * (len(ids) - 2 - len(a))


def test_a_tokenizer_with_a_layout_of_its_own(run, monkeypatch):
    run = dataclasses.replace(run, tokenizer=Pairs())
    inputs = encoding.tokenize(run, [("ab", "c"), ("x" * 30, "y" * 30)])
    assert inputs.ids[0].tolist() == [1, 97, 98, 2, 99,
                                      2] and inputs.segments[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert inputs.ids[1].tolist() == [1] + [120] * 11 + [2] + [121] * 10 + [2]
    assert encoding.tokenize(run, [("x" * 30,)]).ids[0].tolist() == [1] + [120] * 22 + [2]
    batch = encoding.collate(inputs, np.array([0, 1]), 24, CPU)
    assert batch.segments[0].tolist() == [0, 0, 0, 0, 1, 1] + [0] * 18
    seen = []
    monkeypatch.setattr(run.model, "encode", lambda *args, **kwargs: seen.append(kwargs["segments"]))
    encoding.encode(run.model, batch, causal=False)
    assert torch.equal(seen[0], batch.segments)


def test_batches_hold_every_text_once_and_are_seeded():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    epochs = {(seed, epoch): encoding.batch_rows(lengths, 8, seed, epoch) for seed in (0, 1)
              for epoch in (0, 1)}
    for batches in [*epochs.values(), encoding.batch_rows(lengths, 8)]:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
    orders = {tuple(np.concatenate(batches).tolist()) for batches in epochs.values()}
    assert len(orders) == 4
    again = encoding.batch_rows(lengths, 8, 0, 1)
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[0, 1]))
    # like lengths together, but short and long batches in turn
    spans = [np.ptp(lengths[rows]) for rows in epochs[0, 0]]
    assert np.mean(spans) < 10
    assert np.ptp([lengths[rows].mean() for rows in epochs[0, 0][:20]]) > 50


def test_batches_are_padded_to_fixed_lengths():
    assert [encoding.padded_length(n, 128) for n in (1, 8, 9, 33, 64, 65, 97, 128)] == [8, 8, 16, 48, 64, 96,
                                                                                        128, 128]
    assert encoding.padded_length(50, 60) == 60 and encoding.padded_length(600, 1024) == 1024


def test_collate(run):
    inputs = encoding.tokenize(run, [("ab",), ("abcdefghi",), ("",)])
    batch = encoding.collate(inputs, np.array([1, 2, 0]), 24, CPU)
    assert batch.tokens.shape == (3, 16) and batch.lengths.tolist() == [10, 1, 3] and batch.segments is None
    for row, i in enumerate((1, 2, 0)):
        n = inputs.lengths[i]
        assert batch.tokens[row, :n].tolist() == inputs.ids[i].tolist()
        assert batch.padding[row].tolist() == [False] * n + [True] * (16 - n)
    assert encoding.collate(encoding.tokenize(run, [("a" * 7,)]), np.array([0]), 24, CPU).padding is None


@pytest.mark.parametrize("pool", encoding.POOLS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_the_features(make_run, pool, causal):
    """Features in a padded batch against each text alone, pooled by hand."""
    run = make_run(from_options("mlm"), "mask", vocab=257, length=24, dtype=torch.float32)
    inputs = encoding.tokenize(run, some_texts(20))
    features = probe.frozen_features(run, inputs, pool, causal, "all", size=7)
    last = probe.frozen_features(run, inputs, pool, causal)
    assert list(features) == [0, 1, 2, 3] and torch.allclose(last["last"], features[3], atol=1e-4)
    assert torch.allclose(probe.frozen_features(run, inputs, pool, causal, 2)[2], features[2], atol=1e-4)
    for i, ids in enumerate(inputs.ids):
        states = run.model.encode(torch.tensor(ids[None], dtype=torch.long), None, causal, every_layer=True)
        for layer, state in enumerate(states):
            x = {"mean": state[0].mean(0), "last": state[0, -1], "first": state[0, 0]}[pool]
            assert torch.allclose(features[layer][i], x, atol=1e-4)
    with pytest.raises(BadInput, match="--layer 4 is not in 0..3"):
        probe.frozen_features(run, inputs, pool, causal, 4)


def test_attention_and_pooling_by_objective(way, make_run):
    """The objective's own attribute says how its network is probed, whatever class it has."""
    objective, path = way
    run = make_run(objective, path)
    expected = ("causal", "last") if objective.attention == "causal" else ("full", "mean")
    assert encoding.attention_and_pool(run) == expected
    if type(objective) in (Autoregressive, DiversityEnhanced):
        assert expected == ("causal", "last")
    assert encoding.attention_and_pool(run, "full") == ("full", "mean")
    assert encoding.attention_and_pool(run, "causal", "mean") == ("causal", "mean")
    with pytest.raises(BadInput, match="--pool first"):
        encoding.attention_and_pool(run, "causal", "first")
    images = dataclasses.replace(run, tokenizer=None)
    assert encoding.attention_and_pool(images) == (expected[0], "mean")


@dataclasses.dataclass(frozen=True)
class OnlyThePast(Objective):
    """A new left-to-right objective, which is none of those of the paper."""

    attention = "causal"


def test_a_new_objective_says_how_it_is_probed(make_run):
    run = dataclasses.replace(make_run(from_options("mlm"), "mask"), objective=OnlyThePast())
    assert encoding.attention_and_pool(run) == ("causal", "last")
