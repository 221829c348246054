"""Sinkhorn and IPOT against float64: every instruction set, the torch path, small reg, odd shapes, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_cases import SHAPES, assert_plans, costs, masses
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.ops import _reference, ipot, sinkhorn


def uniform(m, n):
    return np.full(m, 1 / m), np.full(n, 1 / n)


@pytest.mark.parametrize("reg", [10.0, 1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_sinkhorn_equals_logarithms_in_double(run, m, n, reg):
    cost = costs(m + n, 3, m, n)
    for iterations in (1, 2, 40):
        found = sinkhorn(cost, reg, max_iter=iterations, tol=0, details=True, threads=2)
        assert (found.iterations == iterations).all()
        for i in range(3):
            want, _ = _reference.sinkhorn(cost[i], reg, *uniform(m, n), iterations)
            assert_plans(found.plan[i], want, cost, reg, run)
            assert found.error[i] == pytest.approx(np.abs(want.sum(axis=1) - 1 / m).sum(), abs=1e-4)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.05])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_ipot_equals_its_algorithm_in_double(run, m, n, beta, inner):
    cost = costs(m * n, 2, m, n, high=min(2.0, 300 * beta / 20)) - np.float32(0.5)
    for iterations in (1, 7, 50) if beta > 0.1 else (1, 7):
        plans = ipot(cost, beta, max_iter=iterations, inner=inner)
        for i in range(2):
            want = _reference.ipot(cost[i], beta, *uniform(m, n), iterations, inner)
            assert_plans(plans[i], want, cost, beta / iterations, run)


@pytest.mark.parametrize(("reg", "beta"), [(1e-3, 1e-3), (1e-4, 1e-2)])
def test_where_the_exponentials_themselves_would_be_zero(run, reg, beta):
    """exp(-2 / reg) is e^-2000 and less; IPOT's product of such steps too."""
    cost = costs(1, 4, 24, 20)
    found = sinkhorn(cost, reg, max_iter=300, tol=0, details=True)
    assert np.isfinite(found.plan).all()
    np.testing.assert_allclose(found.plan.sum(axis=1), 1 / 20, rtol=1e-2 if run == "torch" else 1e-5)
    for plan in ipot(cost, beta, max_iter=200):
        assert np.isfinite(plan).all()
        np.testing.assert_allclose(plan.sum(axis=0), 1 / 20, rtol=1e-2 if run == "torch" else 1e-5)


def test_costs_far_apart_and_far_from_zero(run):
    """One cheap column, one dear row, an offset of a thousand: potentials hold them, scalings alone could not."""
    cost = costs(2, 2, 12, 9)
    cost[:, :, 3] += 40
    cost[:, 5] -= 30
    for offset in (0.0, 1000.0, -1000.0):
        plans = sinkhorn((cost + offset).astype(np.float32), 0.1, max_iter=60, tol=0)
        for i in range(2):
            want, _ = _reference.sinkhorn((cost + offset).astype(np.float32)[i], 0.1, *uniform(12, 9), 60)
            assert_plans(plans[i], want, cost + offset, 0.1, run)


def test_ipot_reaches_the_optimum_that_linear_programming_finds(run):
    from scipy.optimize import linear_sum_assignment

    cost = costs(3, 3, 10, 10)
    plans = ipot(cost, 0.1, max_iter=400)
    for plan, c in zip(plans, cost, strict=True):
        rows, columns = linear_sum_assignment(c)
        assert (plan * c).sum() == pytest.approx(c[rows, columns].mean(), abs=2e-3)


@pytest.mark.parametrize("reg", [0.5, 0.05, 0.01])
def test_converged_plans_have_their_marginals(run, reg):
    cost = costs(4, 6, 32, 40)
    found = sinkhorn(cost, reg, max_iter=20_000, details=True)
    assert (found.error < 1e-4).all() and (found.iterations < 20_000).all()
    np.testing.assert_allclose(found.plan.sum(axis=2), 1 / 32, atol=1e-4 / 32)
    np.testing.assert_allclose(found.plan.sum(axis=1), 1 / 40, atol=1e-4 / 40)


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_every_problem_stops_by_itself(run, stop):
    """What a problem gets does not depend on its neighbours, and is as many iterations as it needs."""
    cost = costs(5, 5, 15, 15) * np.array([0, 0.1, 0.5, 1, 3], np.float32)[:, None, None]
    options = {"tol": 0.01, "stop": stop, "max_iter": 500, "details": True}
    together = sinkhorn(cost, 0.1, **options)
    assert len(set(together.iterations.tolist())) > 2
    for i in range(5):
        alone = sinkhorn(cost[i], 0.1, **options)
        np.testing.assert_array_equal(alone.plan, together.plan[i])
        want, done = _reference.sinkhorn(cost[i], 0.1, *uniform(15, 15), 500, 0.01, stop)
        assert alone.iterations[0] == done
        assert_plans(alone.plan, want, cost, 0.1, run)


def test_masses_of_their_own(run):
    cost = costs(6, 4, 9, 14)
    for mu, nu in (
        (masses(0, 4, 9), masses(1, 4, 14)),
        (masses(0, 4, 9)[0], masses(1, 4, 14)),
        (masses(0, 4, 9), None),
    ):
        plans = sinkhorn(cost, 0.2, mu=mu, nu=nu, max_iter=30, tol=0)
        proximal = ipot(cost, 1.0, mu=mu, nu=nu, max_iter=20)
        for i in range(4):
            row = mu if mu.ndim == 1 else mu[i]
            column = np.full(14, 1 / 14) if nu is None else nu[i]
            assert_plans(plans[i], _reference.sinkhorn(cost[i], 0.2, row, column, 30)[0], cost, 0.2, run)
            assert_plans(proximal[i], _reference.ipot(cost[i], 1.0, row, column, 20), cost, 0.05, run)


@pytest.mark.parametrize("reg", [1.0, 0.001])
def test_rows_and_columns_without_mass(run, reg):
    cost, mu, nu = costs(7, 3, 10, 11), masses(2, 3, 10, zeros=4), masses(3, 3, 11, zeros=3)
    for plans in (
        sinkhorn(cost, reg, mu=mu, nu=nu, max_iter=50, tol=0),
        ipot(cost, max(reg, 0.01), mu=mu, nu=nu, max_iter=50),
    ):
        assert np.isfinite(plans).all() and not plans[:, :4].any() and not plans[:, :, :3].any()
        np.testing.assert_allclose(plans.sum(axis=1), nu, atol=1e-4 if run == "torch" else 1e-6)
    full = sinkhorn(cost[:, 4:, 3:], reg, mu=mu[:, 4:], nu=nu[:, 3:], max_iter=50, tol=0)
    some = sinkhorn(cost, reg, mu=mu, nu=nu, max_iter=50, tol=0)[:, 4:, 3:]
    np.testing.assert_allclose(some, full, atol=1e-4 if run == "torch" else 1e-5)


def test_no_problems_and_no_mass(run):
    assert sinkhorn(np.zeros((0, 3, 4), np.float32), 0.1).shape == (0, 3, 4)
    assert ipot(np.zeros((0, 3, 4), np.float32), 1.0).shape == (0, 3, 4)
    none = np.zeros(3, np.float32)
    assert not sinkhorn(costs(8, 2, 3, 3), 0.1, mu=none, nu=none, max_iter=5, tol=0).any()


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), problems=st.integers(0, 4), log_reg=st.floats(-3, 1),
    iterations=st.integers(1, 60), high=st.floats(0, 3), seed=st.integers(0, 2**31),
    isa=st.sampled_from(ISAS or ["scalar"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_arbitrary_problems(m, n, problems, log_reg, iterations, high, seed, isa):
    cost, reg = costs(seed, problems, m, n, high), 10**log_reg
    mu, nu = masses(seed, problems, m), masses(seed + 1, problems, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_ISA", isa)
        plans = sinkhorn(cost, reg, mu=mu, nu=nu, max_iter=iterations, tol=0)
    for i in range(problems):
        want, _ = _reference.sinkhorn(cost[i], reg, mu[i], nu[i], iterations)
        assert_plans(plans[i], want, cost, reg, isa)


@pytest.mark.parametrize("op", [sinkhorn, ipot])
def test_error_at_most_twice_that_of_eager_torch(run, op):
    for reg in (1.0, 0.1, 0.02):
        cost = costs(9, 4, 30, 20)
        options = {"max_iter": 30} | ({"tol": 0} if op is sinkhorn else {})
        oracle = _reference.sinkhorn if op is sinkhorn else _reference.ipot
        want = [oracle(c, reg, *uniform(30, 20), 30) for c in cost]
        want = np.stack([x[0] if op is sinkhorn else x for x in want])
        ours = np.abs(op(cost, reg, **options) - want).max()
        eager = np.abs(_eager(cost, reg, op is ipot) - want).max()
        # the torch path of ipot holds logarithms, 30 * cost / beta, where the loop would be at zero with more of them
        rounding = 6e-8 * 30 * 2 / reg if run == "torch" and op is ipot else 4e-7
        assert ours <= 2 * eager + rounding * want.max()


def _eager(cost, reg, proximal):
    """The loop that one writes in float32."""
    c, (m, n) = torch.from_numpy(cost), cost.shape[1:]
    if proximal:
        g, plan, sigma = torch.exp(-c / reg), torch.ones_like(c), torch.full((len(c), n, 1), 1 / n)
        for _ in range(30):
            q = g * plan
            delta = 1 / m / (q @ sigma)
            sigma = 1 / n / (q.mT @ delta)
            plan = delta * q * sigma.mT
        return plan.numpy()
    a, b = torch.zeros(len(c), m), torch.zeros(len(c), n)
    for _ in range(30):
        a = -np.log(m) - torch.logsumexp(b[:, None] - c / reg, 2)
        b = -np.log(n) - torch.logsumexp(a[:, :, None] - c / reg, 1)
    return torch.exp(a[:, :, None] + b[:, None] - c / reg).numpy()


def test_same_bits_for_any_number_of_threads(run):
    cost = costs(10, 9, 20, 33)
    for solve in (
        lambda threads: sinkhorn(cost, 0.02, max_iter=60, threads=threads),
        lambda threads: ipot(cost, 0.5, threads=threads),
    ):
        first = solve(1)
        for threads in (1, 2, 5):
            np.testing.assert_array_equal(solve(threads), first)


def test_kinds_dtypes_and_strides(run):
    cost = torch.from_numpy(costs(11, 4, 12, 10))
    want = sinkhorn(cost, 0.1)
    assert isinstance(want, torch.Tensor)
    assert isinstance(sinkhorn(cost.numpy(), 0.1), np.ndarray)
    assert torch.equal(sinkhorn(cost[1], 0.1), want[1])
    wide = torch.zeros(4, 24, 20)
    wide[:, ::2, ::2] = cost
    assert torch.equal(sinkhorn(wide[:, ::2, ::2], 0.1), want)
    torch.testing.assert_close(sinkhorn(cost.mT.contiguous().mT, 0.1), want)
    half = sinkhorn(cost.bfloat16(), 0.1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, sinkhorn(cost.bfloat16().float(), 0.1).bfloat16())


def test_double_runs_by_torch():
    cost = costs(12, 2, 8, 9).astype(np.float64)
    plans = sinkhorn(cost, 0.05, max_iter=30, tol=0)
    assert plans.dtype == np.float64
    for i in range(2):
        want, _ = _reference.sinkhorn(cost[i], 0.05, *uniform(8, 9), 30)
        np.testing.assert_allclose(plans[i], want, rtol=1e-10)
    with pytest.raises(cf.InputError, match="computes in float32"):
        sinkhorn(cost, 0.05, backend="cpp")


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_ran(isa, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    NATIVE.reset_last_isa()
    sinkhorn(costs(13, 1, 2, 2), 1.0)
    assert NATIVE.last_isa() == isa
    assert cf.explain("sinkhorn", np.zeros(1)).isa == isa == cf.explain("ipot", np.zeros(1)).isa


def doubles(seed, m=4, n=5):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, m, n, generator=generator, dtype=torch.float64).requires_grad_()
    mu, nu = (0.2 + torch.rand(2, size, generator=generator, dtype=torch.float64) for size in (m, n))
    return cost, (mu / mu.sum(1, keepdim=True)).requires_grad_(), (nu / nu.sum(1, keepdim=True)).requires_grad_()


def test_gradcheck_unrolled():
    cost, mu, nu = (x.detach() for x in doubles(0))
    x, y = torch.zeros_like(mu).requires_grad_(), torch.zeros_like(nu).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, x, y: sinkhorn(c, 0.3, mu=moved(mu, x), nu=moved(nu, y), max_iter=7, tol=0, grad="unrolled"),
        (cost.requires_grad_(), x, y),
    )
    assert torch.autograd.gradcheck(lambda c: ipot(c, 0.5, max_iter=5, grad="unrolled"), (cost,))


def moved(mu, x):
    """Masses whose sum stays: a change that gradients can be compared under."""
    return mu * (1 + x - (mu * x).sum(-1, keepdim=True) / mu.sum(-1, keepdim=True))


def test_gradcheck_implicit():
    cost, mu, nu = (x.detach() for x in doubles(1))
    options = {"max_iter": 5000, "tol": 1e-14, "grad": "implicit"}
    x, y = torch.zeros_like(mu).requires_grad_(), torch.zeros_like(nu).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, x, y: sinkhorn(c, 0.3, mu=moved(mu, x), nu=moved(nu, y), **options), (cost.requires_grad_(), x, y)
    )


def test_implicit_is_the_limit_of_unrolled():
    cost, mu, nu = doubles(2)
    weights = torch.randn(cost.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for options in ({}, {"mu": mu, "nu": nu}, {"mu": mu[0], "nu": nu[0]}):
        slopes = []
        for grad in ("implicit", "unrolled"):
            plan = sinkhorn(cost, 0.2, max_iter=2000, tol=1e-13, grad=grad, **options)
            inputs = [cost, *([mu, nu] if options else [])]
            slope = torch.autograd.grad((weights * plan).sum(), inputs)
            # masses: up to a constant, which no change of equal sums sees
            slopes.append([slope[0], *(x - x.mean(dim=-1, keepdim=True) for x in slope[1:])])
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_implicit_gradient_of_the_native_kernel(run, monkeypatch):
    cost = torch.from_numpy(costs(14, 3, 9, 7)).requires_grad_()
    weights = torch.from_numpy(costs(15, 3, 9, 7))
    mu = torch.from_numpy(masses(4, 3, 9, zeros=2))
    double = cost.detach().double().requires_grad_()
    (weights * sinkhorn(cost, 0.2, mu=mu, grad="implicit", max_iter=5000, tol=1e-6)).sum().backward()
    monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    (weights * sinkhorn(double, 0.2, mu=mu.double(), grad="implicit", max_iter=5000, tol=1e-6)).sum().backward()
    torch.testing.assert_close(cost.grad.double(), double.grad, rtol=1e-3, atol=1e-5)


def test_envelope_holds_the_plan():
    cost = torch.from_numpy(costs(16, 2, 6, 6)).requires_grad_()
    plan = sinkhorn(cost, 0.1)
    assert not plan.requires_grad
    (plan * cost).sum().backward()
    assert torch.equal(cost.grad, plan)
    assert not ipot(cost, 1.0).requires_grad


def test_second_derivatives():
    cost = doubles(3)[0]
    (slope,) = torch.autograd.grad(sinkhorn(cost, 0.3, grad="implicit").square().sum(), cost, create_graph=True)
    with pytest.raises(cf.InputError, match="once"):
        slope.sum().backward()
    assert torch.autograd.gradgradcheck(lambda c: sinkhorn(c, 0.3, max_iter=3, tol=0, grad="unrolled"), (cost,))


def test_opcheck_and_compile():
    cost = torch.from_numpy(costs(17, 2, 5, 6))
    mu, nu = (torch.from_numpy(masses(5, 2, n)) for n in (5, 6))
    for backend in ("cpp", "torch"):
        arguments = (cost.clone().requires_grad_(), mu, nu[0], 0.1, 20, 0.0, True, False, 1, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.sinkhorn.default, arguments)
        arguments = (cost, mu, nu[0], 0.1, 20, 0.0, False, True, 2, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.sinkhorn.default, arguments)
    torch.library.opcheck(torch.ops.cmr_fast.sinkhorn_backward.default, (cost, sinkhorn(cost, 0.1), mu, nu[0], 0.1))
    for grad in ("envelope", "implicit", "unrolled"):

        def loss(c, grad=grad):
            return (sinkhorn(c, 0.2, max_iter=8, tol=1e-3, grad=grad) * c).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        slopes = []
        for call in (compiled, loss):
            c = cost.clone().requires_grad_()
            call(c).backward()
            slopes.append(c.grad)
        torch.testing.assert_close(*slopes)


COST = costs(18, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": COST[0, 0]}, r"cost must be float \(P, m, n\) or \(m, n\).*got torch.float32 \(4,\)"),
        ({"cost": COST[:, :0]}, r"\(2, 0, 4\)"),
        ({"cost": COST.astype(int)}, "float"),
        ({"cost": np.where(COST[1, 2, 3] == COST, np.nan, COST)}, r"cost must be finite, got cost\[1, 2, 3\] = nan"),
        ({"cost": np.where(COST[1, 0, 3] == COST, np.inf, COST)}, r"cost\[1, 0, 3\] = inf"),
        ({"cost": np.where(COST[0, 2, 1] == COST, -np.inf, COST)}, r"cost\[0, 2, 1\] = -inf"),
        ({"cost": [[1.0]]}, "numpy array or a torch tensor, got list"),
        ({"reg": 0.0}, "reg must be a finite number above 0, got 0.0"),
        ({"reg": -1}, "got -1"),
        ({"reg": float("nan")}, "got nan"),
        ({"reg": "small"}, "got 'small'"),
        ({"max_iter": 0}, "max_iter must be an integer of 1 or more, got 0"),
        ({"tol": -1e-3}, "tol must be a finite number of 0 or more, got -0.001"),
        ({"stop": "never"}, "marginals, potentials, got 'never'"),
        ({"grad": "exact"}, "envelope, implicit or unrolled, got 'exact'"),
        ({"mu": np.full(4, 0.25, np.float32)}, r"mu must be torch.float32 \(3,\) or \(2, 3\)"),
        ({"nu": np.full(4, 0.25)}, "torch.float32.*got torch.float64"),
        ({"mu": np.array([0.5, 1, -0.5], np.float32)}, r"mu must be finite and not negative, got mu\[2\] = -0.5"),
        ({"mu": np.ones(3, np.float32)}, "equal sums, got some that are apart by 0.67"),
        ({"backend": "cuda"}, "cuda"),
        ({"backend": "cpp", "grad": "unrolled"}, "it is not unrolled"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(change, message):
    with pytest.raises(cf.InputError, match=message):
        sinkhorn(**({"cost": COST, "reg": 0.1} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, "beta must be a finite number above 0, got 0"),
        ({"inner": 0}, "inner"),
        ({"grad": "implicit"}, "fixed point"),
    ],
)
def test_ipot_refuses_as_well(change, message):
    with pytest.raises(cf.InputError, match=message):
        ipot(**({"cost": COST, "beta": 1.0} | change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_masses_are_exact_whatever_the_costs_are_in(dtype):
    cost = torch.rand(3, 20, 30).to(dtype)
    plan = sinkhorn(cost, 0.1)
    assert plan.dtype == dtype
    torch.testing.assert_close(plan.float(), sinkhorn(cost.float(), 0.1), rtol=1e-2, atol=1e-5)


def test_a_reg_that_the_type_cannot_resolve_is_refused():
    cost = torch.rand(4, 5)
    for solve, name in ((sinkhorn, "reg"), (ipot, "beta")):
        with pytest.raises(cf.InputError, match=f"{name} must be at least the range"):
            solve(cost * 1e10, 0.1)
    assert sinkhorn(cost.double() * 1e10, 0.1, max_iter=5).isfinite().all()


@pytest.mark.parametrize("grad", ["implicit", "unrolled", "envelope"])
def test_torch_func_grad(grad):
    cost = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def total(c):
        return (sinkhorn(c, 0.2, grad=grad) * c).square().sum()

    leaf = cost.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(cost), want, rtol=0, atol=1e-14)
