"""What robustness reports of classifiers and of retrievers share: outcomes, the verdict, the figures."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmr_fast.reports import figures

BROKEN = 0.05  # accuracy, or a share of the clean R@K, that counts as none


@dataclass(frozen=True)
class Outcome:
    """One attack: who is still right after all its restarts, and what each restart left.

    Attributes
    ----------
    name
        Of the attack.
    right
        bool (N,), after all restarts.
    runs
        Share that is right after each restart alone, every one judged at its last step.
    curves
        Mean loss before each step, a list a restart; empty where there are no steps.
    seconds
        That it took.
    in_ball
        Whether it kept to the radius; what did not is no part of the worst case.
    """

    name: str
    right: Tensor
    runs: list[float]
    curves: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    in_ball: bool = True

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return float(self.right.double().mean())

    @property
    def lowest(self) -> float:
        """What the strongest restart alone left."""
        return min(self.runs)

    @property
    def spread(self) -> float:
        """What the weakest restart left, less that of the strongest."""
        return max(self.runs) - min(self.runs)


def worst_case(outcomes: Mapping[str, Outcome]) -> Tensor:
    """Who survives every attack in the ball; those that an attack did not see count by the others.

    Parameters
    ----------
    outcomes
        By attack, of the same samples in the same order.

    Returns
    -------
    Tensor
        bool (N,).
    """
    count = max(len(o.right) for o in outcomes.values())
    left = torch.ones(count, dtype=torch.bool)
    for outcome in (o for o in outcomes.values() if o.in_ball):
        left[: len(outcome.right)] &= outcome.right
    return left


class Examined(ABC):
    """One model's outcomes by attack ("clean" among them), its sweep over eps, and what to make of them."""

    measure: str
    """What is measured: accuracy, R@1."""
    outcomes: Mapping[str, Outcome]
    sweep: Mapping[float, float]
    """The share left by eps, under PGD-20."""

    @property
    def worst(self) -> float:
        """The share that survives every attack."""
        return float(worst_case(self.outcomes).double().mean())

    @property
    def suspicious(self) -> bool:
        """Whether the gradient is masked, or attacks that follow it overstate for another reason."""
        return bool(self.suspicions())

    @abstractmethod
    def suspicions(self) -> list[str]:
        """What is suspicious, in a few words each."""

    @abstractmethod
    def numbers(self) -> str:
        """The numbers behind the verdict, as sentences."""

    @abstractmethod
    def broken(self) -> bool:
        """Whether what is left counts as nothing."""

    @abstractmethod
    def curve(self) -> list[float]:
        """Mean loss before each step of the longest PGD."""

    def remark(self) -> str:
        """What to know about a model that is broken."""
        return ""

    def verdict(self) -> str:
        """A few sentences on whether it is robust, and whether its number under PGD can be quoted."""
        if suspicions := self.suspicions():
            return (
                f"SUSPICIOUS: the model's gradient misleads attacks that follow it ({'; '.join(suspicions)}). Do not "
                f"quote its {self.measure} under PGD. {self.numbers()}"
            )
        if self.broken():
            return f"Not robust, and nothing is hidden: no check is suspicious.{self.remark()} {self.numbers()}"
        return (
            f"No sign of a masked gradient. The worst case bounds the robust {self.measure} from above. "
            f"{self.numbers()}"
        )


def draw(
    reports: Mapping[str, Examined], out: Path, title: str, *, loss: str, unit: tuple[float, str], log_x: bool = False
) -> list[tuple[str, str]]:
    """The three figures of a report, in the folder `out`.

    Parameters
    ----------
    reports
        By the model's name.
    out
        A folder that exists.
    title
        Of the report.
    loss
        What the attacks raise, in words.
    unit
        Radii are given in this unit, and how it is written on the axis.
    log_x
        A logarithmic axis of radii, without 0.

    Returns
    -------
    list of (str, str)
        File and caption of each figure.
    """
    measure, looks = next(iter(reports.values())).measure, list(reports)
    pages = [("attacks.png", f"{measure} under each attack, {title}")]
    bars = {name: {n: o.accuracy for n, o in r.outcomes.items()} for name, r in reports.items()}
    figures.plot_bars(out / "attacks.png", f"{measure} under attack, {title}", bars, measure)
    curves = {name: (np.arange(len(c)), np.asarray(c)) for name, r in reports.items() if (c := r.curve())}
    if curves:
        caption = f"Loss against step of PGD (mean, first restart), {title}"
        pages.append(("loss-against-step.png", caption))
        figures.plot_lines(out / pages[-1][0], caption, curves, "step", loss, looks=looks, from_zero=False)
    sweeps = {}
    for name, r in reports.items():
        radii = [eps for eps in r.sweep if eps or not log_x]
        sweeps[name] = np.array(radii) / unit[0], np.array([r.sweep[eps] for eps in radii])
    pages.append(("eps-sweep.png", f"{measure} under PGD-20 against the radius, {title}"))
    figures.plot_lines(out / "eps-sweep.png", pages[-1][1], sweeps, unit[1], measure, looks=looks, log_x=log_x)
    return pages


@contextmanager
def going_on(keep: Path | None, finished: Mapping[str, Outcome]) -> Iterator[None]:
    """An interrupt says whether finished attacks lie in the folder `keep`, from which the same command goes on.

    Parameters
    ----------
    keep
        A folder, or None.
    finished
        What lies there by then.
    """
    try:
        yield
    except KeyboardInterrupt:
        if keep is not None and finished:
            raise KeyboardInterrupt(f"the same command goes on from the attacks kept in {keep}") from None
        raise
