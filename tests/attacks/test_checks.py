"""The checks call out models that hide their gradient, each in its own way, and not a plain one."""

import copy

import pytest
import torch
from networks import samples, trained
from torch import nn

import cmr_fast as cf
from cmr_fast.attacks import checks
from cmr_fast.errors import InputError

EPS = 8 / 255


@pytest.fixture(scope="module")
def surrogate():
    return trained(seed=5)


@pytest.fixture(scope="module")
def many():
    return samples(50, seed=21)


class Masked(nn.Module):
    """Deliberately gradient-masked: inputs are rounded to 16 levels, which has a derivative of zero."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 15).round() / 15)


def test_a_plain_model_is_not_called_out(model, surrogate, many):
    findings = checks.masking(model, *many, eps=EPS, surrogate=surrogate)
    assert len(findings) == 7
    assert not [str(f) for f in findings if f.suspicious]


def test_a_masked_model_is_called_out(model, surrogate, many):
    """It looks robust to PGD, and is not: a copy of the model inside it is a surrogate that breaks it."""
    x, y = many
    masked = Masked(model)
    pgd = checks.accuracy(cf.attacks.PGD(masked, EPS, EPS / 4, 20), x, y)
    assert pgd > 0.9
    findings = {f.name: f for f in checks.masking(masked, x, y, eps=EPS, surrogate=copy.deepcopy(model))}
    for name in ("zero gradient", "large eps", "black box", "loss against step"):
        assert findings[name].suspicious, str(findings[name])
    for name in ("random output", "softmax given"):
        assert not findings[name].suspicious, str(findings[name])
    assert findings["zero gradient"].numbers["share"] == 1
    assert findings["black box"].numbers["Transfer"] < pgd - 0.1


def test_a_masked_model_is_called_out_without_a_surrogate(model, many):
    """The local search asks for scores alone, and finds what PGD does not."""
    masked, found = (checks.black_box(m, *many, eps=0.1) for m in (Masked(model), model))
    assert masked.suspicious and masked.numbers["LocalSearch"] < masked.numbers["PGD"] - 0.1, str(masked)
    assert not found.suspicious, str(found)


def test_saturated_logits_are_a_zero_gradient(model, many):
    def loud(z):
        return 1e5 * model(z)

    model.eval()
    found = checks.zero_gradient(loud, *many)
    model.train()
    assert found.suspicious and found.numbers["share"] > 0.5
    assert not checks.zero_gradient(model, *many).suspicious


def test_random_and_softmax(model, many):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    before = torch.get_rng_state()
    found = checks.random_output(nn.Sequential(Noisy(), model), *many)
    assert found.suspicious and found.numbers["apart"] > 1e-3
    assert torch.equal(before, torch.get_rng_state())
    assert checks.softmax_given(nn.Sequential(model, nn.Softmax(1)), *many).suspicious
    assert not checks.softmax_given(model, *many).suspicious


def test_too_few_steps_have_no_plateau(model, many):
    assert checks.plateau(model, *many, eps=1.0, steps=5).numbers["tail"] > 0.05
    assert not checks.plateau(model, *many, eps=EPS).suspicious


def test_more_steps_that_are_weaker_are_called_out(model, many, monkeypatch):
    """An attack that gives up what it has found: its accuracy rises with the steps."""
    left = iter([0.2, 0.5, 0.5])
    monkeypatch.setattr(checks, "accuracy", lambda *a: next(left))
    assert checks.more_steps(model, *many).suspicious
    left = iter([0.5, 0.2, 0.2])
    assert not checks.more_steps(model, *many).suspicious


def test_findings_read_as_sentences_and_bad_input(model, many):
    x, y = many
    found = checks.softmax_given(model, x, y)
    assert str(found) == "fine: softmax given: outputs are no probabilities"
    with pytest.raises(InputError, match="at least one sample"):
        checks.random_output(model, x[:0], y[:0])
    with pytest.raises(InputError, match="surrogate or attacks"):
        checks.black_box(model, x, y, norm="l2", eps=0.5)
