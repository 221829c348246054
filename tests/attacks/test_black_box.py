"""Attacks without the victim's gradient: local search, transfer, torchattacks' Square and FAB."""

import copy
import sys

import pytest
import torch
from networks import trained
from test_pgd_attacks import assert_same, state_of
from torch import nn

import cmr_fast as cf
from cmr_fast.errors import InputError

attacks = cf.attacks


@pytest.fixture(scope="module")
def other():
    return trained(seed=5)


class Blind(nn.Module):
    """Answers, but has no gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.detach())


def right(model, x, y):
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(x).argmax(1) == y).float().mean().item()


def test_local_search_needs_no_gradient(model, data):
    x, y = data
    before = state_of(model)
    adv, info = attacks.LocalSearch(Blind(model), rounds=40)(x, y, return_info=True)
    assert_same(before, state_of(model))
    assert right(model, x, y) > 0.9 and right(model, adv, y) < 0.3
    assert torch.equal(copy.deepcopy(model).eval()(adv).argmax(1) != y, info.success)
    changed = (adv != x).any(1).flatten(1).sum(1)
    assert changed.max() <= 64 and changed.min() < 48
    assert adv.min() >= 0 and adv.max() <= 1
    assert info.losses.shape == (40, 24) and (info.losses[-1] > info.losses[0]).float().mean() > 0.9


def test_local_search_follows_the_algorithm():
    """One round on a model whose score is one pixel: that pixel, and no other, becomes r I, wrapped."""
    weight = torch.zeros(2, 3 * 25)
    weight[0, 12::25] = 1.0  # class 0 lives at pixel (2, 2)

    def only(z):
        return z.flatten(1) @ weight.T

    x = torch.full((1, 3, 5, 5), 0.6)
    x[:, 1] = 0.9
    adv = attacks.LocalSearch(only, rounds=1, t=1, p=-1 + 1.5, candidates=25)(x, torch.tensor([0]))
    moved = (adv != x).any(1).flatten()
    assert moved.sum() == 1  # of the first candidates, 10 % of 25 pixels, one
    at = moved.nonzero()[0, 0]
    want = torch.tensor([0.65, 0.5 + 0.6 - 1, 0.65])  # 1.5 * 0.4 = 0.6 is above 1/2 and wraps
    torch.testing.assert_close(adv.flatten(2)[0, :, at], want)


def test_local_search_tries_one_pixel_at_a_time(model, data):
    x, y = data[0][:3], data[1][:3]
    atk = attacks.LocalSearch(model, p=10.0, batch=7)
    places = torch.stack([torch.randperm(64)[:11] for _ in range(3)])
    with atk.victim.prepare(x) as victim:
        problem = atk._problem(victim, x, y, None)
        costs = atk._costs(problem, x, places, 0.5 + 10 * (x - 0.5).sign())
        for sample in range(3):
            for i, place in enumerate(places[sample].tolist()):
                tried = x[sample : sample + 1].clone()
                row, column = divmod(place, 8)
                tried[0, :, row, column] = 0.5 + 10 * (tried[0, :, row, column] - 0.5).sign()
                want = atk.loss(victim.scores(tried), y[sample : sample + 1])
                torch.testing.assert_close(costs[sample, i : i + 1], want, rtol=1e-4, atol=1e-5)


def test_local_search_in_a_ball_sets_the_pixels_that_raise_the_loss_most(model, data):
    """One round with every pixel a candidate, against trying each of them at both faces."""
    x, y = data[0][:2], data[1][:2]
    eps, t = 0.05, 6
    atk = attacks.LocalSearch(model, eps, 1, t=t, candidates=64, success=lambda z, y: torch.zeros(len(z)).bool())
    every = torch.arange(64).expand(2, -1)
    net = copy.deepcopy(model).eval()
    with atk.victim.prepare(x) as victim, torch.no_grad():
        problem = atk._problem(victim, x, y, None)
        moved, chosen = atk._to_a_face(problem, x, every, torch.ones_like(every, dtype=torch.bool))
        for sample in range(2):
            one, label = x[sample : sample + 1], y[sample : sample + 1]
            losses = {}
            for place in range(64):
                for sign in (1, -1):
                    tried = one.clone()
                    face = (one + sign * eps).clamp(0, 1)
                    tried.flatten(2)[0, :, place] = face.flatten(2)[0, :, place]
                    losses[place, sign] = float(atk.loss(net(tried), label))
            now = float(atk.loss(net(one), label))
            of_pixel = {p: max((losses[p, s], s) for s in (1, -1)) for p in range(64)}
            best = sorted((p for p in of_pixel if of_pixel[p][0] > now), key=lambda p: -of_pixel[p][0])[:t]
            taken = chosen[sample].nonzero()[:, 0].tolist()
            assert len(taken) == t
            raised = sorted(of_pixel[place][0] for place in taken)  # rounding may change places of equals
            torch.testing.assert_close(raised, sorted(of_pixel[place][0] for place in best), rtol=1e-5, atol=1e-6)
            for place in range(64):
                want = (one + of_pixel[place][1] * eps).clamp(0, 1) if place in taken else one
                assert torch.equal(moved[sample].flatten(1)[:, place], want.flatten(2)[0, :, place])


def test_local_search_in_a_ball_breaks_a_plain_model_without_its_gradient(model, data):
    x, y = data
    eps = 0.1
    blind = right(model, attacks.LocalSearch(Blind(model), eps, 20)(x, y), y)
    noise = right(model, attacks.PGD(model, eps, eps, 0, restarts=20)(x, y), y)
    assert blind < noise - 0.3, (blind, noise)


def test_local_search_in_a_ball_and_whatever_the_batch(model, data):
    x, y = data
    whole = attacks.LocalSearch(model, 0.1, 5)(x, y)
    assert ((whole - x).abs() <= 0.1 + 1e-7).all() and not torch.equal(whole, x)
    parts = attacks.LocalSearch(model, 0.1, 5, batch=100)
    pieces = torch.cat([parts(x[i : i + 7], y[i : i + 7]) for i in range(0, 24, 7)])
    torch.testing.assert_close(whole, pieces)
    for options, words in (({"rounds": 0}, "rounds must"), ({"r": 3}, "r must"), ({"norm": "l2"}, "L-inf")):
        with pytest.raises(InputError, match=words):
            attacks.LocalSearch(model, **options)
    with pytest.raises(InputError, match="needs images"):
        attacks.LocalSearch(nn.Linear(6, 3))(torch.rand(2, 6), torch.tensor([0, 1]))


def test_transfer_is_crafted_on_the_surrogate_and_scored_on_the_victim(model, other, data):
    x, y = data
    options = {"eps": 0.06, "alpha": 0.01, "steps": 10}
    adv, info = attacks.Transfer(Blind(model), surrogate=other, **options)(x, y, return_info=True)
    assert torch.equal(adv, attacks.PGD(other, **options)(x, y))
    assert torch.equal(info.success, copy.deepcopy(model).eval()(adv).argmax(1) != y)
    white = attacks.PGD(model, **options)(x, y, return_info=True)[1]
    assert info.success.sum() <= white.success.sum()
    assert attacks.Transfer(model, other, attacks.APGD, eps=0.06, steps=5)(x, y).shape == x.shape


def test_transfer_refuses_the_victim_in_disguise(model, other, data):
    x, y = data
    for surrogate in (model, nn.Sequential(model)):
        with pytest.raises(InputError, match="same model"):
            attacks.Transfer(model, surrogate)
    for surrogate in (copy.deepcopy(model), lambda z: copy.deepcopy(model).eval()(z)):
        with pytest.raises(InputError, match="copy of the victim"):
            attacks.Transfer(model, surrogate)(x, y)
    attacks.Transfer(model, other)(x, y)


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.8)])
def test_square_and_fab(model, data, norm, eps):
    pytest.importorskip("torchattacks")
    x, y = data
    for make, options in ((attacks.Square, {"queries": 200}), (attacks.FAB, {"steps": 10})):
        before = state_of(model)
        adv, info = make(model, eps, norm=norm, **options)(x, y, return_info=True)
        assert_same(before, state_of(model))
        assert right(model, adv, y) < 0.6
        assert (info.delta_norm <= eps * (1 + 1e-6)).all() and adv.min() >= 0 and adv.max() <= 1
        assert torch.equal(copy.deepcopy(model).eval()(adv).argmax(1) != y, info.success)
    assert right(model, attacks.Square(Blind(model), eps, 200, norm=norm)(x, y), y) < 0.6


def test_square_and_fab_refuse_what_torchattacks_cannot(model, data):
    for options, words in (
        ({"eps": torch.ones(24)}, "one eps"),
        ({"bounds": (-1.0, 1.0)}, "from 0 to 1"),
        ({"loss": lambda o, t: o.sum(1)}, "classifiers"),
    ):
        with pytest.raises(InputError, match=words):
            attacks.Square(model, **options)


def test_without_torchattacks_the_extra_is_named(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    before = state_of(model)
    with pytest.raises(InputError, match=r"torchattacks.*extra `attacks`"):
        attacks.FAB(model)(*data)
    assert_same(before, state_of(model))
