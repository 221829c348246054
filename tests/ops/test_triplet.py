"""Triplet losses against loops over every triplet: every instruction set, the torch path, odd shapes, ties, labels."""

import itertools

import numpy as np
import pytest
import torch

from cmr_fast.ops import _dispatch, _reference, acmr_triplet, triplet, triplet_margin

NATIVE = _dispatch.native()
ISAS = NATIVE.available_isas() if not isinstance(NATIVE, ImportError) else []
DISTANCES = ("euclidean", "squared", "cosine", "dot")
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(params=[*ISAS, "torch"])
def run(request, monkeypatch):
    """Every way to run an op on this machine: each native instruction set, and the portable torch path."""
    if request.param == "torch":
        monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    else:
        monkeypatch.setenv("CMR_FAST_BACKEND", "cpp")
        monkeypatch.setenv("CMR_FAST_ISA", request.param)
    return request.param


def labels(rng, n, classes):
    """`classes` ids where negative, else multi-hot of that width."""
    return rng.integers(0, -classes, n) if classes < 0 else rng.random((n, classes)) < 1.2 / (classes + 1)


def problem(seed, n, others=None, classes=-3, width=5, whole=True):
    """Points of few whole coordinates around 0: distances tie often, their squares and products are exact in float32.

    Or, not whole, of the normal distribution.
    """
    rng = np.random.default_rng(seed)

    def draw(m):
        if not whole:
            return rng.standard_normal((m, width)).astype(np.float32)
        half = rng.integers(-2, 3, (m // 2, width))
        return rng.permutation(np.concatenate([half, -half, np.zeros((m % 2, width))])).astype(np.float32)

    cross = {} if others is None else {"other": draw(others), "other_labels": labels(rng, others, classes)}
    return (draw(n), labels(rng, n, classes)), cross


def gradients(x, labels, margin, other=None, other_labels=None, dtype=torch.float32, **options):
    """Loss, and the gradients of x and other as float64 arrays."""
    leaves = [None if v is None else torch.tensor(v, dtype=dtype).requires_grad_() for v in (x, other)]
    theirs = None if other_labels is None else torch.as_tensor(other_labels)
    mine = torch.as_tensor(labels)
    loss = triplet_margin(leaves[0], mine, margin, other=leaves[1], other_labels=theirs, **options)
    loss.backward()
    return float(loss.detach()), [v.grad.double().numpy() for v in leaves if v is not None]


def oracle_gradients(x, y, weights, distance):
    """Chain rule from the derivative by the distances (A, N), pair by pair; none where a distance is 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    gx, gy = np.zeros_like(x), np.zeros_like(y)
    for i, j in zip(*np.nonzero(weights), strict=True):
        if distance == "dot":
            a, b = -y[j], -x[i]
        elif distance == "cosine":
            nx, ny = np.linalg.norm(x[i]), np.linalg.norm(y[j])
            if nx == 0 or ny == 0:
                continue
            u, v = x[i] / nx, y[j] / ny
            a, b = -(v - u * (u @ v)) / nx, -(u - v * (u @ v)) / ny
        else:
            a = x[i] - y[j]
            a = 2 * a if distance == "squared" else a / max(np.linalg.norm(a), 1e-300)
            b = -a
        gx[i] += weights[i, j] * a
        gy[j] += weights[i, j] * b
    return gx, gy


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", ["squared", "dot"])
@pytest.mark.parametrize("classes", [-3, 4, 70], ids=["ids", "4 labels", "70 labels"])
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_equals_the_loop_over_triplets_ties_included(run, mining, distance, classes, cross):
    """Whole numbers, so that float32 makes no error and every tie is one: losses and gradients are equal."""
    for n, others in ((1, 1), (2, 3), (13, 9), (34, 50)):
        (x, mine), their = problem(n, n, others if cross else None, classes)
        for margin, reduction in itertools.product((0.0, 1.5, 4.0), triplet.REDUCTIONS):
            options = {"mining": mining, "distance": distance, "reduction": reduction}
            want, weights = _reference.triplet_margin(x, mine, margin, **their, **options)
            got, grads = gradients(x, mine, margin, **their, **options)
            assert got == pytest.approx(want, rel=3 * EPS)
            gx, gy = oracle_gradients(x, their.get("other", x), weights, distance)
            for ours, exact in zip(grads, (gx, gy) if cross else (gx + gy,), strict=True):
                np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_distances_with_roots(run, mining, distance):
    for n, others, classes in ((17, None, -4), (31, 18, 5), (64, None, 3), (65, None, -2)):
        (x, mine), their = problem(n, n, others, classes, whole=False)
        for reduction in triplet.REDUCTIONS:
            options = {"mining": mining, "distance": distance, "reduction": reduction}
            want, weights = _reference.triplet_margin(x, mine, 0.3, **their, **options)
            got, grads = gradients(x, mine, 0.3, **their, **options)
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
            gx, gy = oracle_gradients(x, their.get("other", x), weights, distance)
            for ours, exact in zip(grads, (gx, gy) if others else (gx + gy,), strict=True):
                # a triplet whose hinge float32 puts on the other side of 0 may differ
                assert np.abs(ours - exact).max() <= 5e-3 * np.abs(exact).max() + 1e-6


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_gradcheck(mining, distance, cross):
    (x, mine), their = problem(3, 11, 8 if cross else None, whole=False)
    leaves = [torch.from_numpy(v).double().requires_grad_() for v in (x, *([their["other"]] if cross else []))]
    kinds = [torch.from_numpy(v) for v in (mine, *([their["other_labels"]] if cross else []))]

    def loss(a, b=None):
        return triplet_margin(
            a, kinds[0], 0.4, mining=mining, distance=distance, other=b, other_labels=kinds[1] if cross else None
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_opcheck():
    (x, mine), their = problem(4, 12, 7, classes=3)
    x, other = torch.from_numpy(x), torch.from_numpy(their["other"])
    packed = [
        triplet._as_relevance(torch.from_numpy(v), t, "labels", "x")
        for v, t in ((mine, x), (their["other_labels"], other))
    ]
    for backend in ("cpp", "torch"):
        for needs_x, needs_other in ((True, True), (False, True), (False, False)):
            a, b = x.clone().requires_grad_(needs_x), other.clone().requires_grad_(needs_other)
            arguments = (a, b, *packed, 0.5, 0, 0, 0, needs_x, needs_other, backend, 1)
            torch.library.opcheck(torch.ops.cmr_fast.triplet_margin.default, arguments)
        a = x.clone().requires_grad_()
        arguments = (a, None, packed[0], None, 0.5, 3, 1, 1, True, False, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.triplet_margin.default, arguments)
        a, b = (torch.randn(9, 4).requires_grad_() for _ in range(2))
        ids = torch.arange(9) % 3
        arguments = (a, b, ids, 0.5, 0.3, True, True, True, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.acmr_triplet.default, arguments)
    torch.library.opcheck(
        torch.ops.cmr_fast.triplet_margin_backward.default, (torch.tensor(2.0), x, other), test_utils="test_schema"
    )


@pytest.mark.parametrize("multi", [False, True])
def test_compile(multi):
    (x, mine), _ = problem(5, 20, classes=4 if multi else -3, whole=False)
    kinds = torch.from_numpy(mine)

    def loss(a):
        y = a * 2
        return triplet_margin(y, kinds, 0.4) + acmr_triplet(y, y.flip(0), kinds, 1.0, 0.5)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        a = torch.from_numpy(x).requires_grad_()
        value = function(a)
        value.backward()
        results.append((value.detach(), a.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
