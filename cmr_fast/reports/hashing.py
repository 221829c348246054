"""What CMLA leaves of a hashing method's retrieval: mAP of all four tasks, clean and attacked, and the distortion D.

Attacks are optimised on relaxed codes and scored on binary ones: perturbed queries rank the clean database. I2T and T2I
are what the attack is after; I2I and T2T tell what its intra-modal term keeps.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast._terminal import show, table_of_numbers
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods._runfolder import refuse_used
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.hardening import bounds_of, harden, harden_on_the_fly, named_attack, perturb
from cmr_fast.methods.method import Retriever, Run, RunConfig
from cmr_fast.modalities import MODALITIES
from cmr_fast.ops import pack_codes
from cmr_fast.reports import figures
from cmr_fast.reports.page import write_page
from cmr_fast.retrieval.metrics import evaluate_codes

if TYPE_CHECKING:
    from cmr_fast.retrieval import RetrievalResult

TASKS = ("i2t", "t2i", "i2i", "t2t")
CROSS = ("i2t", "t2i")
HEAD = ("queries", "I2T", "T2I", "I2I", "T2T", "D image", "D text")
WEAK = 0.25
"""An attack that takes less than this share of a direction's mAP is said to take little."""


@dataclass(frozen=True)
class Row:
    """Queries of one kind: mAP(all) by task, ties by index and tie-aware, and their distortion by modality.

    Of a targeted attack also t-mAP by task, the mAP of the labels that queries were led to, and that of the same
    labels before; of the queries that were led at all.
    """

    name: str
    map: dict[str, float]
    tie_aware: dict[str, float]
    distortion: dict[str, float] = field(default_factory=lambda: {"image": 0.0, "text": 0.0})
    targeted: dict[str, float] = field(default_factory=dict)
    targeted_before: dict[str, float] = field(default_factory=dict)

    @property
    def cross(self) -> float:
        """The mean of I2T and T2I."""
        return sum(self.map[task] for task in CROSS) / 2


@dataclass(frozen=True)
class Attacked:
    """One model: clean queries, then each attack's; what is needed to draw them."""

    rows: list[Row]
    ranked: dict[str, "dict[str, RetrievalResult]"]
    losses: dict[str, dict[str, np.ndarray]]
    queries: dict[str, Pairs]


def score(
    model: Retriever, query: Pairs, database: Pairs, name: str, base: Mapping[str, Tensor] | None = None
) -> "tuple[Row, dict[str, RetrievalResult]]":
    """mAP(all) of query codes over the database's, for all TASKS.

    Parameters
    ----------
    model
        A hashing method.
    query, database
        Q and N pairs, labels (., C) or (.,).
    name
        What the row is called.
    base
        The database's packed codes by modality, uint8 (N, bytes), where they were made already.

    Returns
    -------
    Row, dict
        mAP from 0 to 1, by index and tie-aware, and the ranked result of each task.

    Raises
    ------
    InputError
        For a model that makes embeddings.
    """
    if not model.binary:
        raise InputError(f"{model.name} makes embeddings; expected a hashing method, whose signs are a code")
    asked, bits = _codes(model, query), model.config.bits
    base = _codes(model, database) if base is None else base
    results: dict[str, Any] = {}
    aware: dict[str, float] = {}
    for task in TASKS:
        one, other = (MODALITIES["it".index(letter)] for letter in (task[0], task[2]))
        codes = asked[one], base[other], query.labels, database.labels
        results[task] = evaluate_codes(*codes, bits=bits)
        aware[task] = float(evaluate_codes(*codes, bits=bits, ties="tie_aware").map)
    return Row(name, {task: float(r.map) for task, r in results.items()}, aware), results


def examine(
    model: Retriever,
    dataset: PairedDataset,
    attacks: Sequence[str],
    *,
    count: int | None = None,
    share: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Attacked:
    """Attack queries by each named attack, and score them beside the clean ones.

    Parameters
    ----------
    model
        A trained hashing method.
    dataset
        Its queries are attacked, and rank its clean database.
    attacks
        Names, as of `named_attack`.
    count
        The first so many queries, which are attacked against one another's clean codes. None: all.
    share, options, seed
        As of `named_attack`.
    quiet
        Show no progress.

    Raises
    ------
    InputError
        Before anything is attacked, for unknown attacks, a count below 1 and a model that makes no codes.
    """
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    named = {name: named_attack(name, model, dataset, share=share, options=options, seed=seed) for name in attacks}
    query = dataset.query if count is None else dataset.query.select(torch.arange(min(count, len(dataset.query))))
    base = _codes(model, dataset.database)
    row, ranked = score(model, query, dataset.database, "clean", base)
    out = Attacked([row], {"clean": ranked}, {}, {"clean": query})
    for name, attack in named.items():
        moved, result = perturb(attack, query, "" if quiet else f"{name} on {len(query)} queries")
        row, ranked = score(model, moved, dataset.database, name, base)
        row = replace(row, distortion=result.distortion)
        if result.targets is not None:
            after, before = (_of_targets(model, q, result.targets, dataset.database, base) for q in (moved, query))
            row = replace(row, targeted=after, targeted_before=before)
        out.rows.append(row)
        out.ranked[name] = ranked
        if result.losses:
            out.losses[name] = {m: loss.numpy() for m, loss in result.losses.items()}
        out.queries[name] = moved
    return out


def _of_targets(
    model: Retriever, query: Pairs, targets: Tensor, database: Pairs, base: Mapping[str, Tensor]
) -> dict[str, float]:
    """mAP by task where targets stand for the labels, over the queries that have one."""
    led = targets != query.labels if targets.ndim == 1 else targets.any(dim=1)
    aimed = query._unchecked({**query._parts(), "labels": targets}).select(led.nonzero()[:, 0])
    return score(model, aimed, database, "", base)[0].map


def verdict(attacked: Attacked) -> list[str]:
    """What the rows say, attack by attack; a set-up that does not bite is named."""
    clean = attacked.rows[0]
    lines = []
    if not clean.cross:
        return ["the clean queries find nothing across the modalities: there is nothing that an attack could take"]
    for row in attacked.rows[1:]:
        lost = {task: 1 - row.map[task] / max(clean.map[task], 1e-12) for task in CROSS}
        i2t, t2i = (f"({clean.map[task]:.3f} to {row.map[task]:.3f})" for task in CROSS)
        shares = {task: f"{round(lost[task], 2) + 0.0:.0%}" for task in CROSS}  # -0.0 + 0.0 is 0.0
        line = f"{row.name} takes {shares['i2t']} of I2T's mAP {i2t} and {shares['t2i']} of T2I's {t2i}"
        if row.targeted:
            led = (f"{t.upper()} {row.targeted_before[t]:.3f} to {row.targeted[t]:.3f}" for t in CROSS)
            line += f"; t-mAP, of the labels that queries were led to: {', '.join(led)}"
        elif weak := [task.upper() for task in CROSS if lost[task] < WEAK]:
            line += (
                f": little of {' and '.join(weak)}. A model trained against it may hold; an undefended one should "
                "fall: look at eps, steps, and whether the codes have a gradient"
            )
        if still := [f"no {m}" for m in MODALITIES if not row.distortion[m]]:
            line += f"; {' and '.join(still)} has moved (D is 0)"
        lines.append(line)
    return lines


def print_report(attacked: Attacked, title: str) -> None:
    """The table of clean and attacked mAP, and of D."""
    show(title, table_of_numbers(HEAD, ([row.name, *_cells(row)] for row in attacked.rows)))
    print("mAP over the whole ranking (convention `all`); D: root mean square of the perturbation, share of the range")
    for line in verdict(attacked):
        print(line)


def write_report(attacked: Attacked, out: Path, title: str) -> None:
    """README.md, index.html, results.csv, results.json, and the figures: mAP, PR, Prec@R, loss, photos, texts.

    Parameters
    ----------
    attacked
        Of `examine`.
    out
        The folder, made where it is missing.
    title
        Of page and figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [row.name for row in attacked.rows]
    bars = {row.name: {task.upper(): row.map[task] for task in TASKS} for row in attacked.rows}
    figures.plot_bars(out / "map.png", title, bars, "mAP")
    pages = [("map.png", "mAP clean and attacked: what is lost across the modalities, and what is kept within them")]
    for file, xlabel, ylabel, curve, log_x, caption in (
        ("precision-recall.png", "recall", "precision", _by_rank, False, "Precision and recall, clean and attacked"),
        ("precision-at.png", "retrieved", "precision", _precision_at, True, "Prec@R, clean and attacked"),
    ):
        lines = {n: {task: curve(attacked.ranked[n][task]) for task in CROSS} for n in names}
        figures.plot_directions(out / file, title, lines, xlabel, ylabel, looks=names, log_x=log_x)
        pages.append((file, caption))
    if attacked.losses:
        steps = max(len(loss) for losses in attacked.losses.values() for loss in losses.values())
        panels: dict[str, Any] = {
            m: {n: _padded(losses[m], steps) for n, losses in attacked.losses.items()} for m in MODALITIES
        }
        figures.plot_losses(out / "loss.png", f"{title}: J against the step", list(range(1, steps + 1)), panels, "step")
        pages.append(("loss.png", "J of each modality against the step, mean over the queries"))
    if (last := names[-1]) != "clean":
        clean, moved = attacked.queries["clean"], attacked.queries[last]
        if clean.image.ndim == 4:
            figures.plot_photos(out / "photos.png", title, clean.image / 255, moved.image / 255)
            pages.append(("photos.png", f"Queries clean, after {last}, and the perturbation times ten"))
        assert isinstance(clean.text, Tensor) and isinstance(moved.text, Tensor)
        _plot_texts(out / "texts.png", title, clean.text[0], moved.text[0])
        pages.append(("texts.png", f"The first query's text vector, clean and after {last}"))
    rows = [[row.name, *_cells(row)] for row in attacked.rows]
    note = (
        "mAP over the whole ranking (convention `all`, ties by index; tie-aware values are in results.json). Perturbed "
        "queries rank the clean database. D: the mean over queries of the perturbation's root mean square, as a share "
        "of the inputs' range."
    )
    write_page(out, title, HEAD, rows, note, pages, words=verdict(attacked))
    with write_aside(out / "results.json") as aside:
        aside.write_text(json.dumps([asdict(row) for row in attacked.rows], indent=2) + "\n")


@dataclass(frozen=True)
class Defence:
    """A model after a fine-tuning, by its name: clean queries, attacked anew, and the base's stored ones.

    run: the folder that the fine-tuning wrote; None of the base model.
    """

    name: str
    run: Path | None
    natural: Row
    adaptive: Row
    stored: Row


DEFENCE_HEAD = (
    "fine-tuned", "natural I2T", "T2I", "attacked anew I2T", "T2I", "stored queries I2T", "T2I",
)  # fmt: skip
BASE, CONTROL, CGAT = "no", "0 samples, as long", "CgAT"


def defend(
    model: Retriever, dataset: PairedDataset, run: RunConfig, counts: Sequence[int] = (), *, attack: str = "cmla",
    share: float | None = None, epochs: int = 5, rounds: int = 1, control: bool = True, cgat: bool = False,
) -> list[Defence]:  # fmt: skip
    """The trade-off of adversarial training: `model` itself, then fine-tuned on no samples and on each of `counts`.

    Each hardened model is attacked anew (the numbers that count) and, beside it, given the queries that were made
    against `model`, which is what the authors' code scores.

    Parameters
    ----------
    model
        A trained hashing method; it is not changed.
    dataset
        It is fine-tuned on the training split, all queries are attacked.
    run
        Settings of the fine-tuning; its runs go to `run.out`-adversarialN and -cgat.
    counts
        Adversarial samples of each row.
    attack, share, epochs, rounds
        As of `harden`; the attack is also the one that is scored.
    control
        A row of as many epochs without a sample, so that a longer training is not taken for a defence.
    cgat
        A last row, fine-tuned by CgAT as the model's config says.

    Returns
    -------
    list of Defence
        The base model first.

    Raises
    ------
    InputError
        As of `harden`.
    """
    check_defences(dataset, run, counts, control=control, cgat=cgat)

    def attacked(victim: Retriever) -> Attacked:
        return examine(victim, dataset, [attack], share=share, seed=run.seed, quiet=run.quiet)

    base = attacked(model)
    out = [Defence(BASE, None, base.rows[0], base.rows[1], base.rows[1])]

    def measure(name: str, done: Run) -> None:
        hardened = done.model
        assert isinstance(hardened, Retriever)
        again = attacked(hardened)
        stored, _ = score(hardened, base.queries[attack], dataset.database, attack)
        out.append(Defence(name, done.path, again.rows[0], again.rows[1], stored))

    for count in [0, *counts] if control else counts:
        settings = replace(run, out=run.out.with_name(f"{run.out.name}-adversarial{count}"))
        _say(settings, f"fine-tuning with {count} adversarial samples")
        done = harden(model, dataset, settings, count, epochs=epochs, rounds=rounds, attack=attack, share=share)
        measure(f"{count} samples" if count else CONTROL, done)
    if cgat:
        settings = replace(run, out=run.out.with_name(f"{run.out.name}-cgat"))
        _say(settings, "fine-tuning by CgAT")
        done = harden_on_the_fly(model, dataset, settings, epochs=epochs)
        measure(CGAT, done)
    return out


def _say(run: RunConfig, what: str) -> None:
    if not run.quiet:
        print(f"{run.out}: {what}", file=sys.stderr, flush=True)


def check_defences(
    dataset: PairedDataset, run: RunConfig, counts: Sequence[int], *, control: bool = True, cgat: bool = False
) -> None:
    """InputError for what `defend` refuses, some of it only after hours: counts, data without a range, used folders."""
    if any(not 1 <= count <= len(dataset.train) for count in counts) or len(set(counts)) < len(counts):
        raise InputError(
            f"expected different numbers of samples from 1 to {len(dataset.train)}, the training pairs; got "
            f"{', '.join(map(str, counts))}"
        )
    for modality in MODALITIES:
        bounds_of(dataset, modality)
    for ending in [*(f"adversarial{n}" for n in ([0, *counts] if control else counts)), *(["cgat"] if cgat else [])]:
        if not run.resume:
            refuse_used(run.out.with_name(f"{run.out.name}-{ending}"))


def print_defences(rows: Sequence[Defence], title: str) -> None:
    """The table of defences: natural, attacked anew, and by the stored queries."""
    show(title, table_of_numbers(DEFENCE_HEAD, map(defence_cells, rows)))
    for line in _defence_words(rows):
        print(line)


def write_defences(rows: Sequence[Defence], out: Path, title: str) -> None:
    """README.md, index.html, results.csv, results.json and the figure of that table, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    bars = {
        row.name: {
            f"{task.upper()} {side}": row_of.map[task]
            for task in CROSS
            for side, row_of in (("natural", row.natural), ("attacked anew", row.adaptive), ("stored", row.stored))
        }
        for row in rows
    }
    figures.plot_bars(out / "map.png", title, bars, "mAP")
    note = "mAP over the whole ranking (convention `all`, ties by index; tie-aware values are in results.json)."
    pages = [("map.png", "mAP of clean queries, of those made for each model, and of those made for the base model")]
    write_page(out, title, DEFENCE_HEAD, list(map(defence_cells, rows)), note, pages, words=_defence_words(rows))
    with write_aside(out / "results.json") as aside:
        aside.write_text(json.dumps([asdict(row) for row in rows], indent=2, default=str) + "\n")


def _defence_words(rows: Sequence[Defence]) -> list[str]:
    lines = ["attacked anew: each model's own attack; stored queries: made against the model that is not fine-tuned"]
    if any(row.name == CONTROL for row in rows):
        lines.append(f"{CONTROL}: as many epochs on clean pairs alone; what it wins is no defence")
    return lines


def defence_cells(row: Defence) -> list[str]:
    """One row of that table."""
    numbers = [side.map[task] for side in (row.natural, row.adaptive, row.stored) for task in CROSS]
    return [row.name, *(f"{n:.3f}" for n in numbers)]


def _cells(row: Row) -> list[str]:
    return [f"{row.map[task]:.4f}" for task in TASKS] + [f"{row.distortion[m]:.4f}" for m in MODALITIES]


def _codes(model: Retriever, pairs: Pairs) -> dict[str, Tensor]:
    """Packed codes by modality."""
    return {m: pack_codes(encode_all(model, m, getattr(pairs, m)) >= 0) for m in MODALITIES}


def _by_rank(result: "RetrievalResult") -> figures.Curve:
    curve = result.precision_recall_by_rank()
    rows = np.unique(np.geomspace(1, len(curve.at), 200).astype(int)) - 1
    return curve.recall[rows], curve.precision[rows]


def _precision_at(result: "RetrievalResult") -> figures.Curve:
    ks = np.unique(np.geomspace(1, result.num_database, 100).astype(int))
    return ks, result.precision_at(ks)


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), np.nan)])


def _plot_texts(path: Path, title: str, clean: Tensor, moved: Tensor) -> None:
    with figures._panels(path, title, 2, 1, (7.0, 4.0)) as (_, axes):
        for axis, values, name in zip(axes, (clean, moved), ("clean", "attacked"), strict=True):
            axis.vlines(np.arange(len(values)), 0, values.numpy(), linewidth=0.6)
            axis.set_ylabel(name)
        axes[-1].set_xlabel("feature")
