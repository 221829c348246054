"""PGD and its family: torchattacks' bits, the contract (nothing left behind, ball and box exact), bad input."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import network, samples
from torch import nn

import cmr_fast as cf
from cmr_fast.attacks import losses
from cmr_fast.errors import InputError

attacks = cf.attacks
EPS, ALPHA = 8 / 255, 2 / 255


def accuracy(model, x, y):
    mode = model.training
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train(mode)
    return right


# --- what it finds


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_bit_for_bit_torchattacks(model, batch):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = samples(batch)
    theirs = torchattacks.PGD(copy.deepcopy(model), eps=EPS, alpha=ALPHA, steps=10, random_start=False)(x, y)
    ours = attacks.PGD(model, eps=EPS, alpha=ALPHA, steps=10, random_start=False)(x, y)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x)


def test_bit_for_bit_torchattacks_from_its_random_start_and_for_fgsm(model):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = samples(16)
    torch.manual_seed(3)
    theirs = torchattacks.PGD(copy.deepcopy(model), eps=EPS, alpha=ALPHA, steps=5, random_start=True)(x, y)
    torch.manual_seed(3)
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    assert torch.equal(attacks.PGD(model, eps=EPS, alpha=ALPHA, steps=5)(x, y, start=start), theirs)
    assert torch.equal(attacks.FGSM(model, EPS)(x, y), torchattacks.FGSM(copy.deepcopy(model), eps=EPS)(x, y))
    theirs = torchattacks.MIFGSM(copy.deepcopy(model), eps=EPS, alpha=ALPHA, steps=5)(x, y)
    ours = attacks.MIFGSM(model, EPS, ALPHA, 5)(x, y)
    assert (ours != theirs).float().mean() < 1e-3  # its mean gradient is ours by 1 / B, which rounds otherwise


def test_l2_follows_torchattacks(model):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = samples(16)
    # without what torchattacks adds to the gradient's norm: a ReLU network blows that up from step to step
    options = {"eps": 0.5, "alpha": 0.1, "steps": 10, "random_start": False}
    theirs = torchattacks.PGDL2(copy.deepcopy(model), eps_for_division=0.0, **options)(x, y)
    ours = attacks.PGD(model, norm="l2", **options)(x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: attacks.PGD(m, EPS, ALPHA, 10),
        lambda m: attacks.PGD(m, EPS, ALPHA, 10, loss="dlr"),
        lambda m: attacks.PGD(m, EPS, ALPHA, 10, targeted="random"),
        lambda m: attacks.PGD(m, 1.0, 0.2, 10, norm="l2"),
        lambda m: attacks.PGD(m, EPS, ALPHA, 10, momentum=0.9),
        lambda m: attacks.PGD(m, EPS, ALPHA, 10, dtype=torch.bfloat16, channels_last=True, fold=True),
        lambda m: attacks.CW(m, EPS, ALPHA, 10),
        lambda m: attacks.MIFGSM(m, EPS, ALPHA, 10),
        lambda m: attacks.FGSM(m, EPS),
    ],
)
def test_every_attack_lowers_accuracy_inside_the_ball(model, data, make):
    x, y = data
    assert accuracy(model, x, y) > 0.9
    atk = make(model)
    adv, info = atk(x, y, return_info=True)
    assert accuracy(model, adv, y) < 0.65
    assert abs(info.success.float().mean().item() - (1 - accuracy(model, adv, y))) < 1e-6
    assert (info.delta_norm <= float(atk.eps) + 1e-7).all() and info.losses.shape == (atk.steps, len(x))
    assert adv.min() >= 0 and adv.max() <= 1


def test_losses_grow_with_the_steps_and_info_belongs_to_the_result(model, data):
    x, y = data
    adv, info = attacks.PGD(model, EPS, ALPHA, 10)(x, y, return_info=True)
    assert (info.losses[-1] > info.losses[0]).float().mean() > 0.9
    with torch.no_grad():
        loss = F.cross_entropy(copy.deepcopy(model).eval()(adv), y, reduction="none")
    torch.testing.assert_close(info.loss, loss)
    assert info.queries == 24 * 11 + 6  # ten steps, the last look, the probe


def test_targeted_reaches_its_target(model, data):
    x, y = data
    target = (y + 1) % 5
    adv, info = attacks.PGD(model, 0.2, 0.02, 20, targeted="label")(x, target, return_info=True)
    assert info.success.float().mean() > 0.8
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(adv).argmax(1) == target, info.success)


def test_random_targets_are_uniform_over_the_other_classes(model):
    x, y = samples(16)
    x, y = x.repeat(50, 1, 1, 1), y.repeat(50)
    atk = attacks.PGD(model, EPS, ALPHA, 1, targeted="random", restarts=2)
    with atk.victim.prepare(x) as victim:
        problem = atk._problem(victim, x, y, None).rows(torch.arange(len(x)).repeat(2))
        targets = atk._targets(problem)
    shift = (targets - problem.labels) % 5
    assert shift.min() == 1 and (shift.bincount(minlength=5)[1:] - 400).abs().max() < 80
    assert (targets[:800] != targets[800:]).float().mean() > 0.6  # another draw for another restart


def test_any_loss_and_any_targets(model, data):
    """FARE's attack on an embedding: away from where the clean input lies."""
    x = data[0]
    encode = nn.Sequential(*list(model.children())[:-1]).eval()
    with torch.no_grad():
        clean = encode(x)

    def away(outputs, goal):
        return (outputs - goal).square().sum(1)

    adv, info = attacks.PGD(encode, EPS, ALPHA, 10, loss=away)(x, clean, return_info=True)
    assert info.success is None and (info.loss > 10 * info.losses[0]).all()

    def moved(outputs, goal):
        return away(outputs, goal) > 0.01

    stopped, info = attacks.PGD(encode, EPS, ALPHA, 10, loss=away, success=moved, early_stop=True)(
        x, clean, return_info=True
    )
    assert info.success.all() and (stopped - x).abs().mean() < (adv - x).abs().mean()


def test_restarts_are_one_batch_and_never_weaker(model, data):
    x, y = data
    eps = 3 / 255
    one, first = attacks.PGD(model, eps, 1 / 255, 5)(x, y, return_info=True)
    info = attacks.PGD(model, eps, 1 / 255, 5, restarts=4)(x, y, return_info=True)[1]
    assert (info.success | ~first.success).all()
    assert (info.loss >= first.loss)[~info.success].all()
    assert info.losses.shape == (5, 24)
    assert info.queries > 4 * 24 * 5
    # the first restart is the single run
    assert torch.equal(attacks.PGD(model, eps, 1 / 255, 5, restarts=1)(x, y), one)


def test_early_stop_is_as_strong_and_asks_less(model):
    x, y = samples(64)
    full, everything = attacks.PGD(model, EPS, ALPHA, 10)(x, y, return_info=True)
    short, info = attacks.PGD(model, EPS, ALPHA, 10, early_stop=True)(x, y, return_info=True)
    assert (info.success | ~everything.success).all()
    assert info.queries < 0.85 * everything.queries
    assert (short - x).abs().max() <= EPS + 1e-7
    # who was never fooled on the way took all steps
    never = ~info.success
    assert torch.equal(short[never], full[never])
    several = attacks.PGD(model, EPS, ALPHA, 10, early_stop=True, restarts=3)(x, y, return_info=True)[1]
    assert (several.success | ~info.success).all()
    assert info.losses.shape == (10, 64) and info.losses.isfinite().all()


def test_early_stop_with_values_per_sample_and_momentum(model, data):
    x, y = data
    eps = torch.linspace(0.0, 0.06, 24)
    atk = attacks.PGD(model, eps, eps / 4 + 1e-3, 8, early_stop=True, momentum=0.8, restarts=2)
    adv, info = atk(x, y, return_info=True)
    assert ((adv - x).abs().flatten(1).amax(1) <= eps + 1e-7).all()
    assert torch.equal(adv[0], x[0]) and info.success.sum() > 5


def test_noise_depends_on_the_sample_not_on_the_batch(model, data):
    x, y = data

    def make():
        return attacks.PGD(model, EPS, ALPHA, 0)

    whole, parts = make()(x, y), make()
    pieces = torch.cat([parts(x[i : i + 5], y[i : i + 5]) for i in range(0, 24, 5)])
    assert torch.equal(whole, pieces)
    assert torch.equal(make()(x[[7, 2]], y[[7, 2]], index=[7, 2]), whole[[7, 2]])
    atk = make()
    assert not torch.equal(atk(x, y), atk(x, y)) and atk.seen == 48
    assert not torch.equal(attacks.PGD(model, EPS, ALPHA, 0, seed=1)(x, y), whole)

    def generator():
        return torch.Generator().manual_seed(5)

    a, b = (attacks.PGD(model, EPS, ALPHA, 0, generator=generator())(x, y) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, whole)


def test_l2_start_has_a_uniform_radius_and_direction(model):
    x, y = torch.full((400, 3, 8, 8), 0.5), torch.zeros(400, dtype=torch.long)
    delta = attacks.PGD(model, 0.5, 0.1, 0, norm="l2")(x, y).sub(x).flatten(1)
    radius = delta.norm(dim=1) / 0.5
    assert 0.4 < radius.mean() < 0.6 and radius.max() <= 1 and radius.min() < 0.05
    mean = (delta / delta.norm(dim=1, keepdim=True)).mean(0)
    assert mean.norm() < 0.1


def test_numpy_in_numpy_out(model, data):
    x, y = data
    adv = attacks.PGD(model, EPS, ALPHA, 3)(x.numpy(), y.numpy())
    assert isinstance(adv, np.ndarray) and adv.dtype == np.float32
    assert torch.equal(torch.from_numpy(adv), attacks.PGD(model, EPS, ALPHA, 3)(x, y))


def test_normalize_is_inside_the_gradient(model, data):
    x, y = data
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    bare = copy.deepcopy(model).eval()

    def inner(z):
        return bare(z * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1))

    adv = attacks.PGD(inner, EPS, ALPHA, 5, normalize=(mean, std.tolist()), random_start=False)(x, y)
    want = attacks.PGD(bare, EPS, ALPHA, 5, random_start=False)(x, y)
    assert (adv != want).float().mean() < 0.01
    # the same attack on normalised tensors: bounds and eps for every channel
    z = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    bounds = ((0 - mean) / std)[None], ((1 - mean) / std)[None]
    scaled = attacks.PGD(inner, (EPS / std)[None], (ALPHA / std)[None], 5, bounds=bounds, random_start=False)(z, y)
    assert ((scaled * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1) - want).abs() > 1e-5).float().mean() < 0.01


def test_a_numbers_only_input_and_vectors(model):
    linear = nn.Linear(6, 3)
    x, y = torch.rand(7, 6), torch.randint(0, 3, (7,))
    adv, info = attacks.PGD(linear, 0.3, 0.1, 5)(x, y, return_info=True)
    assert (info.losses[-1] >= info.losses[0] - 1e-6).all() and (adv - x).abs().max() <= 0.3 + 1e-7
    assert attacks.PGD(linear)(x[:0], y[:0]).shape == (0, 6)


# --- the contract


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [b.clone() for b in model.state_dict().values()],
        [p.stride() for p in model.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for a, b in zip(before[:2] + before[4:5], after[:2] + after[4:5], strict=True):
        assert a == b
    for a, b in zip(before[2] + before[3], after[2] + after[3], strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert torch.equal(before[5], after[5])


@pytest.mark.parametrize(
    "options", [{}, {"restarts": 2, "early_stop": True}, {"norm": "l2"}, {"channels_last": True, "fold": True}]
)
@pytest.mark.parametrize("outer", ["plain", "no_grad", "inference", "error"])
def test_nothing_is_left_behind(model, data, options, outer):
    model = copy.deepcopy(model).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    x, y = data
    x.requires_grad_()
    clean, labels = x.detach().clone(), y.clone()
    before = state_of(model)
    if outer == "error":

        def explode(outputs, labels):
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            attacks.PGD(model, 0.5, 0.1, 3, **{**options, "loss": explode, "success": losses.margin})(x, y)
    else:
        context = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[outer]
        with context():
            adv = attacks.PGD(model, 0.5, 0.1, 3, **options)(x, y)
        assert not adv.requires_grad
        adv.add_(1)  # not the input's memory
    assert_same(before, state_of(model))
    assert torch.equal(x, clean) and torch.equal(y, labels) and x.requires_grad and x.grad is None


def test_global_random_numbers_are_untouched_even_by_a_model_that_draws(model, data):
    noisy = nn.Sequential(nn.Dropout(0.5), copy.deepcopy(model).eval())
    x, y = data
    before = torch.get_rng_state()

    def draw(z):
        return noisy.train()(z)

    attacks.PGD(draw, EPS, ALPHA, 2, check=False)(x, y)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_and_box_hold_exactly(model, dtype, norm):
    model = copy.deepcopy(model).to(dtype) if dtype in (torch.bfloat16, torch.float64) else copy.deepcopy(model)
    run = model if dtype != torch.float16 else lambda z: copy.deepcopy(model).eval()(z.float())
    x, y = samples(32)
    x = x.to(dtype)
    x[0], x[1] = 0, 1
    eps = EPS if norm == "linf" else 0.7
    adv = attacks.PGD(run, eps, eps / 3, 6, norm=norm, strict=True)(x, y)
    assert adv.dtype == dtype and adv.min() >= 0 and adv.max() <= 1
    delta = (adv.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps).all()
    assert size[2:].min() > 0.9 * eps
    assert not torch.equal(adv, x)


def test_the_default_float32_result_lies_between_the_rounded_edges(model):
    x, y = samples(32)
    adv = attacks.PGD(model, EPS, EPS, 3)(x, y)
    assert (adv >= x - EPS).all() and (adv <= x + EPS).all() and adv.min() >= 0 and adv.max() <= 1
    strict = attacks.PGD(model, EPS, EPS, 3, strict=True)(x, y)
    assert (strict - adv).abs().max() <= 2**-24 and not torch.equal(strict, adv)


def test_sums_do_not_underflow_in_half_precision():
    """A gradient of 1e-7 a sample: a mean over 256 samples is 0 in float16, and so would be its sign."""
    weight = torch.full((1, 1, 1, 1), 3e-4, dtype=torch.float16)

    def model(z):
        return F.conv2d(z, weight).mean((2, 3)).repeat(1, 2) * torch.tensor([1.0, -1.0], dtype=torch.float16)

    x, y = torch.full((256, 1, 16, 16), 0.5, dtype=torch.float16), torch.zeros(256, dtype=torch.long)
    adv = attacks.PGD(model, 0.1, 0.05, 2, random_start=False, loss="margin")(x, y)
    assert (adv < x).all()


def test_channels_last_and_fold_find_the_same(model, data):
    x, y = data
    want = attacks.PGD(model, EPS, ALPHA, 5)(x, y)
    for options in ({"channels_last": True}, {"fold": True}, {"channels_last": True, "fold": True}):
        got = attacks.PGD(model, EPS, ALPHA, 5, **options)(x, y)
        assert (got != want).float().mean() < 0.02, options


def test_fold_and_channels_last_see_new_weights(model, data):
    x, y = data
    model = copy.deepcopy(model)
    atk = attacks.PGD(model, EPS, ALPHA, 3, channels_last=True, fold=True, random_start=False)
    first = atk(x, y)
    with torch.no_grad():
        model[3].weight.data.mul_(-1)
    assert not torch.equal(atk(x, y), first)


# --- bad input


class Snooze(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step, self.calls = step, 0

    def forward(self, z):
        self.calls += 1
        if self.calls > self.step:
            z = torch.cat([z[:3], z[3:4] * torch.nan, z[4:]])
        return network().eval()(z)


def test_nan_gradients_name_sample_and_step(data):
    x, y = data
    with pytest.raises(InputError, match=r"gradient of sample 3 is not finite at step 2 of 6"):
        attacks.PGD(Snooze(2), EPS, ALPHA, 6, check=False)(x, y)
    y = network().eval()(x).argmax(1)
    for options in ({"norm": "l2"}, {"early_stop": True}):
        with pytest.raises(InputError, match=r"gradient of sample 3 is not finite at step 1 of 4"):
            attacks.PGD(Snooze(1), 1e-6, 1e-6, 4, check=False, **options)(x, y)


def test_eps_of_zero_returns_the_input(data):
    x, y = data

    def never(z):
        raise AssertionError("the model is not needed")

    for norm in ("linf", "l2"):
        adv = attacks.PGD(never, eps=0, norm=norm)(x, y)
        assert torch.equal(adv, x) and adv.data_ptr() != x.data_ptr()
    assert torch.equal(attacks.FGSM(never, eps=0)(x, y), x)


def test_models_that_mix_or_draw_are_named(model, data):
    x, y = data
    mixing = network()
    mixing[1] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(InputError, match=r"depends on the rest of its batch .*batch normalisation.*\(1\)"):
        attacks.PGD(mixing)(x, y)
    inner = copy.deepcopy(model).train()
    with pytest.raises(InputError, match="depends on the rest of its batch"):
        attacks.PGD(lambda z: inner(z))(x, y)

    class Always(nn.Dropout):
        def forward(self, z):
            return F.dropout(z, 0.5, training=True)

    with pytest.raises(InputError, match=r"the model is random.*\(0\)"):
        attacks.PGD(nn.Sequential(Always(), copy.deepcopy(model)))(x, y)
    attacks.PGD(mixing, check=False)(x, y)
    one = attacks.PGD(model)
    one(x[:1], y[:1])
    assert not one.check
    with pytest.raises(InputError, match="depends on the rest"):
        attacks.PGD(mixing)(x[:1], y[:1])


def test_the_probe_is_paid_once(model, data):
    x, y = data
    atk = attacks.PGD(model, EPS, ALPHA, 1)
    first, second = (atk(x, y, return_info=True)[1].queries for _ in range(2))
    assert (first, second) == (2 * 24 + 6, 2 * 24)


def test_refusals(model, data):
    x, y = data
    for inputs, options, words in (
        ((x * 4 - 2, y), {}, r"bounds \(0.0, 1.0\).*look normalised.*normalize=\(mean, std\)"),
        ((x * 255, y), {}, "look like pixels from 0 to 255"),
        ((x - 0.01 * (x == x.max()) + 1e-3, y), {"bounds": (0.0, 0.5)}, r"must lie in bounds \(0.0, 0.5\)"),
        ((x.clone().index_fill_(0, torch.tensor(3), torch.nan), y), {}, "finite, sample 3"),
        ((x, torch.where(torch.arange(24) == 4, 5, y)), {}, "labels from 0 to 4, sample 4 has 5"),
        ((x, torch.where(torch.arange(24) == 2, -1, y)), {}, "labels from 0 to 4, sample 2 has -1"),
        ((x, y[:5]), {}, "a row for each of 24 samples"),
        ((x, y.float()), {}, "class labels"),
        ((x.long(), y), {}, "floats"),
        ((x, y), {"eps": -0.1}, "eps must be finite and at least 0"),
        ((x, y), {"eps": float("nan")}, "eps must be finite"),
        ((x, y), {"alpha": 0}, "alpha must be finite and above 0"),
        ((x, y), {"steps": -1}, "steps must be"),
        ((x, y), {"steps": 2.0}, "steps must be"),
        ((x, y), {"restarts": 0}, "restarts must be"),
        ((x, y), {"norm": "l1"}, "norm must be"),
        ((x, y), {"loss": "hinge"}, "loss must be a callable or one of"),
        ((x, y), {"loss": lambda o, t: o.sum()}, r"one value a sample"),
        ((x, y), {"loss": lambda o, t: o.detach().sum(1)}, "no gradient"),
        ((x, y), {"loss": lambda o, t: o.sum(1), "early_stop": True}, "success"),
        ((x, y), {"loss": lambda o, t: o.sum(1), "targeted": "label"}, "named loss"),
        ((x, y), {"targeted": "most"}, "targeted must be"),
        ((x, y), {"graph": True}, "needs a CUDA device"),
        ((x, y), {"graph": True, "early_stop": True}, "choose one"),
        ((x, y), {"eps": torch.ones(1, 3), "norm": "l2"}, "one radius a sample"),
        ((x, y), {"eps": torch.ones(7)}, r"eps must be a number, \(24,\)"),
        ((x, y), {"dtype": torch.int8}, "dtype must be"),
        ((x, y), {"seed": -1}, "seed must be"),
    ):
        with pytest.raises(InputError, match=words):
            attacks.PGD(model, **{"eps": EPS, **options})(*inputs)
    with pytest.raises(InputError, match="torch module"):
        attacks.PGD(lambda z: z, channels_last=True)
    with pytest.raises(InputError, match="callable"):
        attacks.PGD("model")
    with pytest.raises(InputError, match=r"start must be like x"):
        attacks.PGD(model)(x, y, start=x[:2])
    with pytest.raises(InputError, match=r"index must be \(24,\)"):
        attacks.PGD(model)(x, y, index=[1])
    with pytest.raises(InputError, match="logits"):
        attacks.PGD(nn.Sequential(nn.Conv2d(3, 2, 1)))(x, y)

    class Branch(nn.Module):
        def forward(self, z):
            return z.flatten(1)[:, :5] if z.sum() > 0 else z.flatten(1)[:, 5:10]

    with pytest.raises(InputError, match=r"torch\.fx can trace"):
        attacks.PGD(Branch(), fold=True, check=False)(x, y)


def test_a_start_is_put_into_the_ball_by_the_first_step(model, data):
    x, y = data
    adv = attacks.PGD(model, EPS, ALPHA, 1)(x, y, start=torch.zeros_like(x))
    assert (adv >= x - EPS).all() and (adv <= x + EPS).all()


def test_progress_is_shown_when_asked_or_slow(model, data, monkeypatch):
    from contextlib import contextmanager

    from cmr_fast.attacks import base

    told = []

    @contextmanager
    def counting(total, what):
        told.append((total, what))
        yield told.append

    monkeypatch.setattr(base._terminal, "counting", counting)
    attacks.PGD(model, EPS, ALPHA, 3)(*data)
    assert told == []
    attacks.PGD(model, EPS, ALPHA, 3, progress=True)(*data)
    assert told == [(3, "PGD"), 0, 1, 1, 1]
    told.clear()
    monkeypatch.setattr(base, "SLOW", -1.0)
    attacks.PGD(model, EPS, ALPHA, 3)(*data)
    assert len(told) == 5
    attacks.PGD(model, EPS, ALPHA, 3, progress=False)(*data)
    assert len(told) == 5


def test_losses():
    z = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 5.0, 1.0]])
    y, t = torch.tensor([0, 1]), torch.tensor([2, 3])
    torch.testing.assert_close(losses.margin(z, y), torch.tensor([-2.0, 3.0]))
    torch.testing.assert_close(losses.cw(z, y, 2.5), torch.tensor([-4.5, 0.0]))
    torch.testing.assert_close(losses.dlr(z, y), torch.tensor([-2 / 2.5, 3 / 4]))
    torch.testing.assert_close(losses.dlr_targeted(z, y, t), torch.tensor([-2.5 / (3 + 0.25), -1 / 4.5]))
    torch.testing.assert_close(losses.dlr(3 * z + 1, y), losses.dlr(z, y))
    with pytest.raises(InputError, match="at least 3 classes"):
        losses.dlr(z[:, :2], y)
    with pytest.raises(InputError, match="at least 4 classes"):
        losses.dlr_targeted(z[:, :3], y, t)


def cifar10(folder, count):
    """Some test images of ../shared/data's CIFAR-10, which holds them as JPEG, in the order of their classes."""
    image = pytest.importorskip("PIL.Image")
    with np.load(folder / "cifar10_jpeg.npz", allow_pickle=False) as file:
        blob, ends, labels = (file[f"test_{name}"] for name in ("jpeg", "offsets", "labels"))
    raw, rows = blob.tobytes(), np.random.default_rng(0).permutation(len(labels))[:count]
    pixels = [np.asarray(image.open(io.BytesIO(raw[ends[i] : ends[i + 1]])).convert("RGB")) for i in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels[rows].astype(np.int64))


@pytest.mark.realdata
def test_cifar10(data_root):
    """Real images: an undefended network, barely trained, loses half of what it knows to PGD at 8/255."""
    if not (data_root / "cifar10" / "cifar10_jpeg.npz").is_file():
        pytest.skip(f"no CIFAR-10 under {data_root}")
    x, y = cifar10(data_root / "cifar10", 2200)
    net = network(seed=0, classes=10)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(150):
        rows = slice(step % 30 * 64, step % 30 * 64 + 64)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    x, y = x[2000:], y[2000:]
    clean = accuracy(net, x, y)
    adv, info = attacks.PGD(net, early_stop=True)(x, y, return_info=True)
    assert clean > 0.2 and accuracy(net, adv, y) < clean / 2
    assert abs(accuracy(net, adv, y) + info.success.double().mean().item() - 1) < 1e-6
