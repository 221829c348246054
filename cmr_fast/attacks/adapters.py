"""Square (Andriushchenko et al. 2020) and FAB (Croce and Hein 2020) from torchattacks.

With this package's calling habits, checks and contract. Needs the extra `attacks`.
"""

import contextlib
import importlib
import io
from typing import Any, Unpack

from torch import Tensor, nn

from cmr_fast.attacks.base import Attack, Options
from cmr_fast.attacks.problem import Problem
from cmr_fast.attacks.settings import flag, whole
from cmr_fast.attacks.victim import Model, Victim
from cmr_fast.errors import InputError

NAMES = {"linf": "Linf", "l2": "L2"}


class _Borrowed(Attack):
    kind = ""
    gradients = False

    def __init__(self, model: Model, eps: float, settings: dict[str, Any], **options: Unpack[Options]) -> None:
        super().__init__(model, eps=eps, **options)
        if not isinstance(self.eps, (int, float)):
            raise InputError(f"torchattacks' {self.kind} takes one eps, a number, got {type(eps).__name__}")
        bounds = tuple(float(v) if isinstance(v, (int, float)) else None for v in self.bounds)
        if bounds != (0.0, 1.0):
            raise InputError(f"torchattacks' {self.kind} takes inputs from 0 to 1, got bounds {self.bounds}")
        if not self.classifier:
            raise InputError(f"{self.kind} attacks classifiers; a loss of one's own goes to PGD, APGD or LocalSearch")
        try:
            self._make = getattr(importlib.import_module("torchattacks"), self.kind)
        except ImportError as error:
            raise InputError(
                f"{self.kind} comes with torchattacks: pip install torchattacks, or cmr_fast's extra `attacks`"
            ) from error
        self.settings = settings

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if start is not None:
            raise InputError(f"torchattacks' {self.kind} chooses its own start")
        victim = problem.call.victim
        clean = victim.scores(problem.origin)
        problem.call.check_classes(clean, problem.labels)
        settings = {**self.settings, **({"n_classes": clean.shape[1]} if self.kind == "FAB" else {})}
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it found no parameters to read a device from
            borrowed = self._make(
                _Module(victim, self.gradients), norm=NAMES[self.norm], eps=self.eps, seed=self.seed % 2**63, **settings
            )
        borrowed.set_device(problem.origin.device)
        result = borrowed(problem.origin, problem.labels).detach()
        return result.contiguous(), problem.origin.new_empty((0, len(result)))


class _Module(nn.Module):
    """The victim as the module that torchattacks expects."""

    def __init__(self, victim: Victim, gradients: bool) -> None:
        super().__init__()
        self.victim, self.gradients = victim, gradients

    def forward(self, x: Tensor) -> Tensor:
        return self.victim.outputs(x) if self.gradients else self.victim.scores(x)


class Square(_Borrowed):
    """Random search with squares, no gradient: `adv = Square(model, eps=8/255, queries=5000)(x, y)`.

    Parameters
    ----------
    model, options
        As of PGD; bounds are 0 and 1, the loss is a named one.
    eps
        One radius.
    queries
        Of the model, a sample and restart.
    restarts
        Runs, each on the samples that no run before it has fooled.

    Raises
    ------
    InputError
        Without torchattacks, and for what it cannot do; of a call, as PGD.

    Notes
    -----
    Andriushchenko et al. 2020, "Square attack: a query-efficient black-box adversarial attack via random search".
    """

    kind = "Square"

    def __init__(
        self, model: Model, eps: float = 8 / 255, queries: int = 5000, *, restarts: int = 1, **options: Unpack[Options]
    ) -> None:
        settings = {"n_queries": whole("queries", queries, 1), "n_restarts": whole("restarts", restarts, 1)}
        super().__init__(model, eps, settings, **options)


class FAB(_Borrowed):
    """Fast adaptive boundary: the smallest perturbation; samples whose smallest is above eps come back as they are.

    Parameters
    ----------
    model, options
        As of PGD; bounds are 0 and 1, the loss is a named one.
    eps
        One radius.
    steps, restarts
        Of the search, and how many searches.
    targeted
        One search for each of the likeliest wrong classes.

    Raises
    ------
    InputError
        Without torchattacks, and for what it cannot do; of a call, as PGD.

    Notes
    -----
    Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack".
    """

    kind = "FAB"
    gradients = True

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        steps: int = 100,
        *,
        restarts: int = 1,
        targeted: bool = False,
        **options: Unpack[Options],
    ) -> None:
        counts = {"steps": whole("steps", steps, 1), "n_restarts": whole("restarts", restarts, 1)}
        super().__init__(model, eps, {**counts, "multi_targeted": flag("targeted", targeted)}, **options)
