"""Optimal transport of many small problems in one call: Sinkhorn's iterations and IPOT, each stopped by itself.

The native kernels scale a kernel that is exponentiated once and go through logarithms where that would not hold; the
torch path works in logarithms throughout. On a GPU a block takes a problem, and all are one launch. Results do not
change from run to run or with `threads`.
"""

import functools
import math
import sys
from typing import Any, Generic, Literal, NamedTuple

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import call, refuse_twice, register, register_derivative
from cmr_fast.ops._tensors import Array, as_integer, as_number, as_tensor, like_input

Op = Literal["sinkhorn", "ipot"]
STOPS = ("marginals", "potentials")
RESOLVED = 1e6  # the range of cost / reg: float32 keeps its units beside such numbers to a tenth
MAX_CUDA_SIDES = 2048  # m + n: potentials and scalings are in shared memory


class Transport(NamedTuple, Generic[Array]):
    """What details=True returns.

    Attributes
    ----------
    plan : Tensor or numpy.ndarray
        As without it.
    iterations : Tensor or numpy.ndarray
        int32 (P,): how many were made.
    error : Tensor or numpy.ndarray
        Float (P,): sum_i |sum_j plan_ij - mu_i|; the column sums are right up to rounding.
    """

    plan: Array
    iterations: Array
    error: Array


def sinkhorn(
    cost: Array,
    reg: float,
    *,
    max_iter: int = 1000,
    tol: float = 1e-5,
    mu: Array | None = None,
    nu: Array | None = None,
    stop: Literal["marginals", "potentials"] = "marginals",
    grad: Literal["envelope", "implicit", "unrolled"] = "envelope",
    details: bool = False,
    backend: str | None = None,
    threads: int | None = None,
) -> Array | Transport[Array]:
    """Entropic transport plans (Cuturi 2013): min over T of <T, C> + reg * sum T (log T - 1), T 1 = mu, T^T 1 = nu.

    Bad values (not finite, negative masses) are looked for where that costs no wait, on the CPU; on a GPU a problem
    with one has a plan that is not finite.

    Parameters
    ----------
    cost : Tensor or numpy.ndarray
        Float (P, m, n), or (m, n); finite. float16 and bfloat16 are computed in float32.
    reg : float
        Of the entropy, in units of cost. Small ones are safe (1e-3 with costs up to 2), they take longer.
    max_iter : int
        Of one problem. An iteration makes the row sums right, then the column sums; the first starts from zero
        potentials.
    tol : float
        A problem is done after the iteration that found, or made, less than this. 0 makes max_iter iterations.
    mu, nu : Tensor or numpy.ndarray, optional
        Float (m,) or (P, m), and (n,) or (P, n): 1 / m and 1 / n unless given. Not negative, of equal sums; zeros are
        rows and columns without mass.
    stop : {"marginals", "potentials"}
        What tol is compared with: sum_i |sum_j T_ij - mu_i| before the iteration; or sum_i |f_i - f_i before|, f in
        units of cost (what Feature Scattering stops by, at 0.1).
    grad : {"envelope", "implicit", "unrolled"}
        "envelope": T is a constant, so autograd's d<T, C> / dC = T, which at the optimum is the gradient of the whole
        objective. "implicit": of T itself with respect to cost, mu and nu at the fixed point, by a linear system; right
        where the problem has converged. "unrolled": through the iterations, by torch's own operators, which keep each
        of them in memory.
    details : bool
        Also how many iterations were made and what is left of the error.
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    Tensor or numpy.ndarray or Transport
        Plans of the shape, kind and dtype of cost.

    Raises
    ------
    InputError
        On shapes, dtypes, devices and values that do not fit, and a reg that the dtype does not resolve.
    """
    if stop not in STOPS:
        raise InputError(f"stop must be one of {', '.join(STOPS)}, got {stop!r}")
    tol = as_number(tol, "tol", least=0.0)
    result: Array | Transport[Array] = _transport(
        "sinkhorn", cost, reg, max_iter, tol, mu, nu, stop, 1, grad, details, backend, threads
    )
    return result


def ipot(
    cost: Array,
    beta: float,
    *,
    max_iter: int = 50,
    inner: int = 1,
    mu: Array | None = None,
    nu: Array | None = None,
    grad: Literal["envelope", "unrolled"] = "envelope",
    details: bool = False,
    backend: str | None = None,
    threads: int | None = None,
) -> Array | Transport[Array]:
    """Transport plans without regularisation in the limit, by the inexact proximal point method (Xie et al. 2018).

    T <- diag(delta) (exp(-cost / beta) * T) diag(sigma), Algorithm 1 of the paper.

    Parameters
    ----------
    cost, mu, nu, details, backend, threads
        As in `sinkhorn`.
    beta : float
        Of the proximal term, in units of cost.
    max_iter : int
        Outer iterations, all of them made.
    inner : int
        Scalings in each of them.
    grad : {"envelope", "unrolled"}
        As in `sinkhorn`.

    Returns
    -------
    Tensor or numpy.ndarray or Transport
        Plans of the shape, kind and dtype of cost.

    Raises
    ------
    InputError
        On shapes, dtypes, devices and values that do not fit.
    """
    inner = as_integer(inner, "inner", 1)
    if grad == "implicit":
        raise InputError("ipot's grad must be envelope or unrolled, got 'implicit': its plan is no fixed point")
    result: Array | Transport[Array] = _transport(
        "ipot", cost, beta, max_iter, 0.0, mu, nu, "marginals", inner, grad, details, backend, threads
    )
    return result


def _transport(
    op: Op,
    cost: Array,
    reg: float,
    max_iter: int,
    tol: float,
    mu: Array | None,
    nu: Array | None,
    stop: str,
    inner: int,
    grad: str,
    details: bool,
    backend: str | None,
    threads: int | None,
) -> Any:
    values, was_numpy = as_tensor(cost, "cost")
    if values.ndim not in (2, 3) or 0 in values.shape[-2:] or not values.is_floating_point():
        raise InputError(
            f"cost must be float (P, m, n) or (m, n) with m and n of 1 or more, got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    reg = as_number(reg, "reg" if op == "sinkhorn" else "beta", least=0.0, above=True)
    max_iter = as_integer(max_iter, "max_iter", 1)
    backend, threads = _dispatch.how(backend, threads)
    if grad not in ("envelope", "implicit", "unrolled"):
        raise InputError(f"grad must be envelope, implicit or unrolled, got {grad!r}")
    problems = values if values.ndim == 3 else values[None]
    masses = [_masses(x, problems, axis, name) for x, axis, name in ((mu, 1, "mu"), (nu, 2, "nu"))]
    if grad == "envelope":
        problems, masses = problems.detach(), [x.detach() for x in masses]
    if grad == "unrolled":
        _dispatch.choose_backend(op, values.device.type, backend, dict.fromkeys(("cpp", "cuda"), "it is not unrolled"))
        if not torch.compiler.is_compiling():
            _check_values(op, problems, masses[0], masses[1], reg)
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        rows, columns = (x.to(dtype) for x in masses)
        plan, iterations, error = _iterate(op, problems.to(dtype), rows, columns, reg, max_iter, tol, stop, inner)
        plan = plan.to(values.dtype)
    else:
        plan, iterations, error = call(
            "sinkhorn",
            problems,
            *masses,
            reg,
            max_iter,
            tol,
            stop == "potentials",
            op == "ipot",
            inner,
            backend,
            threads,
        )
    if values.ndim == 2:
        plan = plan[0]
    if details:
        return Transport(*(like_input(x, was_numpy) for x in (plan, iterations, error)))
    return like_input(plan, was_numpy)


def _masses(x: object, problems: Tensor, axis: int, name: str) -> Tensor:
    count, size = len(problems), problems.shape[axis]
    if x is None:
        wide = torch.promote_types(problems.dtype, torch.float32)  # 1 / size in 16 bits is not 1 / size
        return problems.new_full((size,), 1 / size, dtype=wide)
    masses = as_tensor(x, name)[0]
    if (
        masses.shape not in ((size,), (count, size))
        or masses.dtype != problems.dtype
        or masses.device != problems.device
    ):
        raise InputError(
            f"{name} must be {problems.dtype} ({size},) or ({count}, {size}) on {problems.device}, as cost is, got "
            f"{masses.dtype} {tuple(masses.shape)} on {masses.device}"
        )
    return masses


def _check_values(op: Op, cost: Tensor, mu: Tensor, nu: Tensor, reg: float) -> None:
    if cost.device.type != "cpu":
        return
    for x, name in ((cost, "cost"), (mu, "mu"), (nu, "nu")):
        least = -math.inf if name == "cost" else 0.0
        if x.numel() == 0:
            continue
        low, high = (bound.item() for bound in x.aminmax())  # NaN where there is one
        if max(least, -sys.float_info.max) <= low and high < math.inf:
            continue
        where = tuple((~(x.isfinite() & (x >= least))).nonzero()[0].tolist())
        raise InputError(
            f"{name} must be finite{'' if name == 'cost' else ' and not negative'}, got "
            f"{name}[{', '.join(map(str, where))}] = {x[where].item()}"
        )
    if cost.numel():
        low, high = (bound.item() for bound in cost.aminmax())
        most = 1e14 if cost.dtype == torch.float64 else RESOLVED
        name = "reg" if op == "sinkhorn" else "beta"
        if not high - low <= most * reg:
            raise InputError(
                f"{name} must be at least the range of cost, {high - low:.3g}, / {most:.0g}, which {cost.dtype} "
                f"resolves, got {reg:g}"
            )
    sums = torch.broadcast_tensors(mu.double().sum(-1), nu.double().sum(-1))
    apart = ((sums[0] - sums[1]).abs() / torch.maximum(*sums)).nan_to_num_(0)  # 0 / 0: no mass at all
    if apart.numel() and apart.max() > 1e-3:
        of_mu, of_nu = (x.flatten()[apart.argmax()].item() for x in sums)
        raise InputError(
            f"mu and nu must have equal sums, got some that are apart by {apart.max().item():.2g} of the sum: "
            f"{of_mu:.6g} and {of_nu:.6g}"
        )


def _fake(cost: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    errors = torch.promote_types(cost.dtype, torch.float32)
    problems = cost.shape[0]
    return (
        cost.new_empty(cost.shape),
        cost.new_empty(problems, dtype=torch.int32),
        cost.new_empty(problems, dtype=errors),
    )


def _unfit(cost: Tensor) -> dict[str, str]:
    m, n = cost.shape[1:]
    if cost.dtype == torch.float64:
        return dict.fromkeys(("cpp", "cuda"), "it computes in float32, these are float64")
    if m + n > MAX_CUDA_SIDES:
        return {"cuda": f"it takes at most {MAX_CUDA_SIDES} rows and columns together, these are {m} + {n}"}
    return {}


def _sinkhorn(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, max_iter: int, tol: float, potentials: bool, proximal: bool,
    inner: int, backend: str | None, threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op: Op = "ipot" if proximal else "sinkhorn"
    stop = "potentials" if potentials else "marginals"
    _check_values(op, cost, mu, nu, reg)
    chosen = _dispatch.choose_backend(op, cost.device.type, backend, _unfit(cost))
    if chosen == "torch":
        dtype = torch.promote_types(cost.dtype, torch.float32)
        plan, iterations, errors = _iterate(
            op, cost.to(dtype), mu.to(dtype), nu.to(dtype), reg, max_iter, tol, stop, inner
        )
        return plan.to(cost.dtype).contiguous(), iterations, errors
    costs, mu, nu = (x.to(torch.float32).contiguous() for x in (cost, mu, nu))
    mass = mu.data_ptr(), mu.shape[1] if mu.ndim == 2 else 0, nu.data_ptr(), nu.shape[1] if nu.ndim == 2 else 0
    options = 1 / reg, max_iter, tol, STOPS.index(stop), op == "ipot", inner
    plan = torch.empty_like(costs)
    iterations, errors = costs.new_empty(len(cost), dtype=torch.int32), costs.new_empty(len(cost))
    results = plan.data_ptr(), iterations.data_ptr(), errors.data_ptr()
    if chosen == "cuda":
        queue = _dispatch.queue(costs)
        _dispatch.native_cuda().sinkhorn(queue, *cost.shape, *options, costs.data_ptr(), *mass, *results)
        return plan.to(cost.dtype), iterations, errors
    native, threads = _dispatch.native(), _dispatch.choose_threads(threads)
    workspace = torch.empty(
        native.sinkhorn_workspace(*cost.shape, op == "ipot", threads), dtype=torch.uint8, device="cpu"
    )
    native.sinkhorn(
        _dispatch.choose_isa(), *cost.shape, *options, threads, costs.data_ptr(), *mass, *results, workspace.data_ptr()
    )
    return plan.to(cost.dtype), iterations, errors


def _iterate(
    op: Op, cost: Tensor, mu: Tensor, nu: Tensor, reg: float, max_iter: int, tol: float, stop: str, inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In logarithms, by torch's own operators: plan = exp(a_i + b_j - C_ij / reg), for IPOT in step t with t / reg.

    A problem that is done keeps what it has; only where asking costs no wait does the loop end with the last of them.
    """
    problems, m, n = cost.shape
    mu, nu = mu.expand(problems, m), nu.expand(problems, n)
    has_row, has_column = mu > 0, nu > 0
    # 1 in place of 0, whose logarithm has no derivative; problems without any mass sum over something as well
    log_mu, log_nu = torch.where(has_row, mu, 1.0).log(), torch.where(has_column, nu, 1.0).log()
    empty_rows, empty_columns = ~has_row.any(dim=1, keepdim=True), ~has_column.any(dim=1, keepdim=True)
    nothing = cost.new_full((), -math.inf)
    a, b = cost.new_zeros(problems, m), torch.where(has_column, 0.0, nothing)
    before = b
    active = torch.ones(problems, dtype=torch.bool, device=cost.device)
    iterations = torch.zeros(problems, dtype=torch.int32, device=cost.device)
    ends_early = tol > 0 and cost.device.type == "cpu" and not torch.compiler.is_compiling()
    exponent = cost / -reg
    log_kernel = exponent
    for t in range(1, max_iter + 1):
        source = b
        if op == "ipot":
            log_kernel = exponent * t
            source, before = torch.where(has_column, 2 * b - before, nothing), b
        for _ in range(inner):
            over_columns = torch.where(empty_columns, 0.0, source)
            lse = torch.logsumexp(log_kernel + over_columns[:, None, :], dim=2)
            a_next = torch.where(has_row, log_mu - lse, nothing)
            over_rows = torch.where(empty_rows, 0.0, a_next)
            b_next = log_nu - torch.logsumexp(log_kernel + over_rows[:, :, None], dim=1)
            b_next = torch.where(has_column, b_next, nothing)
            source = b_next
        iterations = iterations + active.int()
        if tol > 0:
            with torch.no_grad():
                apart = (a_next - a) * reg if stop == "potentials" else (a + lse).exp() - mu
                change = torch.where(has_row, apart, 0.0).abs().sum(dim=1)
            a = torch.where(active[:, None], a_next, a)
            b = torch.where(active[:, None], b_next, b)
            active = active & ~(change < tol)
            if ends_early and not active.any():
                break
        else:
            a, b = a_next, b_next
    plan = (log_kernel + a[:, :, None] + b[:, None, :]).exp()
    return plan, iterations, (plan.detach().sum(dim=2) - mu.detach()).abs().sum(dim=1)


def _backward_op(upstream: Tensor, plan: Tensor, mu: Tensor, nu: Tensor, reg: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(upstream * T) with respect to cost, mu and nu at the fixed point T.

    With T_ij = exp(a_i + b_j - C_ij / reg), W = upstream * T and (r, c) the marginals of T, the adjoint (x, y) solves

        r_i x_i + sum_j T_ij y_j = sum_j W_ij,    c_j y_j + sum_i T_ij x_i = sum_i W_ij

    up to a constant from x to y; then dC = (T * (x_i + y_j) - W) / reg, dmu = x, dnu = y. Solved in double by the Schur
    complement of c, with the constant's direction filled up.
    """
    t, w = plan.double(), upstream.double() * plan.double()
    r, c = t.sum(dim=2), t.sum(dim=1)
    share = torch.where(c > 0, 1 / c, 0.0)
    schur = torch.diag_embed(torch.where(r > 0, r, 1.0)) - (t * share[:, None, :]) @ t.mT
    flat = (r > 0).double()
    schur = schur + flat[:, :, None] * flat[:, None, :] * (r.sum(dim=1) / flat.sum(dim=1).clamp(min=1))[:, None, None]
    w_rows, w_columns = w.sum(dim=2), w.sum(dim=1)
    right = w_rows - (t @ (share * w_columns)[:, :, None])[:, :, 0]
    x = torch.linalg.solve(schur, right)
    y = share * (w_columns - (t.mT @ x[:, :, None])[:, :, 0])
    grad = (t * (x[:, :, None] + y[:, None, :]) - w) / reg
    x, y = (given.sum(dim=0) if mass.ndim == 1 else given for given, mass in ((x, mu), (y, nu)))
    return grad.to(plan.dtype).contiguous(), x.to(mu.dtype).contiguous(), y.to(nu.dtype).contiguous()


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[1], inputs[2])
    ctx.reg, ctx.proximal = inputs[3], inputs[7]


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.proximal:
        raise InputError("ipot's plan is no fixed point, it has no derivative of its own: expected grad='unrolled'")
    return *call("sinkhorn_backward", upstream, *ctx.saved_tensors, ctx.reg), *[None] * 8


register(
    "sinkhorn(Tensor cost, Tensor mu, Tensor nu, float reg, int max_iter, float tol, bool potentials, bool proximal, "
    "int inner, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _sinkhorn,
    _fake,
)
register(
    "sinkhorn_backward(Tensor upstream, Tensor plan, Tensor mu, Tensor nu, float reg) -> (Tensor, Tensor, Tensor)",
    _backward_op,
    lambda upstream, plan, mu, nu, reg: tuple(x.new_empty(x.shape) for x in (plan, mu, nu)),
)
register_derivative("sinkhorn", _backward, _remember)
register_derivative("sinkhorn_backward", functools.partial(refuse_twice, hint="; use grad='unrolled'"))
