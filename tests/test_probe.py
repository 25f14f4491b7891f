"""The linear probe against its optimality conditions and scikit-learn."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from downstream import probe


def test_logistic_regression_is_at_its_optimum():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randint(3, (200,))
    for l2 in (1.0, 1e-3):
        w = probe.logistic_regression(x, y, l2, 3)
        ones = torch.cat([x, torch.ones(200, 1, dtype=x.dtype)], dim=1)
        gradient = ones.T @ ((ones @ w).softmax(1) - F.one_hot(y, 3)) / 200
        gradient[:-1] += l2 * w[:-1]
        assert gradient.abs().max() < 1e-5 and w.abs().max() > 0.01


@pytest.mark.parametrize("classes", (2, 3, 4))
def test_extras_logistic_regression_against_scikit_learn(classes):
    """Its C is 1 / (N l2), and 2 / (N l2) for two classes."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.integers(classes, size=300)
    x[:, 0] += y
    for l2 in (0.1, 1e-3):
        C = (2 if classes == 2 else 1) / (300 * l2)
        theirs = linear_model.LogisticRegression(C=C, tol=1e-8, max_iter=2000).fit(x, y).predict_proba(x)
        w = probe.logistic_regression(torch.tensor(x), torch.tensor(y), l2, classes)
        assert np.allclose(probe.linear(torch.tensor(x), w).softmax(1), theirs, atol=1e-4)
        if classes == 2 and l2 == 0.1:  # with the other C it is another classifier
            other = linear_model.LogisticRegression(C=C / 2, tol=1e-8,
                                                    max_iter=2000).fit(x, y).predict_proba(x)
            assert abs(theirs - other).max() > 1e-2


def test_probe_on_separable_and_on_random_labels():
    torch.manual_seed(0)
    y, test_y = torch.randint(3, (400,)), torch.randint(3, (300,))
    centres = 4 * torch.randn(3, 10)
    x, test_x = centres[y] + torch.randn(400, 10), centres[test_y] + torch.randn(300, 10)
    scale = torch.logspace(-3, 3, 10)                       # standardised away
    found = probe.fit_probe(x * scale + 5, y, test_x * scale + 5, test_y.numpy())
    assert found["accuracy"] > 0.97 and found["majority"] < 0.5 and found["train"] == 400
    assert found["test"] == 300
    low, high = found["interval"]
    assert low < found["accuracy"] <= high and high - low < 0.05 and found["matthews"] > 0.95
    noise = probe.fit_probe(torch.randn(400, 10), y, torch.randn(300, 10), test_y)
    assert noise["l2"] >= 0.1 and noise["accuracy"] < 0.5 and abs(noise["matthews"]) < 0.2
    constant = probe.fit_probe(torch.ones(400, 10), y, torch.ones(300, 10), test_y)
    assert constant["accuracy"] == constant["majority"] and constant["matthews"] == 0


def test_wilson_interval_by_its_definition():
    """Both ends are shares p at which the observed share is 1.96 standard errors away."""
    for correct, n in ((0, 10), (3, 10), (10, 10), (800, 872)):
        for p in probe.wilson(correct, n):
            assert (correct / n - p) ** 2 == pytest.approx(1.959964 ** 2 * p * (1 - p) / n, abs=1e-9)
    assert probe.wilson(0, 10)[0] == 0 and probe.wilson(10, 10)[1] == pytest.approx(1)


def test_few_examples_choose_the_penalty_on_every_fifth_in_turn(monkeypatch):
    """Five of each class: every example is held out once for each strength, and never fitted while it is."""
    torch.manual_seed(0)
    y = torch.arange(10) % 2
    x = torch.randn(10, 3) + 3 * y[:, None]
    x[:, 0] = torch.arange(10)
    fitted, original = [], probe.logistic_regression

    def spy(x, y, *args):
        fitted.append({round(value) for value in (x[:, 0] * spread + mean).tolist()})
        return original(x, y, *args)

    mean, spread = 4.5, torch.arange(10.0).std()
    monkeypatch.setattr(probe, "logistic_regression", spy)
    found = probe.fit_probe(x, y, x, y)
    assert len(fitted) % 5 == 1 and fitted[-1] == set(range(10))
    for k in range(0, len(fitted) - 1, 5):
        held = [set(range(10)) - rows for rows in fitted[k:k + 5]]
        assert [len(rows) for rows in held] == [2] * 5 and set.union(*held) == set(range(10))
    assert found["train"] == 10 and len(found["correct"]) == 10
    assert probe.fit_probe(x[:2], y[:2], x, y)["train"] == 2  # one of each class
