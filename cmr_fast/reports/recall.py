"""What attacks leave of a retriever's R@K, and whether that can be believed: `robustness.py` for rankings.

Every query keeps its worst over all attacks. Beside attacks that follow the gradient there are two that do not, noise
and, with a surrogate, transfer: where these find more, or where R@1 does not fall to nothing in a large ball, the
gradient is hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from cmr_fast._terminal import counting, new_table, show
from cmr_fast.attacks import registry
from cmr_fast.attacks.base import Options
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.ranking import Ranker, RecallUnderAttack, ranking_ce, recall_under_attack
from cmr_fast.reports.outcomes import Examined, Outcome, draw
from cmr_fast.reports.page import write_page

SLACK = 0.02  # of R@1: what an attack without gradients may find beyond PGD by chance
FACTORS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 32.0)  # of eps, in the sweep
SWEPT, NOISE, TRANSFER = "pgd20", "noise20", "transfer-pgd20"


@dataclass(frozen=True)
class RecallReport(Examined):
    """All of one retriever.

    Attributes
    ----------
    recall
        R@K by attack.
    sweep
        R@1 under PGD-20 by eps.
    losses
        Mean ranking loss before each step of PGD-50.
    """

    recall: RecallUnderAttack
    sweep: dict[float, float]
    losses: list[float]

    @property
    def first(self) -> int:
        """The least K, which the verdict goes by."""
        return min(self.recall.clean)

    @property
    def measure(self) -> str:  # type: ignore[override]
        """R@K of that K."""
        return f"R@{self.first}"

    @property
    def outcomes(self) -> dict[str, Outcome]:  # type: ignore[override]
        """Which queries are right by attack."""
        column = list(self.recall.clean).index(self.first)
        right = {name: hits[:, column] for name, hits in self.recall.hits.items()}
        return {name: Outcome(name, mask, [float(mask.double().mean())]) for name, mask in right.items()}

    def suspicions(self) -> list[str]:
        """A sentence each."""
        first = self.first
        left = {name: shares[first] for name, shares in self.recall.by_attack.items()}
        blind = {name: share for name, share in left.items() if registry.read(name).blind}
        best = min((share for name, share in left.items() if name not in blind), default=1.0)
        result = [
            f"{name}, which sees no gradient of the model, leaves R@{first} {share:.1%}, gradient attacks {best:.1%}"
            for name, share in blind.items()
            if share < best - SLACK
        ]
        eps, last = list(self.sweep.items())[-1]
        if last > max(SLACK, self.recall.clean[first] / 4):
            result.append(f"R@{first} is still {last:.1%} in a ball of {eps:.3g}")
        if self.losses and not self.losses[-1] > self.losses[0]:
            result.append(f"the loss does not rise in {len(self.losses)} steps")
        return result

    def broken(self) -> bool:
        """Whether a tenth or less of the clean R@K survives."""
        return self.recall.worst[self.first] <= self.recall.clean[self.first] / 10

    def remark(self) -> str:
        """Whether noise does as much."""
        clean = self.recall.clean[self.first]
        noise = self.recall.by_attack.get(NOISE, self.recall.clean)[self.first]
        return " Noise alone does as much: the ball is wide for these features." if noise <= clean / 5 else ""

    def numbers(self) -> str:
        """R@K clean and at the worst, and the share of queries made wrong."""
        r = self.recall
        each = [f"R@{k} {r.clean[k]:.1%} clean, {r.worst[k]:.1%} attacked" for k in r.clean]
        return (
            f"{'; '.join(each)}, where each query keeps its worst attack: {r.success[self.first]:.1%} of the queries "
            f"right at {self.first} are made wrong."
        )

    def curve(self) -> list[float]:
        """Of PGD-50."""
        return self.losses


def examine(
    encode: Callable[[Tensor], Tensor],
    x: Tensor,
    gallery: Tensor,
    relevant: Tensor,
    *,
    eps: float,
    surrogate: tuple[Callable[[Tensor], Tensor], Tensor] | None = None,
    codes: bool = False,
    batch: int = 250,
    k: tuple[int, ...] = (1, 5, 10),
    restarts: int = 1,
    **options: Unpack[Options],
) -> RecallReport:
    """Attacks, a sweep over eps and the loss against the step, of queries against a clean gallery.

    Parameters
    ----------
    encode, x, gallery, relevant, codes, batch, k, restarts, options
        As of recall_under_attack.
    eps
        Radius of the ball, in the units of x.
    surrogate
        Another encoder and its gallery, of the same items, for transfer.

    Returns
    -------
    RecallReport
        With its verdict.

    Raises
    ------
    InputError
        As recall_under_attack, and for a surrogate that is the victim.
    """
    names = [name for name in registry.STANDARD_RANKING if name not in _unfit(gallery)]
    names += [NOISE] if surrogate is None else [NOISE, TRANSFER]
    other = None if surrogate is None else Ranker(*surrogate, codes=codes)
    low, high = (torch.as_tensor(v) for v in options.get("bounds", (0.0, 1.0)))
    width = float((high - low).max())
    common: dict[str, Any] = {"codes": codes, "batch": batch, **options}
    sweep = {}
    with counting(1 + len(FACTORS), "attacking queries") as advance:
        recall = recall_under_attack(
            encode, x, gallery, relevant, eps=eps, attacks=names, k=k, restarts=restarts, surrogate=other, **common
        )
        advance(1)
        for radius in sorted({min(eps * factor, width) for factor in FACTORS}):
            left = recall_under_attack(encode, x, gallery, relevant, eps=radius, attacks=[SWEPT], k=(1,), **common)
            sweep[radius] = left.by_attack[SWEPT][1]
            advance(1)
    settings: Options = {"progress": False, **options, "loss": ranking_ce}
    atk = PGD(Ranker(encode, gallery, codes=codes), eps, None, 50, **settings)
    few = slice(0, batch)
    losses = atk(x[few], relevant[few], return_info=True)[1].losses.double().mean(dim=1).tolist() if eps else []
    return RecallReport(recall, sweep, losses)


def _unfit(gallery: Tensor) -> dict[str, str]:
    return registry.unfit(registry.STANDARD_RANKING, len(gallery)) if isinstance(gallery, Tensor) else {}


def print_report(report: RecallReport, title: str) -> None:
    """R@K by attack on standard output, and the verdict.

    Parameters
    ----------
    report
        What to print.
    title
        Above the table.
    """
    table = new_table("image queries, texts ranked")
    for k in report.recall.clean:
        table.add_column(f"R@{k}", justify="right")
    for row in rows(report.recall):
        table.add_row(*row)
    show(title, table)
    print(f"\n{report.verdict()}")


def rows(recall: RecallUnderAttack) -> list[list[str]]:
    """The table's rows: R@K by attack, the worst case, both definitions of the success rate.

    Parameters
    ----------
    recall
        Of one model.

    Returns
    -------
    list of list of str
        Name, then a share for each K.
    """
    each = [*recall.rows(), ("right before, wrong after (of those right)", recall.success)]
    each.append(("clean less worst case", recall.drop))
    return [[name, *(f"{value:.1%}" for value in left.values())] for name, left in each]


def write_report(reports: Mapping[str, RecallReport], out: Path, title: str, eps: float) -> None:
    """recall.csv, README.md, index.html and figures.

    Parameters
    ----------
    reports
        By the name of the run.
    out
        The folder; made where it is missing.
    title
        Of the page.
    eps
        The radius with which they were examined.
    """
    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(reports.values())).recall
    unit = eps or 1.0, f"radius, in units of {eps or 1.0:.3g}"
    figures = draw(reports, out, title, loss="ranking loss", unit=unit, log_x=True)
    several = len(reports) > 1
    head = [*(["run"] if several else []), "image queries, texts ranked", *(f"R@{n}" for n in first.clean)]
    table = [[*([name] if several else []), *row] for name, r in reports.items() for row in rows(r.recall)]
    note = (
        f"{len(first.hits['clean'])} image queries against {first.gallery} clean texts; L-inf ball of {eps:.3g}. "
        "A query is found where a relevant text is among the first K; in the worst case under each attack."
    )
    words = [f"{name}: {report.verdict()}" for name, report in reports.items()]
    write_page(out, "R@K under attack", head, table, note, figures, words, "recall.csv")


def queried(model: Any, texts: Any) -> tuple[nn.Module, Tensor]:
    """A trained method as an encoder of image queries, and the gallery.

    Parameters
    ----------
    model
        A retriever.
    texts
        A data set's texts.

    Returns
    -------
    encoder, gallery
        A module, image features (B, ...) -> (B, d), and all texts encoded, (N, d).
    """
    from cmr_fast.methods.evaluation import encode_all

    class ImageEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            encoded: Tensor = model.encode("image", x)
            return encoded

    return ImageEncoder(), encode_all(model, "text", texts)
