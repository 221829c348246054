"""What attacks leave of a retriever's R@K, and whether that can be believed: `robustness.py` for rankings.

Every query keeps its worst over all attacks. Beside attacks that follow the gradient there are two that do not, noise
and, with a surrogate, transfer: where these find more, or where R@1 does not fall to nothing in a large ball, the
gradient is hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmr_fast._terminal import counting, new_table, show
from cmr_fast.attacks.base import Attack
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.ranking import ATTACKS, Ranker, RecallUnderAttack, ranking_ce, recall_under_attack
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.reports import figures
from cmr_fast.reports.page import write_page

SLACK = 0.02  # of R@1: what an attack without gradients may find beyond PGD by chance
FACTORS = (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 32.0)
GRADIENT = tuple(ATTACKS)
NOISE = "noise, best of 20"


@dataclass(frozen=True)
class RecallReport:
    """recall: R@K by attack; sweep: R@1 under PGD-20 by eps; losses: mean ranking loss before each step of PGD-50."""

    recall: RecallUnderAttack
    sweep: dict[float, float]
    losses: list[float]

    def findings(self) -> list[str]:
        """What is suspicious, a sentence each."""
        first = min(self.recall.clean)
        seen = {name: left[first] for name, left in self.recall.by_attack.items()}
        blind = {name: left for name, left in seen.items() if name not in GRADIENT}
        best = min(left for name, left in seen.items() if name in GRADIENT)
        told = [
            f"{name}, which sees no gradient of the model, leaves R@{first} {left:.1%}, the gradient attacks {best:.1%}"
            for name, left in blind.items()
            if left < best - SLACK
        ]
        eps, last = list(self.sweep.items())[-1]
        if last > max(SLACK, self.recall.clean[first] / 4):
            told.append(f"R@{first} is still {last:.1%} in a ball of {eps:.3g}")
        if self.losses and not self.losses[-1] > self.losses[0]:
            told.append(f"the loss does not rise in {len(self.losses)} steps")
        return told

    def verdict(self) -> str:
        """A few sentences."""
        r = self.recall
        numbers = "; ".join(
            f"R@{k} {r.clean[k]:.1%} clean, {r.worst[k]:.1%} where each query keeps its worst attack "
            f"({r.success[k]:.1%} of the queries that were right are made wrong)"
            for k in r.clean
        )
        if told := self.findings():
            return f"SUSPICIOUS: the gradient is hidden ({'; '.join(told)}). Do not quote R@K under PGD. {numbers}."
        first = min(r.clean)
        if r.worst[first] <= r.clean[first] / 10:
            noise = r.by_attack.get(NOISE, r.clean)[first]
            wide = (
                " Noise alone does as much: the ball is wide for these features." if noise <= r.clean[first] / 5 else ""
            )
            return f"Not robust, and nothing is hidden.{wide} {numbers}."
        return f"No sign of a hidden gradient. The worst case bounds the robust R@K from above. {numbers}."


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
    seed: int = 0,
    **options: Any,
) -> RecallReport:
    """Attacks, a sweep over eps and the loss against the step, of queries x against a clean gallery.

    surrogate    another encoder and its gallery, of the same items, for transfer
    options      k, restarts, bounds, check, ...: as `recall_under_attack` takes them
    """
    settings = {name: value for name, value in options.items() if name not in ("k", "restarts")}
    attacks: dict[str, Callable[..., Attack]] = {**ATTACKS, NOISE: _noise}
    if surrogate is not None:
        other = Ranker(*surrogate, codes=codes)

        def transferred(model: Any, **given: Any) -> Any:
            return Transfer(model, other, alpha=given["eps"] / 4, steps=20, loss=ranking_ce, **given)

        attacks["transfer of PGD-20"] = transferred
    common: dict[str, Any] = {"codes": codes, "batch": batch, "seed": seed}
    low, high = (torch.as_tensor(v) for v in options.get("bounds", (0.0, 1.0)))
    width = float((high - low).max())
    sweep = {}
    with counting(1 + len(FACTORS), "attacking queries") as tell:
        recall = recall_under_attack(encode, x, gallery, relevant, eps=eps, attacks=attacks, **common, **options)
        tell(1)
        for radius in sorted({min(eps * factor, width) for factor in FACTORS}):
            only = {"PGD-20 ce": ATTACKS["PGD-20 ce"]}
            found = recall_under_attack(
                encode, x, gallery, relevant, eps=radius, attacks=only, k=(1,), **common, **settings
            )
            sweep[radius] = found.by_attack["PGD-20 ce"][1]
            tell(1)
    model = Ranker(encode, gallery, codes=codes)
    atk = PGD(model, eps, eps / 4 or 1.0, 50, loss=ranking_ce, seed=seed, progress=False, **settings)
    few = slice(0, batch)
    losses = atk(x[few], relevant[few], return_info=True)[1].losses.double().mean(dim=1).tolist() if eps else []
    return RecallReport(recall, sweep, losses)


def _noise(model: Any, **options: Any) -> Attack:
    return PGD(model, alpha=1.0, steps=0, restarts=20, loss=ranking_ce, **options)


def print_report(report: RecallReport, title: str) -> None:
    """R@K by attack on standard output, and the verdict."""
    table = new_table("image queries, texts ranked")
    for k in report.recall.clean:
        table.add_column(f"R@{k}", justify="right")
    for row in rows(report.recall):
        table.add_row(*row)
    show(title, table)
    print(f"\n{report.verdict()}")


def rows(recall: RecallUnderAttack) -> list[list[str]]:
    """The table's rows: R@K by attack, the worst case, both definitions of the success rate."""
    found = [(name, left) for name, left in recall.rows()]
    found += [("right before, wrong after (of those right)", recall.success), ("clean less worst case", recall.drop)]
    return [[name, *(f"{value:.1%}" for value in left.values())] for name, left in found]


def write_report(reports: Mapping[str, RecallReport], out: Path, title: str, eps: float) -> None:
    """recall.csv, README.md, index.html and figures in the folder `out`; reports by the name of the run."""
    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(reports.values())).recall
    k = min(first.clean)
    bars = {name: {row: left[k] for row, left in report.recall.rows()} for name, report in reports.items()}
    caption = f"R@{k} under each attack, {title}"
    figures.plot_bars(out / "attacks.png", caption, bars, f"R@{k}")
    pages = [("attacks.png", caption)]
    sweeps = {
        name: (np.array([e / eps for e in r.sweep if e]), np.array([left for e, left in r.sweep.items() if e]))
        for name, r in reports.items()
    }
    caption = f"R@1 under PGD-20 against the radius, {title}"
    figures.plot_lines(
        out / "eps-sweep.png", caption, sweeps, f"radius, in units of {eps:.3g}", "R@1", looks=list(reports), log_x=True
    )
    pages.append(("eps-sweep.png", caption))
    curves = {name: (np.arange(len(r.losses)), np.array(r.losses)) for name, r in reports.items() if r.losses}
    if curves:
        caption = f"Ranking loss against step of PGD, {title}"
        figures.plot_lines(
            out / "loss-against-step.png", caption, curves, "step", "ranking loss", looks=list(reports), from_zero=False
        )
        pages.append(("loss-against-step.png", caption))
    several = len(reports) > 1
    head = [*(["run"] if several else []), "image queries, texts ranked", *(f"R@{n}" for n in first.clean)]
    table = [[*([name] if several else []), *row] for name, r in reports.items() for row in rows(r.recall)]
    note = (
        f"{len(first.hits['clean'])} image queries against {first.gallery} clean texts; L-inf ball of {eps:.3g}. "
        "A query is found where a relevant text is among the first K; in the worst case under each attack."
    )
    words = [f"{name}: {report.verdict()}" for name, report in reports.items()]
    write_page(out, "R@K under attack", head, table, note, pages, words, "recall.csv")


def queried(model: Any, texts: Any) -> tuple[nn.Module, Tensor]:
    """A trained method as an encoder of image queries, and the gallery of all `texts`."""
    from cmr_fast.methods.evaluation import encode_all

    class ImageEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return model.encode("image", x)

    return ImageEncoder(), encode_all(model, "text", texts)
