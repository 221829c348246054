"""A step of an attack on a GPU, in CUDA and in Triton, against the eager formula and against a copy of as many bytes:
`python bench/benchmarks/pgd_cuda.py [--json FILE]`.

The copy is the limit: 16 bytes an element for L-inf (three reads, a write), 28 for L2 (twice three reads, and a write).
Times are device times of graphs that hold the same step several times, so that they are of the device alone, and
`called`, of one call after another as a program makes them. L-inf must have the bits of the eager formula, L2 be within
rounding of it. Noise is measured against torch's own random numbers.
"""

from functools import partial

import torch
from torch import Tensor

from cmr_fast.ops import _dispatch, pgd_noise, pgd_step_

try:
    from .gpu import Call, Report, graph_of, in_turn, median, ratio
except ImportError:  # started as a program
    from gpu import Call, Report, graph_of, in_turn, median, ratio

SHAPES = ((128, 3, 224, 224), (512, 3, 32, 32), (1, 3, 224, 224))
BYTES = {"linf": 16, "l2": 28}  # an element
SIZES = {"linf": (2 / 255, 8 / 255), "l2": (0.5, 1.0)}  # alpha, eps
REPEATS = 10  # steps of a graph


def eager_linf(x: Tensor, gradient: Tensor, origin: Tensor, alpha: float, eps: float) -> Tensor:
    """torchattacks' update, as it is written there."""
    x = x.detach() + alpha * gradient.sign()
    delta = torch.clamp(x - origin, min=-eps, max=eps)
    return torch.clamp(origin + delta, min=0, max=1).detach()


def eager_l2(x: Tensor, gradient: Tensor, origin: Tensor, alpha: float, eps: float) -> Tensor:
    """The same of torchattacks' PGDL2."""
    batch = len(x)
    norms = torch.norm(gradient.view(batch, -1), p=2, dim=1) + 1e-10
    x = x.detach() + alpha * (gradient / norms.view(batch, 1, 1, 1))
    delta = x - origin
    norms = torch.norm(delta.view(batch, -1), p=2, dim=1)
    factor = torch.min(eps / norms, torch.ones_like(norms))
    return torch.clamp(origin + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()


EAGER = {"linf": eager_linf, "l2": eager_l2}


def problem(shape: tuple[int, ...]) -> list[Tensor]:
    """x within what either norm allows, gradient, origin."""
    origin, gradient = torch.rand(shape, device="cuda"), torch.randn(shape, device="cuda")
    return [(origin + 0.01 * torch.randn_like(origin)).clamp(0, 1), gradient, origin]


def backends() -> list[str]:
    return [name for name in ("cuda", "triton") if _dispatch.unavailable(name, "cuda") is None]


def steps(x: Tensor, gradient: Tensor, origin: Tensor, norm: str) -> dict[str, Call]:
    """One step of every contender, and the copy."""
    alpha, eps = SIZES[norm]
    options = {"norm": norm, "alpha": torch.full((1, 1), alpha).cuda(), "eps": torch.full((1, 1), eps).cuda()}
    options["bounds"] = (torch.zeros(1, 1).cuda(), torch.ones(1, 1).cuda())
    calls: dict[str, Call] = {
        name: partial(pgd_step_, x, gradient, origin, backend=name, **options) for name in backends()
    }
    source = torch.zeros(x.numel() * BYTES[norm] // 2, dtype=torch.uint8, device="cuda")
    calls["eager"] = partial(EAGER[norm], x, gradient, origin, alpha, eps)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    return calls


def check(x: Tensor, gradient: Tensor, origin: Tensor, norm: str) -> None:
    alpha, eps = SIZES[norm]
    want = EAGER[norm](x, gradient, origin, alpha, eps)
    for name in backends():
        got = pgd_step_(x.clone(), gradient, origin, alpha=alpha, eps=eps, norm=norm, backend=name)
        if norm == "linf":
            assert torch.equal(got, want), f"{name}: the bits differ from the eager formula's"
        else:
            assert (got - want).abs().max() < 1e-6, f"{name}: apart from the eager formula by more than rounding"


def step(report: Report, shape: tuple[int, ...], norm: str) -> dict[str, object]:
    tensors = problem(shape)
    check(*tensors, norm)
    calls = steps(*tensors, norm)
    graphs = in_turn({name: graph_of(call, REPEATS) for name, call in calls.items()}, report.rounds)
    called = in_turn(calls, report.rounds)
    found: dict[str, object] = {f"{name}_s": median(graphs, name) / REPEATS for name in calls}
    moved = tensors[0].numel() * BYTES[norm]
    for name in (*backends(), "copy"):
        found[f"{name}_GB_s"] = moved * REPEATS / median(graphs, name) / 1e9
    for name in backends():
        found[f"{name}_share_of_copy"] = ratio(graphs, "copy", name)
        found[f"{name}_over_eager"] = ratio(graphs, "eager", name)
        found[f"{name}_called_s"] = median(called, name)
        found[f"{name}_called_over_eager"] = ratio(called, "eager", name)
    return found


def noise(report: Report, samples: int, count: int) -> dict[str, object]:
    index, out = torch.arange(samples, device="cuda"), torch.empty((samples, count), device="cuda")
    assert torch.equal(pgd_noise(index[-2:], count).cpu(), pgd_noise(index[-2:].cpu(), count)), "differs from the CPU"
    calls: dict[str, Call] = {"ours": lambda: pgd_noise(index, count), "torch": lambda: out.uniform_(-1, 1)}
    times = in_turn(calls, report.rounds)
    rate = 4 * samples * count / median(times, "ours") / 1e9
    return {
        "ours_s": median(times, "ours"), "torch_s": median(times, "torch"), "ours_GB_s": rate,
        "ours_over_torch": ratio(times, "torch", "ours"),
    }  # fmt: skip


def main() -> int:
    report = Report(__doc__, "cuda")
    shapes = ((4, 3, 32, 32), (1, 3, 64, 64)) if report.quick else SHAPES
    for shape in shapes:
        for norm in BYTES:
            name = f"{norm} step, {' x '.join(map(str, shape))}"
            report.row(name, lambda shape=shape, norm=norm: step(report, shape, norm))
    samples, count = shapes[0][0], 3 * shapes[0][2] ** 2
    report.row(f"noise, {samples} x {count:,}, against uniform_", lambda: noise(report, samples, count))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
