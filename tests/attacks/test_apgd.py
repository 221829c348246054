"""APGD-CE, APGD-DLR and APGD-T: as strong as PGD at the same number of gradients, and the contract."""

import copy

import pytest
import torch
from networks import network, samples
from test_pgd_attacks import assert_same, state_of

import cmr_fast as cf
from cmr_fast.errors import InputError

attacks = cf.attacks


@pytest.mark.parametrize("norm, eps", [("linf", 7 / 255), ("l2", 0.3)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_not_weaker_than_pgd_at_the_same_number_of_gradients(model, norm, eps, loss):
    x, y = samples(200, seed=11)
    pgd = attacks.PGD(model, eps, eps / 4, 20, norm=norm, loss=loss)(x, y, return_info=True)[1]
    apgd = attacks.APGD(model, eps, 20, norm=norm, loss=loss, early_stop=False)(x, y, return_info=True)[1]
    assert 0.2 < pgd.success.float().mean() < 0.95  # neither nobody nor everybody
    assert apgd.success.sum() >= pgd.success.sum()
    both = ~apgd.success & ~pgd.success
    assert apgd.loss[both].mean() >= pgd.loss[both].mean() - 1e-4
    assert apgd.queries <= pgd.queries + 2 * len(x)


def test_apgd_follows_torchattacks(model):
    """Other starts, so the same strength, not the same bits."""
    torchattacks = pytest.importorskip("torchattacks")
    x, y = samples(200, seed=12)
    theirs = torchattacks.APGD(copy.deepcopy(model), eps=7 / 255, steps=20)(x, y)
    rate = (copy.deepcopy(model).eval()(theirs).argmax(1) != y).float().mean()
    ours = attacks.APGD(model, 7 / 255, 20)(x, y, return_info=True)[1].success.float().mean()
    assert ours >= rate - 0.01


def test_targeted_dlr_finds_what_the_likeliest_class_hides(model):
    x, y = samples(200, seed=13)
    one = attacks.APGDT(model, 7 / 255, 20, targets=1)(x, y, return_info=True)[1]
    every = attacks.APGDT(model, 7 / 255, 20)(x, y, return_info=True)[1]
    assert (every.success | ~one.success).all()
    assert every.success.float().mean() > 0.2
    with pytest.raises(InputError, match="at least 4 classes"):
        attacks.APGDT(network(classes=3))(x, y % 3)


@pytest.mark.parametrize("make", [attacks.APGD, attacks.APGDT])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inside_ball_and_box_and_success_is_true(model, data, make, norm):
    x, y = data
    eps = 0.03 if norm == "linf" else 0.5
    before = state_of(model)
    adv, info = make(model, eps, 12, norm=norm, strict=True)(x, y, return_info=True)
    assert_same(before, state_of(model))
    delta = (adv.double() - x.double()).flatten(1)
    assert ((delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)) <= eps).all()
    assert adv.min() >= 0 and adv.max() <= 1
    assert torch.equal(copy.deepcopy(model).eval()(adv).argmax(1) != y, info.success)
    wrong = copy.deepcopy(model).eval()(x).argmax(1) != y
    assert torch.equal(adv[wrong], x[wrong])
    assert info.losses.shape == (12, 24) and info.losses.isfinite().all()


def test_early_stop_and_restarts_change_only_the_cost(model):
    x, y = samples(100, seed=14)
    full = attacks.APGD(model, 7 / 255, 20, early_stop=False)(x, y, return_info=True)[1]
    short = attacks.APGD(model, 7 / 255, 20)(x, y, return_info=True)[1]
    assert torch.equal(full.success, short.success) and short.queries < full.queries
    more = attacks.APGD(model, 7 / 255, 20, restarts=3)(x, y, return_info=True)[1]
    assert (more.success | ~short.success).all()
    rounded = attacks.APGD(model, 7 / 255, 20, dtype=torch.bfloat16)(x, y, return_info=True)[1]
    assert (rounded.success.float().mean() - short.success.float().mean()).abs() < 0.1


def test_the_step_is_halved_where_it_overshoots():
    """A bowl of which the top lies inside the ball: a fixed step of 2 eps jumps over it, halving closes in."""
    top = torch.full((3, 4), 0.52)

    def bowl(outputs, goals):
        return -(outputs - goals).square().sum(1)

    x = torch.full((3, 4), 0.5)
    adv = attacks.APGD(torch.nn.Identity(), 0.1, 100, loss=bowl)(x, top)
    fixed = attacks.PGD(torch.nn.Identity(), 0.1, 0.2, 100, loss=bowl)(x, top)
    assert (adv - top).abs().max() < 0.004 and (fixed - top).abs().max() > 0.05


def test_bad_input(model, data):
    x, y = data
    for options, words in (
        ({"steps": 0}, "steps must be"),
        ({"restarts": 0}, "restarts must be"),
        ({"rho": 2}, "rho must be"),
        ({"loss": "hinge"}, "loss must be"),
    ):
        with pytest.raises(InputError, match=words):
            attacks.APGD(model, **options)
    with pytest.raises(InputError, match="labels from 0 to 4"):
        attacks.APGD(model)(x, y + 3)
    with pytest.raises(InputError, match="targets must be"):
        attacks.APGDT(model, targets=0)

    def broken(z):
        return network().eval()(z) * torch.where(z.sum() > 1e9, 1.0, 1.0) / (z - z).sum((1, 2, 3))[:, None]

    with pytest.raises(InputError, match="not finite at step 0"):
        attacks.APGD(broken, steps=4, check=False, loss=lambda o, t: o.sum(1))(x, y)
