"""Square (Andriushchenko et al. 2020) and FAB (Croce and Hein 2020) from torchattacks, with this package's calling
habits, checks and contract. Needs the extra `attacks`."""

import contextlib
import io
from typing import Any

from torch import Tensor, nn

from cmr_fast.attacks.base import Attack, Model, Problem, widened
from cmr_fast.errors import InputError

NAMES = {"linf": "Linf", "l2": "L2"}


class _Borrowed(Attack):
    kind = ""
    gradients = False

    def __init__(self, model: Model, eps: float, settings: dict[str, Any], **options: Any) -> None:
        super().__init__(model, eps=eps, **options)
        if not isinstance(eps, (int, float)):
            raise InputError(f"torchattacks' {self.kind} takes one eps, a number, got {type(eps).__name__}")
        bounds = tuple(float(v) if isinstance(v, (int, float)) else None for v in self.bounds)
        if bounds != (0.0, 1.0):
            raise InputError(f"torchattacks' {self.kind} takes inputs from 0 to 1, got bounds {self.bounds}")
        if not self.classifier:
            raise InputError(f"{self.kind} attacks classifiers; a loss of one's own goes to PGD, APGD or LocalSearch")
        self.settings = settings

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if start is not None:
            raise InputError(f"torchattacks' {self.kind} chooses its own start")
        try:
            import torchattacks
        except ImportError as error:
            raise InputError(f"{self.kind} is torchattacks': pip install 'cmr-fast[attacks]'") from error
        clean = self.victim.scores(problem.origin)
        self._check_classes(clean, problem.labels)
        settings = dict(self.settings)
        if self.kind == "FAB":
            settings["n_classes"] = clean.shape[1]
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it found no parameters to read a device from
            theirs = getattr(torchattacks, self.kind)(
                _Module(self), norm=NAMES[self.norm], eps=self.eps, seed=self.seed % 2**63, **settings
            )
        theirs.set_device(problem.origin.device)
        found = theirs(problem.origin, problem.labels).detach()
        return found.contiguous(), problem.origin.new_empty((0, len(found)))


class _Module(nn.Module):
    """The victim as the module that torchattacks expects."""

    def __init__(self, attack: _Borrowed) -> None:
        super().__init__()
        self.victim, self.gradients = attack.victim, attack.gradients

    def forward(self, x: Tensor) -> Tensor:
        if not self.gradients:
            return self.victim.scores(x)
        return widened(self.victim.model(self.victim._input(x)))


class Square(_Borrowed):
    """Random search with squares, no gradient: `adv = Square(model, eps=8/255, queries=5000)(x, y)`."""

    kind = "Square"

    def __init__(
        self, model: Model, eps: float = 8 / 255, queries: int = 5000, *, restarts: int = 1, **options: Any
    ) -> None:
        super().__init__(model, eps, {"n_queries": queries, "n_restarts": restarts}, **options)


class FAB(_Borrowed):
    """Fast adaptive boundary: the smallest perturbation; samples whose smallest is above eps come back as they are."""

    kind = "FAB"
    gradients = True

    def __init__(
        self, model: Model, eps: float = 8 / 255, steps: int = 100, *, restarts: int = 1, targeted: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        settings = {"steps": steps, "n_restarts": restarts, "multi_targeted": targeted}
        super().__init__(model, eps, settings, **options)
