"""Feature Scattering: an attack without labels that moves the features of a batch apart as a whole.

Zhang and Wang 2019, "Defense against adversarial attacks using feature scattering-based adversarial training":

    x'  <- x + u,  u uniform in the ball                        (Algorithm 1)
    D   =  min over T of sum_ij T_ij C_ij,  C_ij = max(0, 1 - cos(f(x_i), f(x'_j))),  T 1 = T^T 1 = 1 / n
    x'  <- clip(P(x' + alpha sign(grad_x' D)))                  one step

The gradient is of the distance between two sets: a sample's step depends on the group it is transported in.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks import losses
from cmr_fast.attacks.base import Array, AttackInfo, Labels, misclassified
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.problem import Call, Problem
from cmr_fast.attacks.settings import real, whole
from cmr_fast.attacks.victim import Model, Victim
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Norm, Value
from cmr_fast.ops.sinkhorn import ipot, sinkhorn

SOLVERS = {"sinkhorn": 100, "ipot": 50, "identity": 0}  # and their iterations, at most
NOT_OURS = ("loss", "success", "targeted", "restarts", "early_stop", "graph")


class ScatterOptions(TypedDict, total=False):
    """What of PGD's keywords feature scattering takes."""

    norm: Norm
    random_start: bool
    momentum: float | None
    bounds: tuple[Value, Value]
    normalize: tuple[Value, Value] | None
    strict: bool
    dtype: torch.dtype | None
    channels_last: bool
    fold: bool
    seed: int
    generator: torch.Generator | None
    check: bool
    progress: bool | None


class FeatureScatter(PGD):
    """`adv = FeatureScatter(model)(x)`; labels are not needed. The paper's settings are the defaults.

    Parameters
    ----------
    model
        Its outputs (B, ...) are what is scattered: logits in the paper; pass what returns features for those.
    eps, alpha, steps, options
        As of PGD: norm, random_start, momentum, bounds, normalize, strict, dtype, channels_last, fold, seed, ...
    group
        Samples that are transported together, in the order of the batch; the last group may be smaller. None: the whole
        batch. Say 32 to get on one device what four devices with batches of 32 would do.
    solver
        "sinkhorn", or "ipot" with beta = reg; "identity" transports every sample to its own clean one, T = I / n, which
        is what the paper's section 5.2 compares with: distance without coupling.
    reg
        Of the entropy, in units of the cost, which lies between 0 and 2.
    max_iter, tol
        Of the solver; sinkhorn stops once its potentials move by less than tol in sum, as the paper's code does.
    ot_grad
        "unrolled": through the solver's iterations, as the paper's code has it, by torch's own operators. "envelope": T
        is held fixed, which is the gradient at the optimum: another step wherever the solver stops before it.

    Raises
    ------
    InputError
        For settings out of their range, and PGD's settings that do not fit; of a call, as PGD.

    Notes
    -----
    The random start may leave the box, as in the paper; what is returned does not. Zhang and Wang 2019, Algorithm 1.
    """

    supported_mode: tuple[str, ...] = ("default",)

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value | None = 8 / 255,
        steps: int = 1,
        *,
        group: int | None = None,
        solver: Literal["sinkhorn", "ipot", "identity"] = "sinkhorn",
        reg: float = 0.01,
        max_iter: int | None = None,
        tol: float = 0.1,
        ot_grad: Literal["unrolled", "envelope"] = "unrolled",
        **options: Unpack[ScatterOptions],
    ) -> None:
        if refused := [name for name in NOT_OURS if name in options]:
            raise InputError(f"feature scattering has a loss of its own, over all samples: it takes no {refused[0]}")
        super().__init__(model, eps, alpha, steps, **options)
        if not isinstance(solver, str) or solver not in SOLVERS:
            raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if not isinstance(ot_grad, str) or ot_grad not in ("unrolled", "envelope"):
            raise InputError(f"ot_grad must be 'unrolled' or 'envelope', got {ot_grad!r}")
        self.group = None if group is None else whole("group", group, 1)
        self.solver, self.ot_grad = solver, ot_grad
        self.reg, self.tol = real("reg", reg, 0.0, 1e30, above=True), real("tol", tol, 0.0, float("inf"))
        self.max_iter = SOLVERS[solver] if max_iter is None else whole("max_iter", max_iter, 0)

    @overload
    def __call__(
        self,
        x: Array,
        y: Labels = None,
        *,
        index: object = None,
        start: object = None,
        return_info: Literal[False] = False,
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, y: Labels = None, *, index: object = None, start: object = None, return_info: Literal[True]
    ) -> tuple[Array, AttackInfo]: ...

    @overload
    def __call__(
        self, x: Array, y: Labels = None, *, index: object = None, start: object = None, return_info: bool
    ) -> Array | tuple[Array, AttackInfo]: ...

    def __call__(
        self, x: Any, y: Labels = None, *, index: object = None, start: object = None, return_info: bool = False
    ) -> Any:
        """Scattered samples, as of the other attacks.

        y is looked at for the AttackInfo's `success` alone, which is None without it; `loss` is a sample's share of the
        transport cost, in sum D times the number of groups.
        """
        return super().__call__(x, y, index=index, start=start, return_info=return_info)

    def checked(self, x: Any, y: Labels) -> tuple[Tensor, Tensor, bool]:
        """As of the other attacks; without labels, -1 for each.

        Parameters
        ----------
        x, y
            As of a call.

        Returns
        -------
        images, labels, was_numpy
            As of the other attacks.
        """
        none = np.full(len(x), -1) if y is None and hasattr(x, "__len__") else y
        return super().checked(x, none)

    def _call(self, victim: Victim) -> Call:
        return Call(victim, self.loss, None, False)

    def _set_out(self, problem: Problem) -> None:
        """The call's loss, from its clean features; who is fooled is asked where there are labels."""
        problem.call.loss = self._cost_from(problem)
        if bool((problem.labels != -1).any()):
            problem.call.success, problem.call.classifier = misclassified, True

    def _random_start(self, problem: Problem, stream: int) -> Tensor:
        if self.norm == "l2":
            return super()._random_start(problem, stream)
        origin = problem.origin
        noise = problem.noise(self.seed, stream, origin[0].numel()).reshape(origin.shape)
        return origin + problem.spread(problem.eps) * noise

    def _cost_from(self, problem: Problem) -> losses.Loss:
        """The loss of a call: sum_i T_ij C_ij of every sample j, (B,), from the clean batch's unit features."""
        clean = F.normalize(problem.call.victim.scores(problem.origin).flatten(1), dim=1)

        def cost_of(outputs: Tensor, labels: Tensor) -> Tensor:
            moved = F.normalize(outputs.flatten(1), dim=1)
            size = min(self.group or len(clean), len(clean))
            whole_groups = len(clean) // max(size, 1) * size
            parts = []
            if whole_groups:
                parts = [tuple(v[:whole_groups].reshape(-1, size, v.shape[1]) for v in (clean, moved))]
            if whole_groups < len(clean):
                parts.append((clean[None, whole_groups:], moved[None, whole_groups:]))
            costs = [clean.new_zeros(0)]
            for before, after in parts:
                cost = (1 - before @ after.mT).clamp(min=0)
                costs.append((self._plan(cost) * cost).sum(dim=1).flatten())
            return torch.cat(costs)

        return cost_of

    def _plan(self, cost: Tensor) -> Tensor:
        if self.solver == "identity":
            return torch.eye(cost.shape[-1], dtype=cost.dtype, device=cost.device) / cost.shape[-1]
        if self.solver == "ipot":
            plan = ipot(cost, self.reg, max_iter=self.max_iter, grad=self.ot_grad)
        else:
            plan = sinkhorn(cost, self.reg, max_iter=self.max_iter, tol=self.tol, stop="potentials", grad=self.ot_grad)
        assert isinstance(plan, Tensor)
        return plan
