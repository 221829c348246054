"""Feature Scattering's rebuttal redone at a chosen size: its checks for masked gradients, its sweeps, its figure.

Zhang and Wang 2019, author response: §1 black box by transfer from two surrogates, §2 white-box attacks with restarts,
§3 the loss against the step over 20 random starts, §4 the local search of Narodytska and Kasiviswanathan; then batch
size and label smoothing (reviewer 3), random targets (reviewer 2). Beside them the two other perturbations that the
code can make: a plan held fixed (envelope), and identity matching (section 5.2 of the paper).

The response numbers neither tables nor figures; here they are counted in its order. Runs are in OUT/runs, finished
attacks in OUT/attacks; what is there already is not made again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data import ImageDataset, load_images
from cmr_fast.errors import InputError
from cmr_fast.methods._runfolder import RESULTS
from cmr_fast.methods.loop import load_model, train
from cmr_fast.methods.method import Method, RunConfig
from cmr_fast.methods.scatter import Scatter, ScatterConfig
from cmr_fast.reports import figures
from cmr_fast.reports.outcomes import Outcome, worst_case
from cmr_fast.reports.reproduce.common import Item, Section, Study, chosen, data_of, make
from cmr_fast.reports.robustness import Settings, attack_all, pixels_of

PLAIN, MADRY, RANDOM, OURS = "plain", "Madry", "random targets", "Feature Scattering"
ENVELOPE, IDENTITY = "Feature Scattering, envelope", "Feature Scattering, identity"
ROWS: Mapping[str, ScatterConfig] = {
    PLAIN: Scatter.presets["plain"],
    MADRY: Scatter.presets["madry"],
    RANDOM: Scatter.presets["random-targeted"],
    OURS: ScatterConfig(),
    ENVELOPE: ScatterConfig(ot_grad="envelope"),
    IDENTITY: Scatter.presets["identity"],
}
PAPER_BLACK_BOX = {
    "undefended": {"pgd20": 89.0, "pgd100": 88.7, "cw20": 88.9, "cw100": 88.8},
    "siamese": {"pgd20": 81.6, "pgd100": 81.0, "cw20": 80.3, "cw100": 79.8},
}
PAPER_WHITE_BOX = {MADRY: "44.8 / 45.4", RANDOM: "49.9 / 48.5", OURS: "68.4 / not said"}  # PGD-100 / CW-100
PAPER_LOCAL_SEARCH = 89.9
PAPER_BATCH_SIZE = {40: 58.7, 50: 62.7, 60: 68.4, 70: 68.2, 80: 68.4}
TENTHS = tuple(n / 10 for n in range(9))
PAPER_SMOOTHING = {
    OURS: dict(zip(TENTHS, (35.3, 56.2, 59.2, 61.8, 58.9, 68.4, 70.1, 71.2, 69.7), strict=True)),
    MADRY: dict(zip(TENTHS, (44.8, 46.4, 46.7, 46.1, 46.2, 46.1, 45.6, 46.8, 47.4), strict=True)),
}


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes
    ----------
    changes
        Of every row's config: network, epochs, schedule.
    train, images, few
        Training images (None: all), test images attacked, and those of them for the local search.
    white, transfers
        Attacks of the white-box table, and those crafted on each surrogate.
    steps
        Of the sweeps' PGD, and of the loss plot's.
    starts
        Random starts in the loss plot.
    batch_sizes, smoothings
        Of the sweeps; each has the paper's own, 60 and 0.5, among it.
    precision
        Of the trainings.
    """

    changes: Mapping[str, Any]
    train: int | None
    images: int
    few: int
    white: Sequence[str]
    transfers: Sequence[str]
    steps: int
    starts: int
    batch_sizes: Sequence[int]
    smoothings: Sequence[float]
    precision: Literal["32-true", "64-true", "bf16-mixed", "bf16-true"] = "32-true"


PLOTTED = 100
"""Images in the loss plot: its band is of means, which so many show, and 20 starts of all of them take long."""
_SMALL_NET = {"depth": 10, "width": 1, "schedule": "cosine"}
SCALES = {
    "tiny": Scale(
        {**_SMALL_NET, "epochs": 2}, train=600, images=50, few=10,
        white=("clean", "fgsm-random", "pgd20", "cw20", "pgd20x5", "cw20x5"), transfers=("pgd20", "cw20"), steps=20,
        starts=20, batch_sizes=(40, 60), smoothings=(0.0, 0.5),
    ),
    "small": Scale(
        {**_SMALL_NET, "epochs": 12}, train=10000, images=500, few=50,
        white=("clean", "fgsm-random", "pgd20", "cw20", "pgd100x5", "cw100x5", "apgd-t"),
        transfers=("pgd20", "pgd100", "cw20", "cw100"), steps=100, starts=20, batch_sizes=(40, 60, 80),
        smoothings=(0.0, 0.5, 0.8), precision="bf16-mixed",
    ),
    "paper": Scale(
        {}, train=None, images=10000, few=1000,
        white=("clean", "fgsm-random", "pgd20", "cw20", "pgd100x5", "cw100x5", "pgd1000x5", "apgd-t"),
        transfers=("pgd20", "pgd100", "cw20", "cw100"), steps=100, starts=20, batch_sizes=tuple(PAPER_BATCH_SIZE),
        smoothings=TENTHS,
    ),
}  # fmt: skip
"""tiny: says that it runs and nothing else. small: for a CPU. paper: the paper's own, for GPUs."""


@dataclass(frozen=True)
class Job:
    """One training: a row of ROWS, what a sweep changes of it, and the seed."""

    row: str
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of the run's folder."""
        changed = "".join(f"-{name.replace('_', '')}{value:g}" for name, value in self.changes)
        return f"{self.row.lower().replace(',', '').replace(' ', '-')}{changed}-seed{self.seed}"

    def config(self, size: Scale) -> ScatterConfig:
        """The row's config at this size."""
        return replace(ROWS[self.row], **{**size.changes, **dict(self.changes)})


class Robustness(Study):
    """The runs and attacks of one folder."""

    def __init__(self, data: str, out: Path, seeds: int, quiet: bool, size: Scale, jobs: int) -> None:
        super().__init__("scatter", data, out, seeds, quiet, jobs)
        images = load_images(data)
        as_authors = {"augment": False} if images.name == "svhn" else {}
        self.size = replace(size, changes={**size.changes, **as_authors})
        self.images = replace(images, valid=None, test=images.test.sample(size.images))
        if size.train is not None:
            self.images = replace(self.images, train=images.train.sample(size.train))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.x, self.y = (part.to(self.device) for part in pixels_of(self.images.test, size.images))
        self.settings = Settings(images=size.images, few=size.few)

    def described(self) -> dict[str, Any]:
        """What a folder of this study is for; another's is refused."""
        data = data_of(self.images) | {"num_classes": self.images.num_classes}
        return {"paper": self.paper, "data": data, "scale": repr(self.size)}

    def victims(self, row: str, **changes: Any) -> list[Job]:
        """A row once a seed."""
        base = ROWS[row]
        changed = tuple((n, v) for n, v in changes.items() if v != self.size.changes.get(n, getattr(base, n)))
        return [Job(row, seed, changed) for seed in range(self.seeds)]

    def surrogate(self, row: str) -> Job:
        """A row with a seed that no victim has."""
        return Job(row, self.seeds)

    def make(self, jobs: Sequence[Job]) -> None:
        """Train what is not there yet, `self.jobs` at a time."""
        missing = [job for job in dict.fromkeys(jobs) if not (self.out / "runs" / job.name / RESULTS).exists()]
        if self.jobs > 1 and len(missing) > 1:
            calls = [(job, self.images, self.size, self.out, True, 1) for job in missing]
            self.pool.run(_train, calls, self.quiet)
            if self.device == "cuda":
                self.pool.close()  # the attacks, in this process, need the memory that idle ones would keep
        else:
            for job in missing:
                _train(job, self.images, self.size, self.out, self.quiet)

    def model(self, job: Job) -> Method:
        """The trained model of a job."""
        folder = self.out / "runs" / job.name
        self.make([job])
        model = load_model(folder)
        if model.config != job.config(self.size):
            raise InputError(f"{folder}: a run of other settings, expected those of this study; name another folder")
        return model.to(self.device)

    def attacked(
        self, job: Job, names: Sequence[str], surrogate: Job | None = None, images: int | None = None
    ) -> dict[str, Outcome]:
        """What attacks leave of a job's model, on the first `images`; those that are there are not run again."""
        other = None if surrogate is None else self.model(surrogate)
        return attack_all(
            self.model(job), self.x[:images], self.y[:images], names, self.settings, surrogate=other,
            keep=self.kept(job, surrogate), title=f"attacking {job.name}", quiet=self.quiet,
        )  # fmt: skip

    def kept(self, job: Job, surrogate: Job | None = None) -> Path:
        """The folder of a job's finished attacks, of those crafted on a surrogate one within."""
        folder = self.out / "attacks" / job.name
        return folder if surrogate is None else folder / surrogate.name

    def attack(
        self, jobs: Sequence[Job], names: Sequence[str], surrogates: Sequence[Job | None] = (None,),
        images: int | None = None,
    ) -> None:  # fmt: skip
        """Train the jobs, and run the attacks that are not there yet, `self.jobs` models at a time on a processor."""
        self.make([*jobs, *(surrogate for surrogate in surrogates if surrogate is not None)])
        wanted = dict.fromkeys((job, surrogate, name) for job in jobs for surrogate in surrogates for name in names)
        missing = [one for one in wanted if not (self.kept(*one[:2]) / f"{one[2]}.json").exists()]
        if self.jobs > 1 and len(missing) > 1 and self.device == "cpu":
            models: dict[Job | None, Method] = {job: self.model(job) for one in missing for job in one[:2] if job}
            x, y = self.x[:images], self.y[:images]
            calls = [
                (models[job], x, y, name, self.settings, self.kept(job, other), models.get(other))
                for job, other, name in missing
            ]
            self.pool.run(_attack, calls, self.quiet, "attacking")


def _train(job: Job, images: ImageDataset, size: Scale, out: Path, quiet: bool, threads: int = 0) -> None:
    run = RunConfig(
        out=out / "runs" / job.name, seed=job.seed, resume=True, quiet=quiet, precision=size.precision,
        threads=threads, **Scatter.protocol,
    )  # fmt: skip
    train(Scatter, job.config(size), images, run)


def _attack(
    model: Method, x: Tensor, y: Tensor, name: str, settings: Settings, keep: Path, surrogate: Method | None
) -> None:
    attack_all(model, x, y, [name], settings, surrogate=surrogate, keep=keep, quiet=True)


def percent(values: Sequence[float]) -> str:
    """Shares as percent, the mean; over seeds with the standard deviation."""
    shown = f"{100 * np.mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * np.std(values, ddof=1):.1f}"


def _lowest(outcomes: Sequence[Outcome]) -> str:
    """Of an attack with restarts the lowest run and max - min, else the accuracy; over seeds the mean."""
    if len(outcomes[0].runs) < 2:
        return percent([o.accuracy for o in outcomes])
    return f"{percent([o.lowest for o in outcomes])} ({100 * np.mean([o.spread for o in outcomes]):.1f})"


def white_box(study: Robustness) -> list[Section]:
    """§2, and the tables' other rows."""
    rows, names = [], study.size.white
    study.attack([job for row in ROWS for job in study.victims(row)], names)
    for row in ROWS:
        found = [study.attacked(job, names) for job in study.victims(row)]
        worst = percent([float(worst_case(outcomes).double().mean()) for outcomes in found])
        cells = [_lowest([outcomes[name] for outcomes in found]) for name in names]
        rows.append([row, *cells, worst, PAPER_WHITE_BOX.get(row, "")])
    head = ["accuracy under", *names, "every attack together", "paper: PGD-100 / CW-100"]
    note = (
        "NAMExR is R runs with random starts, each judged at its last step: the lowest run and, in brackets, max - "
        "min, as the rebuttal has them. Every attack together: images that survive all runs of all attacks. The "
        "header of the rebuttal's own table is lost: three of its numbers are legible (59.0, 66.4, 66.8, max - min "
        "0.3), and as its PGD-100 is 68.4 in two other tables, they are rather of attacks with more steps; 68.4 is "
        "from those two. Which attacks Madry's 44.8 / 45.4 are of is not said, 44.8 being PGD-100 elsewhere. Envelope "
        "holds the transport plan fixed, identity matches each image with its own clean one; neither has a number in "
        "the rebuttal."
    )
    return [Section("White-box attacks with restarts (rebuttal §2)", head, rows, [note])]


def black_box(study: Robustness) -> list[Section]:
    """§1: crafted on an undefended network, and on one trained as the victim with another seed."""
    transfers, rows = study.size.transfers, []
    surrogates = [study.surrogate(PLAIN), study.surrogate(OURS)]
    study.attack(study.victims(OURS), [f"transfer-{attack}" for attack in transfers], surrogates)
    for name, row in (("undefended", PLAIN), ("siamese", OURS)):
        names = [f"transfer-{attack}" for attack in transfers]
        found = [study.attacked(job, names, study.surrogate(row)) for job in study.victims(OURS)]
        cells = [percent([outcomes[n].accuracy for outcomes in found]) for n in names]
        rows.append([name, *cells])
        rows.append([f"{name}, paper", *(_known(PAPER_BLACK_BOX[name], attack) for attack in transfers)])
    note = "Accuracy of Feature Scattering's network; the surrogates have seeds that no victim has."
    return [Section("Black-box attacks from two surrogates (rebuttal §1)", ["surrogate", *transfers], rows, [note])]


def loss_plot(study: Robustness) -> list[Section]:
    """§3: the loss of PGD from 20 random starts."""
    steps, starts, rows = study.size.steps, study.size.starts, []
    name = f"pgd{steps}x{starts}"
    study.attack([job for row in (PLAIN, MADRY, OURS) for job in study.victims(row)[:1]], [name], images=PLOTTED)
    bands: dict[str, np.ndarray] = {}
    wrong = []
    for row in (PLAIN, MADRY, OURS):
        curves = np.asarray(study.attacked(study.victims(row)[0], [name], images=PLOTTED)[name].curves)
        if not curves.size:  # every image was wrong before the attack
            wrong.append(row)
            continue
        bands[row] = curves
        last, late = curves[:, -1], (curves[:, -1] - curves[:, steps * 4 // 5]).mean()
        rise = (last - curves[:, 0]).mean()
        share = f"{late / rise:.1%}" if rise > 0 else "it does not rise"
        rows.append([row, f"{last.mean():.3f}", f"{last.std(ddof=1):.4f}", share])
    caption = f"Loss against step of PGD over {starts} random starts (rebuttal §3)"
    figures.plot_bands(study.out / "loss-starts.png", caption, bands, "step", "cross entropy")
    head = [
        "network",
        f"loss before step {steps}, mean",
        "deviation over starts",
        "share of the rise in the last fifth",
    ]
    note = (
        f"The mean cross entropy over those of {min(PLOTTED, len(study.x))} images that are right without an attack, "
        f"from {starts} random starts, seed 0 of each training; the band is from the lowest start to the highest. The "
        "rebuttal says that it rises consistently and plateaus quickly, with relatively small variance, and prints no "
        "number."
    )
    if wrong:
        note += f" Every one of these images is wrong before the attack, so there is no loss, for: {', '.join(wrong)}."
    return [Section(caption, head, rows, [note], [("loss-starts.png", caption)])]


def local_search(study: Robustness) -> list[Section]:
    """§4: without gradients."""
    names, rows = ("clean", "local-search-pixels", "local-search"), []
    study.attack([job for row in (PLAIN, MADRY, OURS) for job in study.victims(row)], names)
    for row in (PLAIN, MADRY, OURS):
        found = [study.attacked(job, names) for job in study.victims(row)]
        few = [[o[name].right[: study.size.few].double().mean().item() for o in found] for name in names]
        rows.append([row, *map(percent, few), f"{PAPER_LOCAL_SEARCH}" if row == OURS else ""])
    head = ["accuracy under", "clean", "its paper's (few pixels)", "in the ball", "paper"]
    note = (
        f"{min(study.size.few, len(study.x))} images. The footnote's attack changes few pixels by any amount, 150 "
        "rounds of 5 pixels; the other stays in the ball, 30 rounds. The rebuttal does not say which it ran, nor how."
    )
    return [Section("A gradient-free attack, greedy local search (rebuttal §4)", head, rows, [note])]


def batch_size(study: Robustness) -> list[Section]:
    """Batch size, reviewer 3."""
    sizes, name = study.size.batch_sizes, f"pgd{study.size.steps}"
    study.attack([job for size in sizes for job in study.victims(OURS, batch_size=size)], [name])
    found = {n: [study.attacked(j, [name])[name].accuracy for j in study.victims(OURS, batch_size=n)] for n in sizes}
    caption = f"Batch size: accuracy of Feature Scattering under PGD-{study.size.steps} (rebuttal, reviewer 3)"
    lines = {"ours": {n: float(np.mean(found[n])) for n in sizes}}
    _plot(study.out / "batch-size.png", caption, lines | {"paper, PGD-100": _shares(PAPER_BATCH_SIZE)}, "batch size")
    rows = [["ours", *(percent(found[n]) for n in sizes)]]
    rows.append(["paper, PGD-100", *(_known(PAPER_BATCH_SIZE, n) for n in sizes)])
    note = "The learning rate is the same at every batch size; the rebuttal names none."
    return [Section(caption, ["batch size", *map(str, sizes)], rows, [note], [("batch-size.png", caption)])]


def smoothing(study: Robustness) -> list[Section]:
    """Label smoothing of both trainings, reviewer 3."""
    values, name, rows = study.size.smoothings, f"pgd{study.size.steps}", []
    study.attack([job for row in (OURS, MADRY) for s in values for job in study.victims(row, smoothing=s)], [name])
    lines: dict[str, Mapping[float, float]] = {}
    for row in (OURS, MADRY):
        found = {s: [study.attacked(j, [name])[name].accuracy for j in study.victims(row, smoothing=s)] for s in values}
        lines |= {
            row: {s: float(np.mean(found[s])) for s in values},
            f"{row}, paper, PGD-100": _shares(PAPER_SMOOTHING[row]),
        }
        rows.append([row, *(percent(found[s]) for s in values)])
        rows.append([f"{row}, paper, PGD-100", *(_known(PAPER_SMOOTHING[row], s) for s in values)])
    caption = f"Label smoothing: accuracy under PGD-{study.size.steps} (rebuttal, reviewer 3)"
    _plot(study.out / "smoothing.png", caption, lines, "label smoothing")
    note = "At smoothing 0.9 with ten classes the true class is no likelier than the others. The paper's choice is 0.5."
    return [Section(caption, ["smoothing", *(f"{s:g}" for s in values)], rows, [note], [("smoothing.png", caption)])]


def _known(percents: Mapping[Any, float], key: Any) -> str:
    """The paper's number, or nothing where it has none."""
    return f"{percents[key]:.1f}" if key in percents else ""


def _shares(percents: Mapping[Any, float]) -> dict[Any, float]:
    return {x: y / 100 for x, y in percents.items()}


def _plot(path: Path, title: str, lines: Mapping[str, Mapping[Any, float]], xlabel: str) -> None:
    curves = {name: (np.array(list(line)), np.array(list(line.values()))) for name, line in lines.items()}
    figures.plot_lines(path, title, curves, xlabel, "accuracy", looks=list(curves))


ITEMS = (
    Item("Table 1", "Black box (§1)", black_box),
    Item("Table 2", "White box with restarts (§2)", white_box),
    Item("Table 3", "Without gradients (§4)", local_search),
    Item("Table 4", "Batch size (reviewer 3)", batch_size),
    Item("Table 5", "Label smoothing (reviewer 3)", smoothing),
    Item("Figure 1", "Loss against step (§3)", loss_plot),
)


def reproduce(
    data: str, out: Path, tables: Sequence[int], figures: Sequence[int], seeds: int, quiet: bool, *,
    scale: str | Scale = "tiny", jobs: int = 1,
) -> None:  # fmt: skip
    """Make the rebuttal's tables and its figure.

    Parameters
    ----------
    data, out, tables, figures, seeds, quiet
        As of `cmr_fast.reports.reproduce.reproduce`. Numbers are means over the seeds of the victims.
    scale
        Of SCALES, or one of your own.
    jobs
        Trainings at a time, a process each.

    Raises
    ------
    InputError
        For unknown scales, tables and figures, and a folder that holds a study of other data or another scale.
    """
    if isinstance(scale, str) and scale not in SCALES:
        raise InputError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    size = SCALES[scale] if isinstance(scale, str) else scale
    items = chosen(ITEMS, tables, figures)
    study = Robustness(data, out, seeds, quiet, size, jobs)
    make(
        study,
        f"Feature Scattering on {study.images.name}: the rebuttal's tables and figure",
        items,
        ITEMS,
        _protocol(study),
    )


def _protocol(study: Robustness) -> str:
    images, config = study.images, Job(OURS, 0).config(study.size)
    return (
        f"WRN-{config.depth}-{config.width}, {config.epochs} epochs of {len(images.train)} images, batch "
        f"{config.batch_size}, schedule {config.schedule}; nothing is held out and the last weights are kept, as the "
        f"authors do; {len(images.test)} test images, L-inf ball of {config.eps * 255:.3g}/255. "
        "The paper: WRN-28-10, 200 epochs of 50,000 images, all 10,000 test images of CIFAR-10."
    )
