"""Settings and inputs of the wrong kind are InputErrors that say what is wrong; 16 bits, rounding, batches."""

import copy

import numpy as np
import pytest
import torch
from networks import network, samples
from torch import nn

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import pgd_step_

attacks = cf.attacks
EPS, ALPHA = 8 / 255, 2 / 255

WHOLE = [None, "2", 2.5, -1, [1, 2], (), {}, float("nan"), np.array([1, 2]), torch.ones(2), True, b"2", 1j, 10**30]
NUMBER = [None, "2", -1, [], {}, float("nan"), np.array([1.0, 2.0]), torch.ones(2), True, b"2", 1j, object()]
VALUES = ["text", [], (), {}, float("nan"), float("inf"), -1, object(), 1j, "0.03", [["a"]], torch.zeros(0), set()]
FLAG = ["yes", 2, 0.5, [], np.array([1, 2]), torch.tensor([1.0, 2.0]), {}]
CHOICE = ["text", "linf ", 3, [], {}, np.array([1, 2]), torch.ones(2), object(), b"linf"]
EVERY = {
    "eps": VALUES,
    "norm": [None, *CHOICE],
    "loss": [None, *CHOICE, lambda o, t: "no", lambda o, t: o.sum(), lambda o, t: None],
    "success": [*CHOICE, lambda o, t: "no", lambda o, t: o, lambda o, t: torch.ones(1).bool()],
    "bounds": [None, *VALUES, (0, 1, 2), ("a", "b"), (1, 0), (0, float("nan")), (0, None)],
    "normalize": [*VALUES, (0.5,), ("a", "b"), (0.5, 0), (0.5, -1), (float("nan"), 1), (None, 1), (torch.ones(7), 1.0)],
    "strict": [None, *FLAG],
    "channels_last": [None, *FLAG],
    "fold": [None, *FLAG],
    "check": [None, *FLAG],
    "progress": FLAG,
    "dtype": ["bfloat16", torch.int8, 16, np.float16, np.array([1, 2]), float],
    "seed": [*WHOLE[:-1], 2**64],
    "generator": ["0", 3, np.random.default_rng(0), torch.ones(2), object()],
    "model": [None, "text", 3, [], object(), network().state_dict()],
}
PGDS = {"alpha": [*VALUES, 0], "restarts": [*WHOLE, 0], "momentum": NUMBER[1:], "graph": [None, *FLAG],
        "early_stop": [None, *FLAG], "random_start": [None, *FLAG], "targeted": [None, *CHOICE, True]}  # fmt: skip
APGDS = {"steps": [*WHOLE, 0], "restarts": [*WHOLE, 0], "rho": [*NUMBER, 2], "early_stop": [None, *FLAG]}
OWN = {
    "PGD": {**PGDS, "steps": WHOLE},
    "FGSM": {key: PGDS[key] for key in PGDS if key != "alpha"},
    "MIFGSM": {**PGDS, "steps": WHOLE, "decay": NUMBER},
    "CW": {**PGDS, "steps": WHOLE, "kappa": NUMBER},
    "APGD": APGDS,
    "APGDT": {**APGDS, "targets": [*WHOLE, 0]},
    "FeatureScatter": {"alpha": VALUES, "steps": WHOLE, "group": [*WHOLE[1:], 0], "solver": [None, *CHOICE],
                       "reg": [*NUMBER, 0], "tol": NUMBER, "max_iter": WHOLE[1:], "ot_grad": [None, *CHOICE]},
    "LocalSearch": {"rounds": [*WHOLE, 0], "p": [*NUMBER, 0], "r": [*NUMBER, 0, 3], "d": WHOLE, "t": [*WHOLE[1:], 0],
                    "candidates": [*WHOLE, 0], "batch": [*WHOLE, 0]},
    "Square": {"queries": [*WHOLE, 0], "restarts": [*WHOLE, 0]},
    "FAB": {"steps": [*WHOLE, 0], "restarts": [*WHOLE, 0], "targeted": [None, *FLAG]},
}  # fmt: skip
QUICK = {
    "FGSM": {},
    "APGDT": {"steps": 1, "targets": 1},
    "FeatureScatter": {},
    "LocalSearch": {"rounds": 1, "candidates": 2},
    "Square": {"queries": 2},
    "FAB": {"steps": 1},
}


def made(name, model, /, **options):
    return getattr(attacks, name)(**{"model": model, **QUICK.get(name, {"steps": 1}), **options})


@pytest.mark.parametrize("name", OWN)
def test_settings_of_the_wrong_kind(model, name):
    if name in ("Square", "FAB"):
        pytest.importorskip("torchattacks")
    x, y = samples(4)
    made(name, model)(x, y)
    taken = []
    for setting, values in {**EVERY, **OWN[name]}.items():
        for value in values:
            try:
                made(name, model, **{setting: value})(x, y, return_info=True)
            except InputError as error:
                words = "feature scattering has a loss of its own" if name == "FeatureScatter" else setting
                assert setting in str(error) or words in str(error) or name in str(error), (setting, value, str(error))
            else:
                taken.append(f"{setting}={value!r}")
    assert not taken


@pytest.mark.parametrize("name", ["PGD", "APGD", "FeatureScatter", "LocalSearch"])
def test_inputs_of_the_wrong_kind(model, name):
    x, y = samples(4)
    last = x.permute(0, 2, 3, 1)
    for inputs, words in (
        (
            last,
            r"\(B, 8, 8, 3\) looks like images with channels last, expected \(B, C, H, W\).*transpose\(0, 3, 1, 2\)",
        ),
        (last.numpy(), "channels last"),
        (last.contiguous(), "channels last"),
        (x.double(), r"x must be torch.float32 as the model's weights are, got torch.float64.*numpy makes by itself"),
        (x.numpy().astype(np.float64), "as the model's weights are, got torch.float64"),
        (x.half(), "as the model's weights are, got torch.float16"),
        ((255 * x).byte(), "divide pixels by 255"),
        ((255 * x).byte().numpy(), "divide pixels by 255"),
        (x.tolist(), "x must be floats"),
        (list(x), "x must be floats"),
        (None, "x must be floats"),
        ("x", "x must be floats"),
        (x.numpy().astype(object), "x must be floats"),
        (x.bool(), "x must be floats"),
        (x.to(torch.complex64), "x must be floats"),
        (x.to_sparse(), "dense tensor"),
        (x.to("meta"), "dense tensor with values"),
        (x[0, 0, 0], "x must be floats"),
    ):
        with pytest.raises(InputError, match=words):
            made(name, model)(inputs, y)
    for labels in ("y", ["a"] * 4, y[:2], y[:, None], [1, 2], 3, [[1], [2], [3], [4]], y + 2**40, -y - 2, y.float(),
                   y.bool(), nn.functional.one_hot(y, 5), np.array(["1", "2", "3", "4"]), y.numpy().astype(object)
                   ):  # fmt: skip
        with pytest.raises(InputError, match=r"^y must|labels from"):
            made(name, model)(x, labels)
    for index in ("index", [0, 1], [0.5] * 4, 3, torch.ones(4), ["a"] * 4, [[0]] * 4, object()):
        with pytest.raises(InputError, match=r"^index must"):
            made(name, model)(x, y, index=index)
    for start in ("start", x[:2], 3, [1, 2], x * torch.nan, object()):
        with pytest.raises(InputError, match=r"^start must"):
            made(name, model)(x, y, start=start)


@pytest.mark.parametrize("name", ["PGD", "CW", "APGD", "LocalSearch"])
def test_labels_of_any_integer_kind(model, name):
    x, y = samples(4)
    want = made(name, model)(x, y)
    for labels in (y.int(), y.byte(), y.tolist(), tuple(y.tolist()), y.numpy(), y.numpy().astype(np.uint16),
                   y.numpy().astype(np.uint64), y.short()):  # fmt: skip
        assert torch.equal(made(name, model)(x, labels), want)
    for inputs in (x.contiguous(memory_format=torch.channels_last), nn.Parameter(x.clone()), x.flip(0).flip(0)):
        assert torch.equal(made(name, model)(inputs, y), want)


def test_a_list_of_targets_of_the_wrong_length(model):
    x = samples(4)[0]
    for name in ("PGD", "FGSM", "MIFGSM", "CW"):
        for targets in ([1, 2], [1, 2, 3, 4, 0], torch.tensor([1]), np.array([], dtype=np.int64)):
            with pytest.raises(InputError, match=r"y must have a row for each of 4 samples, got shape"):
                made(name, model, targeted="label")(x, targets)


def test_channels_last_is_said_first_where_channels_have_values(model):
    x, y = samples(4)
    with pytest.raises(InputError, match=r"normalize must be .*each of 8 channels, got 3 and 3 .*channels last"):
        attacks.PGD(model, normalize=([0.5] * 3, [0.2] * 3))(x.permute(0, 2, 3, 1), y)
    for options in (
        {"eps": torch.full((1, 3), EPS)},
        {"alpha": torch.full((1, 3), EPS)},
        {"bounds": (torch.zeros(1, 3), 1.0)},
    ):
        with pytest.raises(InputError, match=r"channels last|must be a number"):
            attacks.PGD(model, **options)(x.permute(0, 2, 3, 1), y)


def test_channels_last_is_no_matter_where_the_model_takes_it():
    x, y = torch.rand(4, 8, 8, 3), torch.tensor([0, 1, 0, 1])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert attacks.PGD(flat, EPS, ALPHA, 2)(x, y).shape == x.shape


ODD = [
    None,
    "text",
    "2",
    -1,
    2.5,
    [1, 2],
    [],
    (),
    {},
    object(),
    float("nan"),
    np.array([1, 2]),
    torch.ones(2),
    b"x",
    1j,
    {"a": 1},
]
MEANT = {  # what of ODD each argument takes
    "attacks": [None],
    "surrogate": [None],
    "keep": [None, "text", "2"],
    "seed": [],
    "scale": [2.5],
    "most": [],
    "eps": [2.5],
    "k": [[1, 2], np.array([1, 2])],
}


def taken(call, arguments, names):
    """Which odd values of these arguments are not refused."""
    result = []
    for name in names:
        for value in ODD:
            if any(value is v or (type(value) is type(v) and np.array_equal(value, v)) for v in MEANT.get(name, [])):
                continue
            try:
                call(**{**arguments, name: value})
            except InputError:
                continue
            result.append((name, value))
    return result


def test_arguments_of_rankings_transfers_checks_and_reports(model, tmp_path, monkeypatch):
    from cmr_fast.attacks import checks, registry
    from cmr_fast.reports import recall, robustness

    monkeypatch.chdir(tmp_path)  # names of folders are among the odd values

    model.eval()
    x, y = samples(6)
    other = network(3).eval()
    ranked = {"encode": model, "x": x, "gallery": model(x).detach(), "relevant": torch.eye(6).bool(), "k": (1,)}
    more = {"eps": 0.03, "attacks": ("pgd1",), "restarts": 1, "codes": False, "scale": 100.0, "batch": 4, "seed": 0}
    assert not taken(attacks.recall_under_attack, {**ranked, **more}, [*ranked, *more, "bounds"])
    assert not taken(attacks.Ranker, {"encode": model, "gallery": x[:, 0, 0]}, ["encode", "gallery", "scale", "codes"])
    crafted = {"victim": model, "surrogate": other, "attack": attacks.PGD, "steps": 1}
    assert not taken(lambda **o: attacks.Transfer(**o)(x, y), crafted, ["victim", "attack", "steps"])
    assert not taken(attacks.Transfer(**crafted), {"x": x, "y": y}, ["x", "y"])
    of_checks = {
        checks.random_output: ["passes"],
        checks.zero_gradient: ["most"],
        checks.softmax_given: [],
        checks.black_box: ["steps", "attacks"],
        checks.plateau: ["steps", "most"],
    }
    for check, names in of_checks.items():
        assert not taken(check, {"model": model, "x": x, "y": y}, ["model", "x", "y", *names])
    settings = robustness.Settings(images=6, few=3, batch=4)
    report = {"model": model, "x": x, "y": y, "names": ["clean"], "settings": settings}
    assert not taken(robustness.attack_all, report, ["model", "x", "y", "names", "keep"])
    assert not taken(registry.check_names, {"names": ["pgd2"]}, ["names"])
    with pytest.raises(InputError, match="encode must be"):
        recall.examine("text", x, ranked["gallery"], ranked["relevant"], eps=0.1, k=(1,))
    for eps, steps in (([], (1, 2)), (0.1, 3), ("0.1", (1, 2)), (0.1, [])):
        with pytest.raises(InputError, match="must be"):
            checks.large_eps(model, x, y, eps=eps) if steps == (1, 2) else checks.more_steps(model, x, y, steps=steps)
    with pytest.raises(InputError, match="eps above 0"):
        checks.plateau(model, x, y, eps=0)


def test_an_error_of_the_model_itself_is_left_as_it_is(model):
    def broken(z):
        raise RuntimeError("its own")

    for inputs in (torch.rand(2, 3, 8, 8), torch.rand(2, 192)):
        with pytest.raises(RuntimeError, match="its own"):
            attacks.PGD(broken)(inputs, torch.tensor([0, 1]))


@pytest.mark.parametrize("value", [1 + 1e-6, 1.004, -1e-7, -0.002])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_a_pixel_just_outside_is_not_called_normalised(model, value, bounds):
    """Bicubic resizing and JPEG leave such: how many, how far, where, and what to do."""
    low, high = bounds
    x, y = samples(4)
    x = low + (high - low) * x
    x[2, 1, 3, 3] = low + (high - low) * value
    if low < float(x.min()) and float(x.max()) <= high:
        pytest.skip("inside after rounding")
    eps = EPS * (high - low)
    with pytest.raises(
        InputError, match=r"1 of 768 values lie outside, by at most .*sample 2.*clip them first"
    ) as error:
        attacks.PGD(model, eps, eps / 4, 1, bounds=bounds, check=False)(x, y)
    assert "normalis" not in str(error.value) and "255;" not in str(error.value)
    attacks.PGD(model, eps, eps / 4, 1, bounds=bounds, check=False)(x.clip(low, high), y)


def test_pixels_to_255_and_normalised_ones_are_called_so_still(model):
    x, y = samples(4)
    for inputs, words in ((255 * x, "0 to 255"), (4 * x - 2, "look normalised"), (x - 0.5, "look normalised")):
        with pytest.raises(InputError, match=words):
            attacks.PGD(model)(inputs, y)


# --- what is decided is what is returned


class Wide(nn.Module):
    """Takes any float type, and sees its rounding."""

    def __init__(self, seed):
        super().__init__()
        self.inner = network(seed)

    def forward(self, x):
        return self.inner(x.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("l2", 0.15)])
def test_early_stop_fools_as_many_in_16_bits(dtype, norm, eps):
    full = short = 0
    for seed in range(4):
        model = Wide(seed).eval()
        x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        options = {"eps": eps, "norm": norm, "strict": True}
        for make in (attacks.PGD, attacks.APGD):
            masks = []
            for stop in (False, True):
                adv, info = make(model, steps=10, early_stop=stop, **options)(x.to(dtype), y, return_info=True)
                masks.append(model(adv).argmax(1) != y)
                assert torch.equal(masks[-1], info.success)
                delta = (adv.double() - x.to(dtype).double()).flatten(1)
                assert (((delta.abs().amax(1)) if norm == "linf" else delta.norm(dim=1)) <= eps).all()
            if make is attacks.APGD:
                assert torch.equal(*masks)
            else:
                full, short = full + int(masks[0].sum()), short + int(masks[1].sum())
    assert short >= full > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_restarts_and_local_search_keep_what_fools_once_returned(dtype):
    model = Wide(1).eval()
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    one, several = (
        attacks.PGD(model, 4 / 255, None, 5, restarts=n)(x.to(dtype), y, return_info=True)[1].success for n in (1, 4)
    )
    assert (several | ~one).all()
    adv, info = attacks.LocalSearch(model, 0.05, 10)(x.to(dtype), y, return_info=True)
    assert torch.equal(model(adv).argmax(1) != y, info.success) and info.success.any()


@pytest.mark.parametrize("eps", [None, 0.05])
def test_local_search_returns_the_best_point_not_the_last(model, eps):
    x, y = samples(24)
    options = {"success": lambda z, t: torch.zeros(len(z), dtype=torch.bool), "candidates": 6, "t": 4}
    adv, info = attacks.LocalSearch(model, eps, 20, **options)(x, y, return_info=True)
    highest = torch.maximum(info.losses.amax(0), info.loss)
    assert torch.equal(info.loss, highest)
    assert (info.losses[-1] < highest - 1e-4).any()  # some had come down again
    net = copy.deepcopy(model).eval()
    torch.testing.assert_close(nn.functional.cross_entropy(net(adv), y, reduction="none"), info.loss)


# --- no bit of a sample depends on its batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", None])
def test_a_step_in_l2_does_not_depend_on_the_batch(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 3, 33, 31), (64, 7), (33, 3, 5, 5), (40, 1, 1000)):
        origin, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        x = origin + 0.01 * gradient.flip(0)
        options = {"alpha": 0.3, "eps": 0.4, "bounds": (-9.0, 9.0), "norm": "l2", "backend": backend}
        whole = pgd_step_(x.clone(), gradient, origin, **options)
        for size in (1, 2, 7, 32):
            pieces = [
                pgd_step_(x[rows].clone(), gradient[rows], origin[rows], **options)
                for rows in torch.arange(shape[0]).split(size)
            ]
            assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_and_momentum_do_not_depend_on_the_batch(norm):
    x, y = torch.rand(24, 3, 9, 7, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4
    weight = torch.randn(189, 4, generator=torch.Generator().manual_seed(1)).double()

    def each(z):  # a model whose own bits do not depend on the batch
        return torch.stack([(row.flatten().double()[:, None] * weight).sum(0) for row in z])

    for make in (
        lambda: attacks.PGD(each, 0.3, None, 3, norm=norm, momentum=0.9, check=False),
        lambda: attacks.APGD(each, 0.1, 4, norm=norm, check=False),
    ):
        whole = make()(x, y)
        pieces = [make()(x[r], y[r], index=r) for r in torch.arange(24).split(5)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("name", ["FGSM", "PGD", "MIFGSM", "CW", "APGD", "FeatureScatter", "LocalSearch", "Ranker"])
def test_first_layer_may_work_in_place(name):
    """The result is that of the same model without it, and x stays as it is."""
    x, y = samples(4)
    plain = nn.Sequential(nn.Threshold(0.4, 0.1), network().eval())
    in_place = nn.Sequential(nn.Threshold(0.4, 0.1, inplace=True), plain[1])
    kept, found = x.clone(), []
    for model in (plain, in_place):
        if name == "Ranker":
            model, labels = attacks.Ranker(model, torch.eye(5)), torch.eye(5).bool()[y]
            atk = attacks.PGD(model, EPS, ALPHA, 2, loss=attacks.losses.ranking_ce)
        else:
            atk, labels = getattr(attacks, name)(model, eps=EPS), y
            atk.steps = min(getattr(atk, "steps", 1), 3)
        found.append(atk(x, labels, return_info=True))
    (adv, info), (again, other) = found
    assert torch.equal(adv, again) and torch.equal(info.loss, other.loss) and torch.equal(x, kept)
    assert not torch.equal(adv, x)


def test_info_prints_on_one_line(model):
    x, y = samples(4)
    info = attacks.PGD(model, EPS, ALPHA, 2)(x, y, return_info=True)[1]
    assert "\n" not in repr(info) and "tensor(" not in repr(info) and len(repr(info)) < 160
    assert repr(info).startswith("AttackInfo(") and f"{int(info.success.sum())} of 4" in repr(info)
