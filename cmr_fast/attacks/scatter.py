"""Feature Scattering (Zhang and Wang 2019, "Defense against adversarial attacks using feature scattering-based
adversarial training"): an attack without labels that moves the features of a batch apart as a whole.

    x'  <- x + u,  u uniform in the ball                        (Algorithm 1)
    D   =  min over T of sum_ij T_ij C_ij,  C_ij = max(0, 1 - cos(f(x_i), f(x'_j))),  T 1 = T^T 1 = 1 / n
    x'  <- clip(P(x' + alpha sign(grad_x' D)))                  one step

The gradient is of the distance between two sets: a sample's step depends on the group it is transported in.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks.base import Array, Model, Problem, misclassified
from cmr_fast.attacks.pgd import PGD
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value
from cmr_fast.ops.sinkhorn import ipot, sinkhorn

NOT_OURS = ("loss", "success", "targeted", "restarts", "early_stop", "graph")


class FeatureScatter(PGD):
    """`adv = FeatureScatter(model)(x)`; labels are not needed. The paper's settings are the defaults.

    model      its outputs (B, ...) are what is scattered: logits in the paper; pass what returns features for those
    group      samples that are transported together, in the order of the batch; the last group may be smaller.
               None: the whole batch. Say 32 to get on one device what four devices with batches of 32 would do
    solver     "sinkhorn", or "ipot" with beta = reg
    reg        of the entropy, in units of the cost, which lies between 0 and 2
    max_iter   of the solver; sinkhorn stops once its potentials move by less than tol in sum, as the paper's code does
    ot_grad    "envelope": T is held fixed, which is the gradient at the optimum. "unrolled": through the iterations, as
               the paper's code has it; slower, by torch's own operators
    and what PGD takes: norm, random_start, momentum, bounds, normalize, strict, dtype, channels_last, fold, seed, ...

    The random start may leave the box, as in the paper; what is returned does not.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value = 8 / 255,
        steps: int = 1,
        *,
        group: int | None = None,
        solver: Literal["sinkhorn", "ipot"] = "sinkhorn",
        reg: float = 0.01,
        max_iter: int | None = None,
        tol: float = 0.1,
        ot_grad: Literal["envelope", "unrolled"] = "envelope",
        **options: Any,
    ) -> None:
        if refused := [name for name in NOT_OURS if name in options]:
            raise InputError(f"feature scattering has a loss of its own, over all samples: it takes no {refused[0]}")
        super().__init__(model, eps, alpha, steps, loss=self._cost, success=misclassified, **options)
        if group is not None and (not isinstance(group, int) or group < 1):
            raise InputError(f"group must be an integer of 1 or more, or None, got {group!r}")
        if solver not in ("sinkhorn", "ipot"):
            raise InputError(f"solver must be 'sinkhorn' or 'ipot', got {solver!r}")
        if ot_grad not in ("envelope", "unrolled"):
            raise InputError(f"ot_grad must be 'envelope' or 'unrolled', got {ot_grad!r}")
        self.group, self.solver, self.reg, self.tol, self.ot_grad = group, solver, reg, tol, ot_grad
        self.max_iter = max_iter if max_iter is not None else {"sinkhorn": 100, "ipot": 50}[solver]
        self._clean: Tensor | None = None  # unit features of the clean batch, while it is attacked

    def __call__(
        self,
        x: Array,
        y: Array | None = None,
        *,
        index: Array | None = None,
        start: Array | None = None,
        return_info: bool = False,
    ) -> Any:
        """As of the other attacks; y is looked at for the AttackInfo's `success` alone, whose loss is a sample's share
        of the transport cost, in sum D times the number of groups."""
        self.success, self.classifier = (None, False) if y is None else (misclassified, True)
        try:
            labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y
            return super().__call__(x, labels, index=index, start=start, return_info=return_info)
        finally:
            self._clean = None

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        self._remember(problem)
        return super()._perturb(problem, start)

    def _describe(self, out: Tensor, problem: Problem, history: Tensor) -> Any:
        if self._clean is None:
            self._remember(problem)
        return super()._describe(out, problem, history)

    def _remember(self, problem: Problem) -> None:
        self._clean = F.normalize(self.victim.scores(problem.origin).flatten(1), dim=1)

    def _random_start(self, problem: Problem, stream: int) -> Tensor:
        if self.norm == "l2":
            return super()._random_start(problem, stream)
        origin = problem.origin
        noise = self._noise(problem, stream, origin[0].numel()).reshape(origin.shape)
        return origin + problem.spread(problem.eps) * noise

    def _cost(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """sum_i T_ij C_ij of every sample j, (B,)."""
        assert self._clean is not None
        clean, moved = self._clean, F.normalize(outputs.flatten(1), dim=1)
        size = min(self.group or len(clean), len(clean))
        whole = len(clean) // size * size
        parts = [(clean[:whole].unflatten(0, (-1, size)), moved[:whole].unflatten(0, (-1, size)))]
        if whole < len(clean):
            parts.append((clean[None, whole:], moved[None, whole:]))
        costs = []
        for theirs, ours in parts:
            cost = (1 - theirs @ ours.mT).clamp(min=0)
            costs.append((self._plan(cost) * cost).sum(dim=1).flatten())
        return torch.cat(costs)

    def _plan(self, cost: Tensor) -> Tensor:
        if self.solver == "ipot":
            plan = ipot(cost, self.reg, max_iter=self.max_iter, grad=self.ot_grad)
        else:
            plan = sinkhorn(cost, self.reg, max_iter=self.max_iter, tol=self.tol, stop="potentials", grad=self.ot_grad)
        assert isinstance(plan, Tensor)
        return plan
