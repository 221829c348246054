"""What attacks leave of R@K between images and captions under a defence at test time.

adaptive: the attack is made through the defence; not adaptive: against the model without it, and read with it, which
a defence that only hides gradients survives.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cmr_fast._files import write_aside
from cmr_fast._terminal import show, table_of_numbers
from cmr_fast.attacks.multimodal.base import DualEncoder
from cmr_fast.attacks.multimodal.recall import WAYS
from cmr_fast.attacks.multimodal.ttc import Counterattack, Through
from cmr_fast.attacks.text.candidates import WordModel
from cmr_fast.reports import attacked_captions, figures
from cmr_fast.reports.attacked_captions import AttackedCaptions, examine_read_by
from cmr_fast.reports.page import write_page

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedImages

DRAWS = 1
WHO = ("TTC adaptive", "TTC not adaptive", "undefended")
HEAD = ("attack", *(f"{who} {way.upper()} R@1" for who in WHO for way in WAYS))
ALL_HEAD = ("images read by", *attacked_captions.HEAD)


@dataclass(frozen=True)
class DefendedCaptions:
    """One model under attacks, thrice.

    Attributes
    ----------
    adaptive
        Attacked through the defence, read with it.
    carried
        Attacked without it, read with it.
    undefended
        Attacked and read without it.
    """

    adaptive: AttackedCaptions
    carried: AttackedCaptions
    undefended: AttackedCaptions

    def each(self) -> dict[str, AttackedCaptions]:
        """By the names in WHO."""
        return dict(zip(WHO, (self.adaptive, self.carried, self.undefended), strict=True))

    def at_one(self, name: str) -> list[list[float]]:
        """[TR, IR], R@1 under an attack, "clean" or "worst", in the order of WHO."""
        results = [one.adversarial for one in self.each().values()]
        recalls = [{"clean": one.clean, "worst": one.worst, **one.by_attack}[name] for one in results]
        return [[recall[way][1] for way in WAYS] for recall in recalls]


def defend(
    defended: Counterattack, split: "CaptionedImages", attacks: Sequence[str], *, draws: int = DRAWS,
    mlm: WordModel | None = None, eps: float = 2 / 255, seed: int = 0, dtype: torch.dtype | None = None,
    batch: int = 32,
) -> DefendedCaptions:  # fmt: skip
    """Attack a model without its defence, and through it.

    Parameters
    ----------
    defended
        The model under its defence.
    split, attacks, mlm, eps, seed, dtype, batch
        As of `attacked_captions.examine`.
    draws
        Of the noise, of each image in each step of the adaptive attack.

    Returns
    -------
    DefendedCaptions
        With clean recall under the defence too.

    Raises
    ------
    InputError
        As of `attacked_captions.examine`.
    """
    readers: list[DualEncoder] = [defended.model, defended]
    undefended, carried = examine_read_by(
        readers, defended.model, split, attacks, mlm=mlm, eps=eps, seed=seed, dtype=dtype, batch=batch
    )
    adaptive = examine_adaptive(
        defended, split, attacks, draws=draws, mlm=mlm, eps=eps, seed=seed, dtype=dtype, batch=batch
    )
    return DefendedCaptions(adaptive, carried, undefended)


def examine_adaptive(
    defended: Counterattack, split: "CaptionedImages", attacks: Sequence[str], *, draws: int = DRAWS,
    mlm: WordModel | None = None, eps: float = 2 / 255, seed: int = 0, dtype: torch.dtype | None = None,
    batch: int = 32,
) -> AttackedCaptions:  # fmt: skip
    """As `attacked_captions.examine`, of attacks through the defence, with other noise than its own.

    Parameters
    ----------
    defended
        The model under its defence.
    split, attacks, draws, mlm, eps, seed, dtype, batch
        As of `defend`.

    Raises
    ------
    InputError
        As of `attacked_captions.examine`.
    """
    through = Through(defended, draws, seed)
    return examine_read_by(
        [defended], through, split, attacks, mlm=mlm, eps=eps, seed=seed, dtype=dtype, batch=batch
    )[0]  # fmt: skip


def table_of(result: DefendedCaptions) -> list[list[str]]:
    """Rows in the order of HEAD, in percent: clean, each attack, the worst case of a query."""
    names = {"clean": "clean"} | {name: name for name in result.undefended.changed}
    if len(names) > 2:
        names["worst case of a query"] = "worst"
    return [
        [title, *(f"{100 * share:.1f}" for shares in result.at_one(name) for share in shares)]
        for title, name in names.items()
    ]


def verdict(result: DefendedCaptions) -> list[str]:
    """What the defence costs, what it holds, and whether the attack through it is one to go by."""
    clean = result.at_one("clean")
    _, after, before = (_mean(shares) for shares in clean)
    lines = [f"the defence moves clean R@1 from {before:.1f} to {after:.1f}, the mean of both ways"]
    for name in result.undefended.changed:
        adaptive, carried, bare = (_mean(shares) for shares in result.at_one(name))
        line = f"{name} leaves {bare:.1f} undefended, {carried:.1f} of the defended where it does not know of the "
        line += f"defence, {adaptive:.1f} where it does"
        if adaptive > carried:
            line += ": the adaptive attack is the weaker one, and what it leaves is no measure of the defence"
        lines.append(line)
        above = [
            f"{who} {way.upper()} {100 * left:.1f} over {100 * whole:.1f}"
            for who, shares, wholes in zip(WHO, result.at_one(name), clean, strict=True)
            for way, left, whole in zip(WAYS, shares, wholes, strict=True)
            if left > whole
        ]
        if above:
            lines.append(f"{name} leaves more than there is without an attack, images left alone would leave less: "
                         + ", ".join(above))  # fmt: skip
    return lines


def _mean(shares: Sequence[float]) -> float:
    return 100 * sum(shares) / len(shares)


def print_report(result: DefendedCaptions, title: str) -> None:
    """The table on standard output, and what it says."""
    show(title, table_of_numbers(("percent", *HEAD[1:]), table_of(result)))
    print("adaptive: attacked through the defence; not adaptive: attacked without it, read with it")
    for line in verdict(result):
        print(line)


def write_report(result: DefendedCaptions, out: Path, title: str) -> None:
    """README.md, index.html, results.csv, recalls.csv (R@5 and R@10, clean galleries, rates), and R@1 as a figure."""
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(out / "recalls.csv") as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ALL_HEAD)
        for who, one in result.each().items():
            writer.writerows([who, *row] for row in attacked_captions.table_of(one))
    rows = {row[0]: [float(cell) / 100 for cell in row[1:]] for row in table_of(result)}
    bars = {
        f"{who}, {way.upper()}": {name: cells[len(WAYS) * i + j] for name, cells in rows.items()}
        for i, who in enumerate(WHO) for j, way in enumerate(WAYS)
    }  # fmt: skip
    figures.plot_bars(out / "recall.png", title, bars, "R@1")
    note = (
        "R@1 in percent, of adversarial queries in an adversarial gallery. Adaptive: the attack is made through the "
        "defence, with noise of its own in each step; not adaptive: against the model without it, and read with it. "
        "Captions are not defended."
    )
    pages = [("recall.png", "R@1 clean and under attack")]
    write_page(out, title, HEAD, table_of(result), note, pages, words=verdict(result))
