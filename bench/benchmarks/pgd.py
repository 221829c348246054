"""PGD-10 on timm's resnet10t (random weights), 32 x 3 x 64 x 64, one thread, against torchattacks and adv-lib, and the
step alone against the eager formula. Labels are the network's own predictions, so that success means something
untrained."""

import time
from typing import Any

import torch
from torch import Tensor

import cmr_fast as cf
from cmr_fast.ops import pgd_step_

from .common import QUICK, Comparison, cost

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
REPEATS = 10  # steps in a row: one is too short to time
SHAPE = (32, 3, 64, 64)
FAST: dict[str, Any] = {"dtype": torch.bfloat16, "channels_last": True, "fold": True}


def network() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10)
    with torch.no_grad():  # statistics of data, so that activations are of ordinary size
        for _ in range(20):
            model(torch.rand(SHAPE))
    return model.eval()


def problem(model: torch.nn.Module, batch: int = SHAPE[0]) -> tuple[Tensor, Tensor]:
    x = torch.rand(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


def eager_step(x: Tensor, gradient: Tensor, origin: Tensor) -> Tensor:
    """torchattacks' update, as it is written there."""
    x = x.detach() + ALPHA * gradient.sign()
    delta = torch.clamp(x - origin, min=-EPS, max=EPS)
    return torch.clamp(origin + delta, min=0, max=1).detach()


def eager_l2_step(x: Tensor, gradient: Tensor, origin: Tensor) -> Tensor:
    """The same of torchattacks' PGDL2."""
    batch = len(x)
    norms = torch.norm(gradient.view(batch, -1), p=2, dim=1) + 1e-10
    x = x.detach() + 0.2 * (gradient / norms.view(batch, 1, 1, 1))
    delta = x - origin
    norms = torch.norm(delta.view(batch, -1), p=2, dim=1)
    factor = torch.min(1.0 / norms, torch.ones_like(norms))
    return torch.clamp(origin + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()


def bandwidth(elements: int) -> float:
    """G elements a second that move 16 bytes each, at the speed of two reads and a write of arrays of this size."""
    a, b, c = (torch.rand(elements) for _ in range(3))
    torch.add(a, b, out=c)
    start = time.perf_counter()
    for _ in range(REPEATS):
        torch.add(a, b, out=c)
    return 12 * elements * REPEATS / (time.perf_counter() - start) / 16 / 1e9


def step(shape: tuple[int, ...], norm: str = "linf") -> Comparison:
    generator = torch.Generator().manual_seed(0)
    origin, gradient = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    x = origin.clone()
    eager = eager_step if norm == "linf" else eager_l2_step
    options: dict[str, Any] = {"alpha": ALPHA, "eps": EPS} if norm == "linf" else {"alpha": 0.2, "eps": 1.0}

    def ours() -> None:
        for _ in range(REPEATS):
            pgd_step_(x, gradient, origin, norm=norm, threads=1, **options)

    def theirs() -> None:
        at = x
        for _ in range(REPEATS):
            at = eager(at, gradient, origin)

    def check() -> None:
        want = eager(origin, gradient, origin)
        got = pgd_step_(origin.clone(), gradient, origin, norm=norm, threads=1, **options)
        if norm == "linf":
            assert torch.equal(got, want), "the bits differ from the eager formula's"
        else:
            assert (got - want).abs().max() < 1e-6, "apart from the eager formula by more than rounding"

    return Comparison(
        name=f"{norm} step alone, {' x '.join(map(str, shape))}",
        alternative="torchattacks' eager formula",
        ours=ours,
        theirs=theirs,
        check=check,
        work=REPEATS * x.numel() / 1e9,
        unit="G elements",
        limit=(lambda: bandwidth(x.numel())) if norm == "linf" else None,
    )


def torchattacks_pgd(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import torchattacks

    return torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS, random_start=False)(x, y)


def adv_lib_pgd(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Keeps what fooled the network last, so it looks at STEPS iterates, of which the first is x itself."""
    from adv_lib.attacks import pgd_linf

    return pgd_linf(model, x, y, eps, steps=STEPS, random_init=False, absolute_step_size=eps / 4)


OTHERS = {"torchattacks": torchattacks_pgd, "adv-lib": adv_lib_pgd}


def fooled(model: torch.nn.Module, adv: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(adv).argmax(dim=1) != y).float().mean())


def attack(
    name: str, options: dict[str, Any], eps: float = EPS, exact: bool = False, batch: int = SHAPE[0],
    other: str = "torchattacks",
) -> Comparison:  # fmt: skip
    model = network()
    x, y = problem(model, batch)
    ours = cf.attacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS, random_start=False, **options)

    def theirs() -> Tensor:
        return OTHERS[other](model, x, y, eps)

    def check() -> None:
        mine, found = ours(x, y), theirs()
        rates = fooled(model, mine, y), fooled(model, found, y)
        assert (found - x).abs().max() <= eps + 1e-6, f"{other} leaves the ball"
        assert rates[0] >= rates[1], f"fools {rates[0]:.1%}, {other} {rates[1]:.1%}"
        assert not exact or torch.equal(mine, found), f"the bits differ from {other}'s"

    return Comparison(
        name=f"PGD-{STEPS} {name}, resnet10t, {batch} x 3 x 64 x 64",
        alternative=f"{other} PGD, fp32",
        ours=lambda: ours(x, y),
        theirs=theirs,
        check=check,
        work=batch * STEPS,
        unit="sample steps",
    )


def half_robust(model: torch.nn.Module, wrong: int) -> tuple[Tensor, Tensor, float]:
    """Samples, labels and the radius at which PGD leaves half right; `wrong` samples are misclassified as they are."""
    x, y = problem(model)
    y[:wrong] = (y[:wrong] + 1) % 10
    low, high = 0.0, EPS
    for _ in range(8):
        middle = (low + high) / 2
        adv = cf.attacks.PGD(model, eps=middle, alpha=middle / 4, steps=STEPS, random_start=False)(x, y)
        low, high = (middle, high) if fooled(model, adv, y) < 0.5 else (low, middle)
    return x, y, high


def early_stop(options: dict[str, Any], name: str, wrong: int) -> Comparison:
    """What early stop adds: with it against without, everything else the same."""
    model = network()
    x, y, eps = half_robust(model, wrong)
    common = {"eps": eps, "alpha": eps / 4, "steps": STEPS, "random_start": False, **options}
    short, full = cf.attacks.PGD(model, early_stop=True, **common), cf.attacks.PGD(model, **common)
    right = f"{fooled(model, x, y):.0%} wrong before, {fooled(model, full(x, y), y):.0%} after"

    def check() -> None:
        rates = fooled(model, short(x, y), y), fooled(model, full(x, y), y)
        assert rates[0] >= rates[1], f"fools {rates[0]:.1%}, without early stop {rates[1]:.1%}"

    return Comparison(
        name=f"PGD-{STEPS} {name}, early stop, {right}",
        alternative="ours without early stop",
        ours=lambda: short(x, y),
        theirs=lambda: full(x, y),
        check=check,
        work=SHAPE[0] * STEPS,
        unit="sample steps",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [
            step((4, 3, 16, 16)),
            step((4, 3, 16, 16), "l2"),
            attack("fp32", {}, exact=True, batch=2),
            attack("fp32", {}, batch=2, other="adv-lib"),
        ]
    return [
        step(SHAPE),
        step((128, 3, 224, 224)),
        step(SHAPE, "l2"),
        attack("fp32, same bits", {}, exact=True),
        attack("fp32, channels_last and fold", {"channels_last": True, "fold": True}),
        attack("bf16 and channels_last", {"dtype": torch.bfloat16, "channels_last": True}),
        attack("bf16, channels_last and fold", FAST),
        attack("fp32", {}, other="adv-lib"),
        attack("bf16, channels_last and fold", FAST, other="adv-lib"),
        *(early_stop(options, name, wrong) for wrong in (0, 5) for options, name in ((FAST, "bf16"), ({}, "fp32"))),
    ]


class Step:
    """Lower is better: seconds, and our time as a share of the eager formula's."""

    version = "1"
    params = (("linf", "l2"),)
    param_names = ("norm",)

    def setup(self, norm: str) -> None:
        self.comparison = step(SHAPE, norm)

    def time_step(self, norm: str) -> None:
        self.comparison.ours()

    def track_time_over_eager(self, norm: str) -> float:
        return cost(lambda: self.comparison)

    track_time_over_eager.unit = "ours / eager"


class Attack:
    """Lower is better: our time as a share of theirs, the same bits as torchattacks."""

    version = "1"
    timeout = 600

    def track_time_over_torchattacks(self) -> float:
        return cost(lambda: attack("fp32", {}, exact=True, batch=4 if QUICK else SHAPE[0]))

    def track_time_over_adv_lib(self) -> float:
        return cost(lambda: attack("fp32", {}, batch=4 if QUICK else SHAPE[0], other="adv-lib"))

    track_time_over_torchattacks.unit = "ours / torchattacks"
    track_time_over_adv_lib.unit = "ours / adv-lib"
