"""Optimal transport by the CUDA kernels, emulated on the host (conftest.py)."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_cases import costs, masses

from cmr_fast import ops
from cmr_fast.ops import _dispatch, _reference


def solved(backend, solve):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: backend)
        return solve()


def assert_transported(got, want):
    """In units of a mean entry. Exponents are made in double, so no error grows with cost / reg."""
    scale = want.mean() or 1.0
    np.testing.assert_allclose(got / scale, want / scale, rtol=3e-5, atol=3e-5)


def assert_all_transported(cost, reg, iterations, mu=None, nu=None, inner=None):
    """inner: IPOT. Against logarithms in double; masses (count, size)."""
    count, m, n = cost.shape
    options = {"max_iter": iterations, "mu": mu, "nu": nu, "details": True}
    if inner is None:
        found = solved("cuda", lambda: ops.sinkhorn(cost, reg, tol=0, **options))
    else:
        found = solved("cuda", lambda: ops.ipot(cost, reg, inner=inner, **options))
    rows = np.full((count, m), 1 / m) if mu is None else np.broadcast_to(mu, (count, m))
    columns = np.full((count, n), 1 / n) if nu is None else np.broadcast_to(nu, (count, n))
    assert (found.iterations == iterations).all()
    for i in range(count):
        some = np.ix_(rows[i] > 0, columns[i] > 0)  # without mass: zeros, which IPOT as it is written divides by
        case = cost[i][some], reg, rows[i][rows[i] > 0], columns[i][columns[i] > 0], iterations
        want = np.zeros((m, n))
        want[some] = _reference.sinkhorn(*case)[0] if inner is None else _reference.ipot(*case, inner)
        assert_transported(found.plan[i], want)
        assert found.error[i] == pytest.approx(np.abs(want.sum(axis=1) - rows[i]).sum(), abs=2e-5)


TRANSPORTED = [(1, 1), (1, 5), (7, 3), (32, 32), (33, 65)]


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.001])
@pytest.mark.parametrize(("m", "n"), TRANSPORTED)
def test_sinkhorn_equals_logarithms_in_double(emulated, order, m, n, reg):
    for iterations in (1, 2, 30):
        assert_all_transported(costs(m, 2, m, n), reg, iterations)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize(("m", "n"), TRANSPORTED)
def test_ipot_equals_its_algorithm_in_double(emulated, order, m, n, inner):
    for beta, iterations in ((1.0, 20), (0.05, 1), (0.05, 7)):
        assert_all_transported(costs(n, 2, m, n) - np.float32(0.5), beta, iterations, inner=inner)


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
@pytest.mark.parametrize("tol", [0.03, 1e-3])
def test_every_problem_stops_when_torch_stops_it(emulated, order, stop, tol):
    cost = costs(5, 5, 15, 17) * np.array([0, 0.1, 0.5, 1, 3], np.float32)[:, None, None]
    found = {}
    for backend in ("cuda", "torch"):

        def call():
            return ops.sinkhorn(cost, 0.1, tol=tol, stop=stop, max_iter=60, details=True)

        found[backend] = solved(backend, call)
    counts = found["torch"].iterations
    assert len(set(counts.tolist())) > 2
    np.testing.assert_array_equal(found["cuda"].iterations, counts)
    np.testing.assert_allclose(found["cuda"].error, found["torch"].error, atol=1e-6)
    np.testing.assert_allclose(found["cuda"].plan, found["torch"].plan, rtol=1e-4, atol=1e-7)
    for i in range(5):
        alone = solved("cuda", lambda i=i: ops.sinkhorn(cost[i], 0.1, tol=tol, stop=stop, max_iter=60))
        np.testing.assert_array_equal(alone, found["cuda"].plan[i])


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_steps_in_logarithms_stop_as_well(emulated, stop):
    """reg so small that the first steps are not scalings; also a tol that the first step is below."""
    cost = costs(6, 3, 9, 6)
    for reg, tol in ((0.004, 0.02), (0.004, 100.0), (1.0, 100.0)):

        def call(reg=reg, tol=tol):
            return ops.sinkhorn(cost, reg, tol=tol, stop=stop, max_iter=200, details=True)

        ours, theirs = solved("cuda", call), solved("torch", call)
        np.testing.assert_array_equal(ours.iterations, theirs.iterations)
        np.testing.assert_allclose(ours.plan, theirs.plan, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_first_step_is_compared_with_potentials_of_zero(emulated, stop):
    """Zero potentials are the answer, or off by a little: not what the first kernel is made of."""
    off = np.array([0, 1e-4, 0.02], np.float32)[:, None, None]
    cost, mu, nu = costs(17, 3, 3, 4) * off, np.full(3, 4, np.float32), np.full(4, 3, np.float32)

    def call():
        return ops.sinkhorn(cost, 1.0, mu=mu, nu=nu, tol=1e-3, stop=stop, max_iter=9, details=True)

    ours, theirs = solved("cuda", call), solved("torch", call)
    assert ours.iterations.tolist() == theirs.iterations.tolist() and ours.iterations[0] == 1 < ours.iterations[2]


@pytest.mark.parametrize(("m", "n", "shared"), [(240, 250, 227 << 10), (33, 65, 8 << 10), (40, 31, 4 << 10)])
def test_kernels_that_do_not_fit_in_shared_memory(emulated, order, m, n, shared, monkeypatch):
    monkeypatch.setenv("CMR_SHIM_SHARED", str(shared))
    assert 4 * m * n > shared
    cost, mu, nu = costs(7, 1, m, n), masses(1, 1, m, zeros=3), masses(2, 1, n, zeros=1)
    assert_all_transported(cost, 0.1, 3, mu, nu)
    assert_all_transported(cost, 0.001, 2, mu, nu)
    assert_all_transported(cost, 0.5, 2, mu, nu, inner=2)


def test_more_columns_than_threads_and_more_rows_than_lanes(emulated, order):
    """A block takes several turns of rows, or of columns."""
    for m, n in ((1500, 2), (2, 1500), (1100, 30)):
        cost, mu, nu = costs(8, 1, m, n), masses(1, 1, m), masses(2, 1, n)
        assert_all_transported(cost, 0.3, 2, mu, nu)
        assert_all_transported(cost, 0.002, 1, mu, nu)


def test_more_rows_and_columns_than_the_kernel_takes(emulated):
    most = importlib.import_module("cmr_fast.ops.sinkhorn").MAX_CUDA_SIDES
    assert most == emulated.MOST_TRANSPORTED
    assert_all_transported(costs(9, 1, most - 1, 1), 0.3, 1)
    with pytest.raises(RuntimeError, match="too many rows and columns"):
        solved("cuda", lambda: ops.sinkhorn(costs(9, 1, most, 1), 0.3, max_iter=1))


@pytest.mark.parametrize("reg", [1.0, 0.001])
def test_masses_of_their_own_and_none(emulated, order, reg):
    cost = costs(10, 3, 10, 11)
    for mu, nu in (
        (masses(2, 3, 10), masses(3, 3, 11)),
        (masses(2, 3, 10)[0], masses(3, 3, 11)),
        (masses(2, 3, 10, zeros=4), masses(3, 3, 11, zeros=3)),
        (masses(2, 3, 10, zeros=9), None),
    ):
        assert_all_transported(cost, reg, 25, mu, nu)
        assert_all_transported(cost, max(reg, 0.05), 8, mu, nu, inner=2)
        options = {"mu": mu, "nu": nu, "max_iter": 40}
        for plans in (
            solved("cuda", lambda o=options: ops.sinkhorn(cost, reg, tol=0, **o)),
            solved("cuda", lambda o=options: ops.ipot(cost, max(reg, 0.01), **o)),
        ):
            assert np.isfinite(plans).all()
            assert not plans[np.broadcast_to(mu == 0, (3, 10))].any()
            np.testing.assert_allclose(
                plans.sum(axis=1), np.broadcast_to(1 / 11 if nu is None else nu, (3, 11)), atol=1e-6
            )


def test_no_problems_and_no_mass(emulated):
    none = np.zeros(3, np.float32)
    for solve in (lambda *x, **o: ops.sinkhorn(*x, tol=0, **o), ops.ipot):
        assert solved("cuda", lambda s=solve: s(np.zeros((0, 3, 4), np.float32), 0.1)).shape == (0, 3, 4)

        def call(s=solve):
            return s(costs(11, 2, 3, 3), 0.1, mu=none, nu=none, max_iter=5)

        assert not solved("cuda", call).any()


@pytest.mark.parametrize(("reg", "beta"), [(1e-3, 1e-3), (1e-4, 1e-2)])
def test_where_the_exponentials_themselves_would_be_zero(emulated, reg, beta):
    cost = costs(12, 2, 24, 20)
    plans = solved("cuda", lambda: ops.sinkhorn(cost, reg, max_iter=150, tol=0))
    proximal = solved("cuda", lambda: ops.ipot(cost, beta, max_iter=100))
    for plan, found in zip(plans, proximal, strict=True):
        np.testing.assert_allclose(plan.sum(axis=0), 1 / 20, rtol=1e-5)
        np.testing.assert_allclose(found.sum(axis=0), 1 / 20, rtol=1e-5)
    cost[:, :, 3] += 40
    cost[:, 5] -= 30
    for offset in (1000, -1000):
        assert_all_transported(cost + np.float32(offset), 0.1, 25)


def test_converged_plans_have_their_marginals(emulated):
    cost = costs(13, 2, 16, 20)
    for reg in (0.5, 0.05):
        found = solved("cuda", lambda reg=reg: ops.sinkhorn(cost, reg, max_iter=3000, details=True))
        assert (found.iterations < 3000).all() and (found.error < 1e-4).all()
        np.testing.assert_allclose(found.plan.sum(axis=2), 1 / 16, atol=1e-4 / 16)
        np.testing.assert_allclose(found.plan.sum(axis=1), 1 / 20, atol=1e-4 / 20)


def test_values_that_are_not_finite_stay_in_their_problem(emulated):
    cost = torch.from_numpy(costs(14, 3, 6, 7))

    def call():
        return ops.sinkhorn(cost, 0.1, max_iter=20)

    want = solved("cuda", call)
    cost[1, 2, 3] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("cmr_fast.ops.sinkhorn"), "_check_values", lambda *_: None)
        found = solved("cuda", call)
    assert not found[1].isfinite().all()
    assert torch.equal(found[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(emulated, dtype):
    cost = torch.from_numpy(costs(15, 2, 12, 10)).to(dtype)
    half, single = (solved("cuda", lambda c=c: ops.sinkhorn(c, 0.1, max_iter=20, tol=0)) for c in (cost, cost.float()))
    assert half.dtype == dtype and single.dtype == torch.float32
    # uniform masses are rounded to the type of cost
    torch.testing.assert_close(half.float(), single, rtol=2e-2, atol=1e-5)


def test_same_bits_in_any_order_of_threads(emulated, monkeypatch):
    cost = costs(16, 2, 40, 33)
    calls = [lambda: ops.sinkhorn(cost, 0.003, max_iter=20), lambda: ops.ipot(cost, 0.5, max_iter=5)]
    for call in calls:
        plans = []
        for direction in ("forward", "reverse"):
            monkeypatch.setenv("CMR_SHIM_ORDER", direction)
            plans.append(solved("cuda", call))
        np.testing.assert_array_equal(*plans)


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), count=st.integers(0, 2), log_reg=st.floats(-3, 1),
    iterations=st.integers(1, 20), high=st.floats(0, 3), seed=st.integers(0, 2**31), shared=st.sampled_from([4, 227]),
    order=st.sampled_from(["forward", "reverse"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_arbitrary_transport(emulated, m, n, count, log_reg, iterations, high, seed, shared, order):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_SHIM_ORDER", order)
        patch.setenv("CMR_SHIM_SHARED", str(shared << 10))
        cost, mu, nu = costs(seed, count, m, n, high), masses(seed, count, m), masses(seed + 1, count, n)
        assert_all_transported(cost, 10**log_reg, iterations, mu, nu)
