import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import trained
from torch import nn

from cmr_fast.attacks import FeatureScatter
from cmr_fast.errors import InputError

EPS = 8 / 255


def log_domain_transport(cost, reg, max_iter, tol):
    """The authors' Sinkhorn iterations in float64, with a true log-sum-exp; the plan keeps its graph."""
    n, m = cost.shape
    u, v = torch.zeros(n, dtype=cost.dtype), torch.zeros(m, dtype=cost.dtype)
    mu = cost.new_full((n,), 1 / n).log()
    nu = cost.new_full((m,), 1 / m).log()

    def exponent(u, v):
        return (-cost + u[:, None] + v[None, :]) / reg

    for _ in range(max_iter):
        before = u
        u = reg * (mu - exponent(u, v).logsumexp(1)) + u
        v = reg * (nu - exponent(u, v).logsumexp(0)) + v
        if (u - before).abs().sum() < tol:
            break
    return exponent(u, v).exp()


def by_the_paper(net, x, start, group, detach=True):
    """Algorithm 1, a group at a time, on float64 features: x' after one step."""
    moved = start.clone().requires_grad_()
    clean = net(x).detach().double()
    total = 0.0
    for rows in torch.arange(len(x)).split(group):
        theirs, ours = F.normalize(clean[rows], dim=1), F.normalize(net(moved)[rows].double(), dim=1)
        cost = (1 - theirs @ ours.T).clamp(min=0)
        plan = log_domain_transport(cost, 0.01, 100, 0.1)
        total = total + ((plan.detach() if detach else plan) * cost).sum()
    (gradient,) = torch.autograd.grad(total, moved)
    stepped = x + (start + EPS * gradient.sign() - x).clamp(-EPS, EPS)
    return stepped.clamp(0, 1), gradient


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = trained().eval()
    x = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    start = x + EPS * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 1)
    return net, x, start


@pytest.mark.parametrize("group", [None, 4, 1])
@pytest.mark.parametrize("ot_grad", ["envelope", "unrolled"])
def test_one_step_is_the_papers(case, group, ot_grad):
    net, x, start = case
    adv = FeatureScatter(net, group=group, ot_grad=ot_grad)(x, start=start)
    expected, gradient = by_the_paper(net, x, start, group or len(x), detach=ot_grad == "envelope")
    clear = gradient.abs() > 1e-4 * gradient.abs().max()  # below it the sign is float32's rounding
    assert clear.float().mean() > 0.8
    assert torch.allclose(adv[clear], expected[clear], atol=1e-6)


def test_the_default_is_the_authors_step_and_not_the_envelopes(case):
    net, x, start = case
    default = FeatureScatter(net)(x, start=start)
    assert torch.equal(default, FeatureScatter(net, ot_grad="unrolled")(x, start=start))
    assert not torch.equal(default, FeatureScatter(net, ot_grad="envelope")(x, start=start))


def test_identity_matches_each_sample_with_its_own(case):
    """Section 5.2: T = I / n, so a sample's step is that of its own distance, whatever the batch."""
    net, x, start = case
    moved = start.clone().requires_grad_()
    own = (1 - F.cosine_similarity(net(x).detach(), net(moved))).clamp(min=0)
    (gradient,) = torch.autograd.grad(own.sum(), moved)
    expected = (x + (start + EPS * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    adv, info = FeatureScatter(net, solver="identity")(x, start=start, return_info=True)
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    assert clear.float().mean() > 0.8 and torch.allclose(adv[clear], expected[clear], atol=1e-6)
    assert torch.allclose(info.losses[0], own / len(x), atol=1e-6)
    assert torch.equal(adv, FeatureScatter(net, solver="identity", group=3)(x, start=start))
    assert not torch.equal(adv, FeatureScatter(net)(x, start=start))


def test_groups_are_independent_and_couple_within(case):
    net, x, start = case
    whole = FeatureScatter(net, group=5)(x, start=start)
    assert torch.equal(whole[:5], FeatureScatter(net)(x[:5], start=start[:5]))
    assert not torch.equal(FeatureScatter(net)(x, start=start), whole)


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot", "identity"])
def test_the_distance_grows_and_the_contract_holds(case, solver):
    net, x, _ = case
    net.train().zero_grad(set_to_none=True)
    keep = {n: v.clone() for n, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    copy = x.clone()
    atk = FeatureScatter(net, steps=5, alpha=EPS / 4, solver=solver, reg=1.0 if solver == "ipot" else 0.01)
    adv, info = atk(x, return_info=True)
    assert torch.equal(x, copy) and torch.equal(state, torch.random.get_rng_state())
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, keep[n]) for n, v in net.state_dict().items())
    assert ((adv.double() - x.double()).abs() <= EPS * (1 + 1e-6)).all() and adv.min() >= 0 and adv.max() <= 1
    assert info.success is None and info.losses.shape == (5, len(x))
    assert info.loss.sum() > info.losses[0].sum()


def test_labels_only_say_who_is_fooled(case):
    net, x, start = case
    labels = net(x).argmax(1)
    atk = FeatureScatter(net)
    adv, info = atk(x, labels, start=start, return_info=True)
    assert torch.equal(adv, FeatureScatter(net)(x, start=start))
    assert torch.equal(info.success, net(adv).argmax(1) != labels)
    assert isinstance(FeatureScatter(net)(x.numpy()), np.ndarray)


def test_same_noise_whatever_the_batch(case):
    net, x, _ = case
    atk, again = FeatureScatter(net, group=5, seed=3), FeatureScatter(net, group=5, seed=3)
    assert torch.equal(atk(x), torch.cat([again(x[:5]), again(x[5:])]))
    assert not torch.equal(FeatureScatter(net, group=5, seed=4)(x), FeatureScatter(net, group=5, seed=3)(x))


def test_eps_of_zero_and_no_samples(case):
    net, x, _ = case
    assert torch.equal(FeatureScatter(net, eps=0.0)(x), x)
    assert FeatureScatter(net)(x[:0]).shape == x[:0].shape
    adv, info = FeatureScatter(net, eps=0.0)(x, return_info=True)
    assert torch.equal(adv, x) and info.loss.shape == (len(x),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ce"}, "loss of its own"),
        ({"restarts": 2}, "takes no restarts"),
        ({"group": 0}, "group must be"),
        ({"solver": "emd"}, "solver must be"),
        ({"ot_grad": "none"}, "ot_grad must be"),
    ],
)
def test_refuses(case, options, message):
    with pytest.raises(InputError, match=message):
        FeatureScatter(case[0], **options)


def test_features_of_any_shape_and_bad_gradients():
    net = nn.Conv2d(3, 4, 3)
    x = torch.rand(6, 3, 8, 8)
    assert FeatureScatter(net)(x).shape == x.shape
    with pytest.raises(InputError, match="not finite at step 0"):
        FeatureScatter(lambda x: (x - x).flatten(1).sqrt() * 1e30)(x)
