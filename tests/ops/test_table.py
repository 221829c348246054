"""Every op x every backend x every habit of torch's: one list of cases an op, and the rest is generated.

An op of torch.ops.cmr_fast that has no case here fails the first test. What a habit leaves of an op is either the right
value, by the float64 oracle and the error budget of CONTRIBUTING.md's rule 5, or an InputError.

Triton reads TRITON_INTERPRET when it is imported: `test_triton_under_the_interpreter` starts this file again with it.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from ways import ISAS

from cmr_fast import ops
from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch, _reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op: what to call it with, and what is right."""

    op: str
    call: Callable[..., Any]  # (**inputs, backend=...)
    inputs: Callable[[int, int], Inputs]  # of two sizes, the second as large as the first or larger
    right: Callable[
        ..., Any
    ]  # (**inputs) in the dtype of the inputs: in float64 it is the truth, in others eager torch
    leaves: tuple[str, ...] = ()  # inputs with a gradient
    backward: str | None = None  # the op that makes it
    oracle: Callable[..., Any] | None = None  # the same by _reference.py
    numbers: tuple[tuple[str, Any], ...] = ()  # arguments that are numbers, and one that is right
    words: tuple[str, ...] = ()  # arguments that are words
    aliased: tuple[str, str] | None = None  # inputs that may be one tensor
    zeros: Callable[[Inputs], Inputs] | None = None  # the inputs without mass
    empty: tuple[tuple[int, int], ...] = ((0, 0), (0, 4))
    differentiable: dict[str, Any] = field(default_factory=dict)  # options without which outputs are constants
    changes: str | None = None  # the input that is changed in place
    public: bool = True  # arguments are checked

    @property
    def backends(self) -> list[str]:
        here = [b for b in _dispatch.BACKENDS.get(self.op, {}).get("cpu", ("torch",)) if b != "cpp" or ISAS]
        triton = "triton" in _dispatch.BACKENDS.get(self.op, {}).get("cuda", ())
        if self.op == "sigmoid_pairs":
            return ["torch"] if not INTERPRETED else []
        return ["triton"] if INTERPRETED and triton else [] if INTERPRETED else [b for b in here if b != "triton"]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed + sum(shape)))


def whole(high: int, *shape: int, dtype: torch.dtype = torch.int64, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator("cpu").manual_seed(seed + sum(shape))).to(dtype)


def codes(n: int, m: int) -> Inputs:
    return {"q": whole(256, n, 5, dtype=torch.uint8), "db": whole(256, m + 3, 5, dtype=torch.uint8, seed=1)}


def pairs(n: int, m: int) -> Inputs:
    text = draw(m, 8, seed=1)
    image = draw(n, 8) + text[:n]
    return {"image": F.normalize(image), "text": F.normalize(text), "scale": torch.tensor(9.0)}


def by_rank(name: str, **options: Any) -> Callable[..., Any]:
    def oracle(q: Tensor, db: Tensor, **rest: Tensor) -> Any:
        return getattr(_reference, name)(q.numpy(), db.numpy(), **options)

    return oracle


# Eager torch, in the dtype that it is given.


def eager_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    z = scale.to(image.dtype) * image @ text.T
    own = torch.arange(len(image))
    columns = F.cross_entropy(z.T[: len(image)], own)
    return (F.cross_entropy(z, own) + columns) / 2


def oracle_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> tuple[float, ...]:
    n, m = len(image), len(text)
    result = _reference.info_nce(image.numpy(), text.numpy(), float(scale), np.eye(n, m))
    return (float(result["rows"].mean() + result["columns"][:n].mean()) / 2,)


def eager_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = scale.to(image.dtype) * image @ text.T + bias.to(image.dtype)
    sign = 1 - 2 * torch.eye(*z.shape, dtype=z.dtype)
    return -F.logsigmoid(-sign * z).sum() / max(1, len(image))


def oracle_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[float, ...]:
    n, m = len(image), len(text)
    own = np.eye(n, m, dtype=bool)
    result = _reference.sigmoid_loss(image.numpy(), text.numpy(), float(scale), float(bias), own)
    return (float(result["loss"]) / n,)


def eager_critic(image: Tensor, text: Tensor) -> Tensor:
    t, n = image @ text.T, len(image)
    apart = -F.logsigmoid(-t)
    off = (apart.sum() - apart.diagonal().sum()) / (n * (n - 1))
    return 2 * math.log(2) + F.logsigmoid(t.diagonal()).mean() - off


def distances(x: Tensor, y: Tensor) -> Tensor:
    squares = (x[:, None] - y).square().sum(2)
    return torch.where(squares > 0, squares.clamp(min=1e-30).sqrt(), 0)


def eager_triplet(x: Tensor, labels: Tensor) -> Tensor:
    d, same = distances(x, x), labels[:, None] == labels
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    which = positive[:, :, None] & ~same[:, None, :]
    hinges = (d[:, :, None] + 0.3 - d[:, None, :]).clamp(min=0)
    return torch.where(which, hinges, 0).sum() / which.sum().clamp(min=1)


def eager_acmr(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    relevant = labels[:, None] == labels
    total = image.new_zeros(())
    for d in (distances(image, text), distances(text, image)):
        positives, negatives = relevant.sum(1), (~relevant).sum(1)
        usable = (positives > 0) & (negatives > 0)
        pull = torch.where(relevant, d, 0).sum(1) / positives.clamp(min=1)
        push = torch.where(relevant, 0, (1.5 - d).clamp(min=0)).sum(1) / negatives.clamp(min=1)
        total = total + torch.where(usable, pull + 0.4 * push, 0).sum() / usable.sum().clamp(min=1)
    return total


def eager_pairwise(f: Tensor, g: Tensor, s: Tensor, squared: bool = False) -> Tensor:
    theta = 0.5 * f @ g.T
    soft = -F.logsigmoid(-theta)
    if squared:
        return 0.5 * (0.999 * s.to(f.dtype) * theta - soft).square().sum()
    return (soft - s.to(f.dtype) * theta).sum()


def oracle_pairwise(f: Tensor, g: Tensor, s: Tensor, squared: bool = False) -> tuple[float, ...]:
    mask = s.double().numpy() * (0.999 if squared else 1)
    return (_reference.pairwise(f.numpy(), g.numpy(), mask, squared=squared)[0],)


def eager_sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor) -> Tensor:
    log_mu, log_nu, k = mu.log(), nu.log(), cost / -0.5
    b = torch.where(nu > 0, 0.0, -math.inf).to(cost.dtype).expand(len(cost), -1)
    for _ in range(12):
        a = log_mu - torch.logsumexp(k + b[:, None, :], 2)
        b = log_nu - torch.logsumexp(k + a[:, :, None], 1)
    return (k + a[:, :, None] + b[:, None, :]).exp()


def oracle_sinkhorn(cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[np.ndarray, ...]:
    return (np.stack([_reference.sinkhorn(c, 0.5, mu, nu, 12)[0] for c in cost.numpy()]),)


def eager_ipot(cost: Tensor, mu: Tensor, nu: Tensor) -> Tensor:
    kernel, plan = (cost / -0.5).exp(), torch.ones_like(cost)
    rows, columns = (mu > 0).to(cost.dtype), (nu > 0).to(cost.dtype)
    sigma = columns.expand(len(cost), -1) / cost.shape[2]
    for _ in range(6):
        q = kernel * plan
        delta = mu / torch.where(rows > 0, (q @ sigma[:, :, None])[:, :, 0], 1)
        sigma = nu / torch.where(columns > 0, (q.mT @ delta[:, :, None])[:, :, 0], 1)
        plan = delta[:, :, None] * q * sigma[:, None, :]
    return plan


def oracle_ipot(cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[np.ndarray, ...]:
    return (np.stack([_reference.ipot(c, 0.5, mu, nu, 6) for c in cost.numpy()]),)


def transport(n: int, m: int) -> Inputs:
    mu, nu = (whole(9, k, seed=k).float() + 1 for k in (5, 7))
    cost = draw(m, 5, 7).sigmoid()
    return {"cost": cost, "mu": mu / mu.sum(), "nu": nu / nu.sum()}


def massless(given: Inputs) -> Inputs:
    """Rows and columns without mass."""
    mu, nu = given["mu"].clone(), given["nu"].clone()
    mu[1], nu[0], nu[4] = 0, 0, 0
    return given | {"mu": mu / mu.sum(), "nu": nu / nu.sum()}


def eager_step(x: Tensor, gradient: Tensor, origin: Tensor, norm: str = "linf") -> Tensor:
    if norm == "linf":
        delta = (x + 0.1 * gradient.sign() - origin).clamp(-0.15, 0.15)
    else:
        size = gradient.flatten(1).norm(dim=1)[:, None, None]
        delta = x + 0.1 * gradient / torch.where(size > 0, size, 1) - origin
        far = delta.flatten(1).norm(dim=1)[:, None, None]
        delta = delta * torch.where(far > 0.15, 0.15 / far, 1)
    return (origin + delta).clamp(0, 1)


def oracle_step(x: Tensor, gradient: Tensor, origin: Tensor, norm: str = "linf") -> tuple[np.ndarray, ...]:
    values = (np.full((1, 1), v) for v in (0.1, 0.15, 0.0, 1.0))
    return (_reference.pgd_step(x.numpy(), gradient.numpy(), origin.numpy(), *values, norm),)


def step(n: int, m: int) -> Inputs:
    start = draw(m, 3, 6).sigmoid()
    return {"x": start + 0.1 * draw(m, 3, 6, seed=1).tanh(), "gradient": draw(m, 3, 6, seed=2), "origin": start}


def ranked(n: int, m: int) -> Inputs:
    return codes(n, m) | {"q_labels": whole(3, n, dtype=torch.int32), "db_labels": whole(3, m + 3, dtype=torch.int32)}


def oracle_ranking(q: Tensor, db: Tensor, q_labels: Tensor, db_labels: Tensor) -> list[np.ndarray]:
    result = _reference.ranking(q.numpy(), db.numpy(), q_labels.numpy(), db_labels.numpy(), k=3)
    return [result[name] for name in ("items", "relevant", "sums", "hits", "first")]


def labelled(*names: str) -> Callable[[int, int], Inputs]:
    def inputs(n: int, m: int) -> Inputs:
        points = {name: draw(m, 6, seed=i) for i, name in enumerate(names)}
        return points | {"labels": torch.arange(m) % 3}

    return inputs


def similar(n: int, m: int) -> Inputs:
    return {"f": draw(n, 6), "g": draw(m, 6, seed=1), "s": (draw(n, m) > 0.5).float()}


def without(*names: str) -> Callable[[Inputs], Inputs]:
    return lambda given: given | {name: torch.zeros_like(given[name]) for name in names}


def one_pass(*, norm: str) -> Case:
    return Case(
        "pgd_step_",
        lambda x, gradient, origin, backend=None, norm=norm, alpha=0.1, eps=0.15, **o: ops.pgd_step_(
            x, gradient, origin, alpha=alpha, eps=eps, norm=norm, backend=backend, **o
        ),
        step,
        lambda **given: eager_step(**given, norm=norm),
        oracle=lambda **given: oracle_step(**given, norm=norm),
        numbers=(("alpha", 0.1), ("eps", 0.15)),
        words=("norm",),
        aliased=("x", "origin"),
        zeros=without("gradient"),
        changes="x",
    )


CASES = [
    Case(
        "pack_codes",
        lambda x, backend=None, threshold=None: ops.pack_codes(x, threshold=threshold),
        lambda n, m: {"x": draw(m, 11)},
        lambda x: torch.from_numpy(_reference.pack_codes((x >= 0).numpy())),
        numbers=(("threshold", 0.0),),
        zeros=lambda given: {"x": torch.where(given["x"] > 1, given["x"], 0)},
    ),
    Case(
        "hamming_topk",
        lambda q, db, backend=None, k=4, threads=None: ops.hamming_topk(q, db, k, backend=backend, threads=threads),
        codes,
        by_rank("hamming_topk", k=4, bits=40),
        numbers=(("k", 4), ("threads", 1)),
        aliased=("q", "db"),
        zeros=without("q", "db"),
    ),
    Case(
        "hamming_range",
        lambda q, db, backend=None, radius=17, threads=None: ops.hamming_range(
            q, db, radius, backend=backend, threads=threads
        ),
        codes,
        by_rank("hamming_range", radius=17),
        numbers=(("radius", 17), ("threads", 1)),
        aliased=("q", "db"),
        zeros=without("q", "db"),
    ),
    Case(
        "hamming_distances",
        lambda q, db, backend=None, threads=None: ops.hamming_distances(q, db, backend=backend, threads=threads),
        codes,
        by_rank("hamming_distances"),
        numbers=(("threads", 1),),
        aliased=("q", "db"),
        zeros=without("q", "db"),
    ),
    Case(
        "ranking",
        lambda q, db, q_labels, db_labels, backend=None, k=3, cut="rank", **o: tuple(
            ops.ranking(q, db, q_labels, db_labels, k=k, cut=cut, backend=backend, **o)
        )[:5],
        ranked,
        oracle_ranking,
        numbers=(("k", 3), ("threads", 1)),
        words=("cut",),
        aliased=("q", "db"),
        zeros=without("q", "db"),
    ),
    Case(
        "triplet_margin",
        lambda x, labels, backend=None, margin=0.3, **o: ops.triplet_margin(x, labels, margin, backend=backend, **o),
        labelled("x"),
        eager_triplet,
        leaves=("x",),
        backward="triplet_margin_backward",
        empty=((0, 0),),
        oracle=lambda x, labels: _reference.triplet_margin(x.numpy(), labels.numpy(), 0.3)[:1],
        numbers=(("margin", 0.3), ("threads", 1)),
        words=("mining", "distance", "reduction"),
        zeros=without("x"),
    ),
    Case(
        "acmr_triplet",
        lambda image, text, labels, backend=None, margin=1.5, weight=0.4, **o: ops.acmr_triplet(
            image, text, labels, margin, weight, backend=backend, **o
        ),
        labelled("image", "text"),
        eager_acmr,
        leaves=("image", "text"),
        backward="acmr_triplet_backward",
        empty=((0, 0),),
        numbers=(("margin", 1.5), ("weight", 0.4), ("threads", 1)),
        words=("reduction",),
        aliased=("image", "text"),
        zeros=without("image", "text"),
    ),
    *(
        Case(
            name,
            lambda f, g, s, backend=None, op=function, **o: op(f, g, s, backend=backend, **o),
            similar,
            lambda f, g, s, squared=squared: eager_pairwise(f, g, s, squared),
            leaves=("f", "g"),
            backward=f"{name}_backward",
            oracle=lambda f, g, s, squared=squared: oracle_pairwise(f, g, s, squared),
            numbers=(("scale", 0.5), ("positive", 0.999 if squared else 1.0), ("threads", 1)),
            words=("reduction",),
            aliased=("f", "g"),
            zeros=without("f"),
        )
        for name, function, squared in (
            ("pairwise_nll", ops.pairwise_nll, False),
            ("pairwise_squared", ops.pairwise_squared, True),
        )
    ),
    Case(
        "info_nce",
        lambda image, text, scale, backend=None, **o: ops.info_nce(image, text, scale, backend=backend, **o),
        pairs,
        eager_info_nce,
        leaves=("image", "text", "scale"),
        backward="info_nce_backward",
        oracle=oracle_info_nce,
        numbers=(("offset", 0), ("threads", 1)),
        words=("direction", "reduction"),
        aliased=("image", "text"),
        zeros=without("image"),
    ),
    Case(
        "sigmoid_loss",
        lambda image, text, scale, bias, backend=None, **o: ops.sigmoid_loss(
            image, text, scale, bias, backend=backend, **o
        ),
        lambda n, m: pairs(n, m) | {"bias": torch.tensor(-2.0)},
        eager_sigmoid,
        leaves=("image", "text", "scale", "bias"),
        backward="sigmoid_loss_backward",
        oracle=oracle_sigmoid,
        numbers=(("threads", 1),),
        words=("reduction",),
        aliased=("image", "text"),
        zeros=without("image"),
    ),
    Case(
        "sigmoid_pairs",
        lambda image, text, scale, bias, backend=None: torch.ops.cmr_fast.sigmoid_pairs(
            image, text, scale, bias, None, None, None, 0, 0.25, 0.25, torch.is_grad_enabled(), backend, None
        )[0],
        lambda n, m: pairs(4, max(4, m)) | {"bias": torch.tensor(-2.0)},
        eager_sigmoid,
        leaves=("image", "text", "scale", "bias"),
        backward="sigmoid_pairs_backward",
        aliased=("image", "text"),
        zeros=without("image"),
        empty=(),
        public=False,
    ),
    Case(
        "js_critic",
        lambda image, text, backend=None, **o: ops.js_critic(image, text, backend=backend, **o),
        lambda n, m: {name: x[:n] for name, x in pairs(n, n).items() if name != "scale"},
        eager_critic,
        leaves=("image", "text"),
        backward="js_critic_backward",
        numbers=(("threads", 1),),
        words=("marginals",),
        aliased=("image", "text"),
        zeros=without("image"),
        empty=(),  # two pairs at least
    ),
    Case(
        "sinkhorn",
        lambda cost, mu, nu, backend=None, reg=0.5, max_iter=12, tol=0.0, **o: ops.sinkhorn(
            cost, reg, max_iter=max_iter, tol=tol, mu=mu, nu=nu, backend=backend, **o
        ),
        transport,
        eager_sinkhorn,
        backward="sinkhorn_backward",
        differentiable={"grad": "implicit"},
        oracle=oracle_sinkhorn,
        numbers=(("reg", 0.5), ("max_iter", 12), ("tol", 0.0), ("threads", 1)),
        words=("stop", "grad"),
        zeros=massless,
        empty=((0, 0),),
    ),
    Case(
        "ipot",
        lambda cost, mu, nu, backend=None, beta=0.5, max_iter=6, **o: ops.ipot(
            cost, beta, max_iter=max_iter, mu=mu, nu=nu, backend=backend, **o
        ),
        transport,
        eager_ipot,
        oracle=oracle_ipot,
        differentiable={"grad": "unrolled"},
        numbers=(("beta", 0.5), ("max_iter", 6), ("inner", 1), ("threads", 1)),
        words=("grad",),
        zeros=massless,
        empty=((0, 0),),
    ),
    one_pass(norm="linf"),
    one_pass(norm="l2"),
    Case(
        "pgd_noise",
        lambda index, backend=None, count=6, seed=5, **o: ops.pgd_noise(index, count, seed=seed, backend=backend, **o),
        lambda n, m: {"index": whole(1 << 40, m)},
        lambda index: torch.from_numpy(
            np.stack([_reference.pgd_noise(5, int(i), 6) for i in index] or [np.zeros((0, 6), np.float32)])
        ).reshape(-1, 6),
        numbers=(("count", 6), ("seed", 5), ("threads", 1)),
    ),
]
EACH = [pytest.param(case, backend, id=f"{case.op}-{backend}") for case in CASES for backend in case.backends]
each = pytest.mark.parametrize(("case", "backend"), EACH)
alone = pytest.mark.skipif(INTERPRETED, reason="asked once, without the interpreter")
SIZES = (4, 7)


@pytest.fixture(autouse=True)
def triton_too(monkeypatch):
    """Under the interpreter triton may be asked for on the CPU."""
    if INTERPRETED:
        for op, devices in _dispatch.BACKENDS.items():
            if "triton" in devices["cuda"]:
                monkeypatch.setitem(devices, "cpu", ("triton", "torch"))
                assert op in {case.op for case in CASES}


def as_tuple(x: Any) -> Outputs:
    parts = x if isinstance(x, (tuple, list)) else (x,)
    return tuple(part if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part)) for part in parts)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def to(given: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) if is_float(x) else x for name, x in given.items()}


def values(call: Callable[..., Any], case: Case, given: Inputs, **options: Any) -> Outputs:
    """Outputs, and the gradients of the leaves."""
    fresh = {name: x.detach().clone() if name == case.changes else x.detach() for name, x in given.items()}
    leaves = [fresh[name].requires_grad_() for name in case.leaves] if torch.is_grad_enabled() else []
    outputs = as_tuple(call(**fresh, **options))
    if not leaves:
        return outputs
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs[0].sum(), leaves)


def ours(case: Case, given: Inputs, backend: str | None) -> Outputs:
    return values(case.call, case, given, backend=backend)


def assert_right(case: Case, given: Inputs, got: Outputs, dtype: torch.dtype = torch.float32) -> None:
    """Integers exact; floats within twice the error of eager torch in the same dtype, plus eps of the largest value."""
    want = values(case.right, case, to(given, torch.float64))
    eager = values(case.right, case, given)
    assert len(got) == len(want)
    for i, (g, e, w) in enumerate(zip(got, eager, want, strict=True)):
        assert g.shape == w.shape, f"output {i}: {tuple(g.shape)}, expected {tuple(w.shape)}"
        if not is_float(g) or not is_float(w):
            assert torch.equal(g.long(), w.long()), f"output {i}"
            continue
        if not w.numel():
            continue
        least = (
            4.0 if INTERPRETED else 1.0 if w.ndim < 2 else 1e-3
        )  # triton adds float32 terms of size 1 where they fall
        eps = torch.finfo(dtype).eps * max(float(w.abs().max()), least)
        error, budget = float((g.double() - w).abs().max()), float((e.double() - w).abs().max())
        assert error <= 2 * budget + eps, f"output {i}: error {error:.3g}, eager torch {budget:.3g}, eps {eps:.3g}"


def assert_same(got: Outputs, want: Outputs) -> None:
    """To the bit, and of the same dtype."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and g.device == w.device and torch.equal(g, w), f"output {i}"


# The table.


@alone
def test_every_op_is_here():
    known = {case.op for case in CASES if case.op != "ipot"} | {case.backward for case in CASES if case.backward}
    registered = {name[10:] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cmr_fast::")}
    assert registered == known, "give it a case in CASES"
    assert set(_dispatch.BACKENDS) <= {case.op for case in CASES}


@alone
@pytest.mark.parametrize("case", [case for case in CASES if case.oracle], ids=lambda case: case.op)
def test_eager_torch_in_float64_is_the_oracle(case):
    given = to(case.inputs(*SIZES), torch.float64)
    for got, want in zip(as_tuple(case.right(**given)), as_tuple(case.oracle(**given)), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-12, atol=1e-13)


@each
def test_value(case, backend):
    for sizes in (SIZES, (2, 2), (33, 40)):
        given = case.inputs(*sizes)
        assert_right(case, given, ours(case, given, backend))


@each
def test_empty(case, backend):
    for sizes in case.empty:
        given = case.inputs(*sizes)
        got = ours(case, given, backend)
        assert all(bool(x.double().isfinite().all()) for x in got)
        if case.leaves:
            assert got[0] == 0 and not any(x.any() for x in got[1:])
        else:
            assert_right(case, given, got)


def transposed(x: Tensor) -> Tensor:
    """Its values, in an order of memory that nobody expects."""
    return x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], -1)[..., 0] if x.ndim else x


@each
def test_transposed(case, backend):
    given = case.inputs(*SIZES)
    odd = {name: x if name == case.changes else transposed(x) for name, x in given.items()}
    assert any(not x.is_contiguous() for x in odd.values())
    assert_right(case, given, ours(case, odd, backend))
    if case.changes:
        with pytest.raises(InputError, match="contiguous"):
            ours(case, given | {case.changes: transposed(given[case.changes])}, backend)


@each
def test_aliased(case, backend):
    """Two arguments that are one tensor: as with a copy."""
    if case.aliased is None:
        pytest.skip("one tensor")
    first, second = case.aliased
    given = case.inputs(7, 7)
    shared = given[first][: len(given[second])]
    rest = {name: x[: len(shared)] if x.ndim else x for name, x in given.items() if name not in case.aliased}
    with torch.no_grad():
        want = as_tuple(case.call(**rest, **{first: shared.clone(), second: shared.clone()}, backend=backend))
        got = as_tuple(case.call(**rest, **dict.fromkeys(case.aliased, shared.clone()), backend=backend))
    assert_same(got, want)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, backend, dtype):
    given = case.inputs(*SIZES)
    want = ours(case, given, backend)
    with torch.autocast("cpu", dtype=dtype):
        got = ours(case, given, backend)
    assert_same(got, want)


@each
def test_forward_mode(case, backend):
    """Refused, or the derivative: never zero without a word."""
    given = case.inputs(*SIZES)
    names = [name for name, x in given.items() if is_float(x)]
    if not names or case.op == "pack_codes":  # a step: its derivative is zero
        pytest.skip("integers")

    def derivative(call: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        wide = to(given, dtype)
        tangents = tuple(draw(*given[name].shape, seed=1).to(dtype) for name in names)
        points = tuple(wide[name].clone() for name in names)
        return torch.func.jvp(lambda *x: call(**wide | dict(zip(names, x, strict=True))), points, tangents)[1]

    try:
        got = derivative(lambda **kw: case.call(**kw, backend=backend, **case.differentiable), torch.float32)
    except InputError as error:
        assert re.search("forward-mode|no derivative|not unrolled", str(error)), error
        return
    torch.testing.assert_close(got.double(), derivative(case.right, torch.float64), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_grad(case, backend):
    """torch.func.grad, alone and inside and outside of vmap, is .backward()'s to the bit; a second one is refused."""
    if not case.leaves:
        pytest.skip("no derivative")
    given = case.inputs(*SIZES)
    want = ours(case, given, backend)[-len(case.leaves) :]
    leaves = [given[name] for name in case.leaves]
    every = tuple(range(len(leaves)))

    def loss(*x: Tensor) -> Tensor:
        return as_tuple(case.call(**given | dict(zip(case.leaves, x, strict=True)), backend=backend))[0].sum()

    gradient = torch.func.grad(loss, argnums=every)
    if not case.public:  # torch.ops itself, below what torch.func reaches
        with pytest.raises(InputError, match=r"torch\.func has no gradient"):
            gradient(*leaves)
        return
    assert_same(gradient(*leaves), want)
    stacked = [torch.stack([x / 2, x]) for x in leaves]
    assert_same([x[1] for x in torch.func.vmap(gradient)(*stacked)], want)
    outside = torch.func.grad(lambda *x: torch.func.vmap(loss)(*x).sum(), argnums=every)
    assert_same([x[1] for x in outside(*stacked)], want)
    with pytest.raises(InputError, match="differentiated once"):
        torch.func.grad(lambda *x: torch.func.grad(loss)(*x).sum())(*leaves)
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.hessian(loss)(*leaves)


@each
def test_vmap(case, backend):
    """Refused, or as a loop over the first axis."""
    given = case.inputs(*SIZES)
    stacked = {name: torch.stack([x, x.flip(0) if x.ndim else x]) for name, x in given.items()}
    fresh = {name: x.clone() for name, x in stacked.items()}
    try:
        got = torch.func.vmap(lambda kw: as_tuple(case.call(**kw, backend=backend)))(fresh)
    except (InputError, RuntimeError) as error:
        assert "vmap" in str(error) or "batch" in str(error).lower() or isinstance(error, InputError), error
        return
    for i in range(2):
        want = ours(case, {name: x[i] for name, x in stacked.items()}, backend)
        for g, w in zip(got, want[: len(got)], strict=True):
            torch.testing.assert_close(g[i], w, rtol=0, atol=0)


@alone
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_compiled_for_any_size(case):
    call = case.call
    if case.op == "pack_codes":  # what it refuses depends on the values
        call = lambda x: torch.ops.cmr_fast.pack_codes(x >= 0)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", dynamic=True, fullgraph=True)
    for sizes, order in ((SIZES, None), ((5, 9), None), ((5, 9), transposed)):
        given = case.inputs(*sizes)
        if order is not None:
            given = {name: x if name == case.changes else order(x) for name, x in given.items()}
        got, want = values(compiled, case, given), values(case.call, case, given)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)
            assert g.stride() == w.stride()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(case, backend, dtype):
    """Taken and right, or refused in words."""
    given = to(case.inputs(*SIZES), dtype)
    if not any(is_float(x) for x in given.values()):
        pytest.skip("integers")
    try:
        got = ours(case, given, backend)
    except InputError as error:
        assert backend != "torch" and ("float32" in str(error) or "bfloat16" in str(error)), error
        return
    assert_right(case, given, got, dtype)


@each
def test_zero_mass(case, backend):
    if case.zeros is None:
        pytest.skip("a number is a number")
    given = case.zeros(case.inputs(*SIZES))
    assert_right(case, given, ours(case, given, backend))


@each
def test_inference_mode(case, backend):
    """Tensors made in it and outside, without gradients."""
    given = case.inputs(*SIZES)
    with torch.no_grad():
        want = ours(case, given, backend)
    with torch.inference_mode():
        assert_same(ours(case, given, backend), want)
        assert_same(ours(case, {name: x.clone() for name, x in given.items()}, backend), want)


@each
def test_other_defaults(case, backend):
    """torch.set_default_device and set_default_dtype change nothing: every tensor inside names its own."""
    given = case.inputs(*SIZES)
    want = ours(case, given, backend)
    torch.set_default_device("meta")
    try:
        on_device = ours(case, given, backend)
    finally:
        torch.set_default_device(None)
    assert_same(on_device, want)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = ours(case, given, backend)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(got, want)


@each
def test_a_second_derivative(case, backend):
    if not case.leaves:
        pytest.skip("no derivative")
    given = case.inputs(*SIZES)
    leaves = [given[name].requires_grad_() for name in case.leaves]
    first = torch.autograd.grad(case.call(**given, backend=backend), leaves, create_graph=True)
    with pytest.raises(InputError, match="differentiated once"):
        sum(x.sum() for x in first).backward()


WRONG = ("2", [1], {}, object(), 1 + 2j, math.nan)


@alone
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_arguments_of_the_wrong_kind(case):
    given = case.inputs(*SIZES)
    for name, x in given.items() if case.public else ():
        kinds = [7j * x, x.to_sparse(), "2", {}, object(), x.to("meta") if len(given) > 1 and x.ndim else "x"]
        if x.ndim:
            kinds += [x[None, None, None], x.tolist()]
        for wrong in kinds:
            with pytest.raises(InputError, match=r"(?i)must|needs|got"):
                case.call(**given | {name: wrong})
    for name, right in case.numbers:
        values(case.call, case, given, **{name: right})
        values(case.call, case, given, **{name: np.asarray(right)[()]})  # numpy's numbers are numbers
        for wrong in WRONG:
            if isinstance(wrong, list) and name in ("alpha", "eps"):
                continue  # as many numbers as samples
            with pytest.raises(InputError, match=rf"{name}.*got"):
                values(case.call, case, given, **{name: wrong})
    for name in case.words:
        for wrong in ("nothing", 1, None, ["sum"]):
            with pytest.raises(InputError, match=rf"{name} must be .*got"):
                values(case.call, case, given, **{name: wrong})


@alone
@pytest.mark.timeout(600)
def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=550", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CMR_FAST_BACKEND": ""}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
