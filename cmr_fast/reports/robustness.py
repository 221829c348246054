"""What attacks leave of a classifier, and whether its robustness is real: the table, the checks, the plots, a verdict.

The rebuttal of Feature Scattering (Zhang and Wang 2019) answers a charge of gradient masking with four checks: black
box by transfer, PGD-100 and CW-100 with restarts, the loss against the step, an attack without gradients. All four are
here, with what came later: APGD on the DLR loss and AutoAttack's own warnings (Croce and Hein 2020). Its model keeps
60.6 % under PGD-20 and 36.6 % under AutoAttack, so no verdict rests on PGD alone.
"""

import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast import __version__
from cmr_fast._files import write_aside
from cmr_fast._terminal import counting, new_table, show
from cmr_fast.attacks import checks
from cmr_fast.attacks.adapters import FAB, Square
from cmr_fast.attacks.apgd import APGD, APGDT
from cmr_fast.attacks.base import Model, Victim
from cmr_fast.attacks.pgd import CW, FGSM, MIFGSM, PGD
from cmr_fast.attacks.search import LocalSearch
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.data.images import Images
from cmr_fast.errors import InputError
from cmr_fast.reports import figures
from cmr_fast.reports.page import write_page

STANDARD = (
    *("clean", "fgsm", "pgd20", "pgd100x5", "cw20", "cw100x5", "apgd-ce", "apgd-dlr", "apgd-t"),
    *("transfer-pgd20", "transfer-pgd100", "transfer-cw20", "transfer-cw100", "local-search"),
)
FEW = ("local-search", "square", "fab")
NAMES = (
    "clean, fgsm, pgdN, cwN, mifgsmN, targetedN (random targets), apgd-ce, apgd-dlr, apgd-t, local-search, square and "
    "fab (torchattacks'), transfer-pgdN and transfer-cwN (with a surrogate); N steps, xR after a name for R restarts"
)
MISLED = 0.05  # PGD overstates where the strongest attack leaves this much less
BROKEN = 0.05  # accuracy that counts as none


@dataclass(frozen=True)
class Settings:
    """How a classifier is attacked."""

    eps: float = 8 / 255
    """Radius of the L-inf ball, of pixels from 0 to 1."""
    images: int = 500
    """Test images, each class its share."""
    few: int = 100
    """Of these, how many for the attacks that take thousands of queries an image, and for the checks."""
    batch: int = 250
    """Images a batch."""
    seed: int = 0
    """Of the random starts; restart r takes seed + r."""
    fast: bool = False
    """Gradients in bfloat16; whether an image is fooled is decided in float32 all the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise InputError(f"eps must be from 0 to 1, pixels being from 0 to 1, got {self.eps}")
        for name in ("images", "few", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Outcome:
    """One attack: who is still right after all its restarts, and what each restart left.

    right     bool (N,), after all restarts
    runs      accuracy after each restart alone
    losses    mean loss before each step of the first restart; empty where there are no steps
    """

    name: str
    right: Tensor
    runs: list[float]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())

    @property
    def spread(self) -> float:
        """Accuracy of the weakest restart less that of the strongest."""
        return max(self.runs) - min(self.runs)


def attack_named(
    name: str, model: Model, settings: Settings, seed: int, surrogate: Model | None = None, early_stop: bool = False
) -> Any:
    """The attack that a name like "pgd20" or "apgd-dlr" stands for, without its restarts; None for "clean".

    early_stop    PGD and CW drop an image from the batch once it is fooled; APGD always does
    """
    eps, step = settings.eps, settings.eps / 4 or 1.0
    dtype = torch.bfloat16 if settings.fast else None
    common: dict[str, Any] = {"eps": eps, "seed": seed, "check": False, "progress": False}
    matched = re.fullmatch(r"(transfer-)?(pgd|cw|mifgsm|targeted)([1-9]\d*)", name)
    if matched:
        transfer, kind, steps = matched[1], matched[2], int(matched[3])
        more: dict[str, Any] = {"alpha": step, "steps": steps, "dtype": dtype}
        make: Callable[..., Any] = PGD
        if kind == "cw":
            make = CW
        elif kind == "mifgsm":
            make = MIFGSM
        elif kind == "targeted":
            more["targeted"] = "random"
        if not transfer:
            return make(model, early_stop=early_stop, **common, **more)
        if surrogate is None:
            raise InputError(f"{name} is crafted on another model: expected a surrogate, got none")
        return Transfer(model, surrogate, make, **common, **more)
    others: dict[str, Callable[[], Any]] = {
        "clean": lambda: None,
        "fgsm": lambda: FGSM(model, dtype=dtype, **common),
        "apgd-ce": lambda: APGD(model, dtype=dtype, **common),
        "apgd-dlr": lambda: APGD(model, loss="dlr", dtype=dtype, **common),
        "apgd-t": lambda: APGDT(model, dtype=dtype, **common),
        "local-search": lambda: LocalSearch(model, rounds=30, **common),
        "square": lambda: Square(model, **common),
        "fab": lambda: FAB(model, **common),
    }
    if name not in others:
        raise InputError(f"unknown attack {name!r}, expected one of {NAMES}")
    return others[name]()


def split_restarts(name: str) -> tuple[str, int]:
    """("pgd100", 5) of "pgd100x5"."""
    matched = re.fullmatch(r"(.+?)x(\d+)", name)
    return (matched[1], int(matched[2])) if matched and int(matched[2]) else (name, 1)


def attack_all(
    model: Model,
    x: Tensor,
    y: Tensor,
    names: Sequence[str] = STANDARD,
    settings: Settings = Settings(),
    *,
    surrogate: Model | None = None,
    keep: Path | None = None,
    title: str = "attacking",
) -> dict[str, Outcome]:
    """Every attack of `names` on pixels x (N, 3, H, W) from 0 to 1 with labels y (N,): {name: Outcome}.

    Images that the model has wrong as they are count as fooled and are not attacked. FEW attacks see the first
    `settings.few` of them only.
    keep    a folder that holds each finished attack, so that a report that was killed goes on; what lies there from
            another model, other images or settings is made anew
    """
    for name in names:  # a misspelt name is refused before hours of work
        atk = attack_named(split_restarts(name)[0], model, settings, 0, surrogate)
        if isinstance(atk, Transfer):
            atk.refuse_a_copy(x)
    clean = torch.cat(
        [_right(model, *part) for part in zip(x.split(settings.batch), y.split(settings.batch), strict=True)]
    )
    marks = [0, 0] if keep is None else [_mark(model, x, y, settings, other) for other in (None, surrogate)]
    found: dict[str, Outcome] = {}
    passes = {name: _passes(name, len(x), settings) for name in names}
    with counting(sum(passes.values()), title) as tell:
        for name in names:
            file, mark = None if keep is None else keep / f"{name}.json", marks[name.startswith("transfer-")]
            stored = None if file is None else _stored(file, mark)
            if stored is None:
                stored = _run(name, model, x, y, clean, settings, surrogate, tell)
                if file is not None:
                    _store(file, mark, stored)
            else:
                tell(passes[name])
            found[name] = stored
    return found


def _count(name: str, there: int, settings: Settings) -> int:
    return min(there, settings.few) if split_restarts(name)[0] in FEW else there


def _passes(name: str, there: int, settings: Settings) -> int:
    """Batches that an attack takes, over all its restarts."""
    return -(-_count(name, there, settings) // settings.batch) * split_restarts(name)[1]


def _run(
    name: str, model: Model, x: Tensor, y: Tensor, clean: Tensor, settings: Settings, surrogate: Model | None,
    tell: Callable[[int], Any],
) -> Outcome:  # fmt: skip
    base, restarts = split_restarts(name)
    count, began = _count(name, len(x), settings), time.perf_counter()
    every = torch.ones(count, dtype=torch.bool)
    runs, curve = [], Tensor()
    for restart in range(restarts):
        # the first run goes to its end, for the curve
        atk = attack_named(base, model, settings, settings.seed + restart, surrogate, early_stop=restart > 0)
        right, weights, sums = clean[:count].clone(), 0, Tensor()
        for rows in torch.arange(count).split(settings.batch):
            rows = rows[clean[rows]]
            if atk is not None and len(rows):
                _, info = atk(x[rows], y[rows], index=rows, return_info=True)
                right[rows] = ~info.success.cpu()
                if info.losses.numel():
                    summed = info.losses.double().sum(dim=1).cpu()
                    sums, weights = (summed if not weights else sums + summed), weights + len(rows)
            tell(1)
        runs.append(float(right.double().mean()))
        every &= right
        if restart == 0 and weights:
            curve = sums / weights
    return Outcome(name, every, runs, curve.tolist(), time.perf_counter() - began)


@torch.no_grad()
def _right(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """bool (B,) on the CPU: who is classified right, in evaluation mode."""
    victim = Victim(model)
    with victim.attacked(x):
        return (victim.scores(x).argmax(dim=1) == y).cpu()


def worst_case(outcomes: Mapping[str, Outcome]) -> Tensor:
    """bool (N,): who survives every attack; those that an attack did not see count by the others."""
    count = max(len(o.right) for o in outcomes.values())
    left = torch.ones(count, dtype=torch.bool)
    for outcome in outcomes.values():
        left[: len(outcome.right)] &= outcome.right
    return left


@dataclass(frozen=True)
class Robustness:
    """All of one model: outcomes by attack, accuracy by eps under PGD-20, the checks, and what to make of it."""

    name: str
    outcomes: dict[str, Outcome]
    sweep: dict[float, float]
    findings: list[checks.Finding]

    @property
    def worst(self) -> float:
        return float(worst_case(self.outcomes).double().mean())

    @property
    def suspicious(self) -> bool:
        """Whether the gradient is masked, or PGD overstates for another reason."""
        return any(finding.suspicious for finding in self.findings) or self._overstated() > MISLED

    def _pgd(self) -> tuple[str, float]:
        """Madry's evaluation, as most papers give it: the first of the PGD rows."""
        found = [(n, o.accuracy) for n, o in self.outcomes.items() if re.fullmatch(r"pgd\d+(x\d+)?", n)]
        return found[0] if found else ("clean", self.outcomes["clean"].accuracy)

    def _overstated(self) -> float:
        return self._pgd()[1] - self.worst if self._pgd()[0] != "clean" else 0.0

    def verdict(self) -> str:
        """A few sentences: is it robust, and can its PGD number be quoted?"""
        (pgd, left), worst = self._pgd(), self.worst
        clean = self.outcomes["clean"].accuracy
        told = [f.name for f in self.findings if f.suspicious]
        own = "" if pgd == "clean" else f"{pgd} leaves {left:.1%}, "
        numbers = f"Clean {clean:.1%}, {own}every attack together {worst:.1%}"
        if worst > BROKEN:
            by = min((o for n, o in self.outcomes.items() if n != "clean"), key=lambda o: o.accuracy)
            numbers += f" (the strongest alone, {by.name}, {by.accuracy:.1%})"
        numbers += "."
        spread = {n: o.spread for n, o in self.outcomes.items() if len(o.runs) > 1}
        if spread:
            numbers += " Restarts differ by " + ", ".join(f"{s:.1%} ({n})" for n, s in spread.items()) + "."
        if told:
            return (
                f"SUSPICIOUS: the model's gradient misleads attacks that follow it ({', '.join(told)}). Do not quote "
                f"its accuracy under PGD. {numbers}"
            )
        if self._overstated() > MISLED:
            return (
                f"SUSPICIOUS: {pgd} overstates by {self._overstated():.1%}. Its loss is a poor guide here, "
                f"quote the worst case. {numbers}"
            )
        if worst <= BROKEN:
            return f"Not robust, and nothing is hidden: no check is suspicious. {numbers}"
        return f"No sign of a masked gradient. The worst case bounds the robust accuracy from above. {numbers}"


def examine(
    name: str,
    model: Model,
    x: Tensor,
    y: Tensor,
    settings: Settings = Settings(),
    *,
    names: Sequence[str] | None = None,
    surrogate: Model | None = None,
    keep: Path | None = None,
) -> Robustness:
    """Attacks, eps sweep and checks of one classifier. names: STANDARD, less the transfers without a surrogate."""
    if names is None:
        names = [n for n in STANDARD if surrogate is not None or not n.startswith("transfer-")]
    check_names(names)
    if "clean" not in names:
        names = ["clean", *names]
    if set(names) == {"clean"}:
        raise InputError("a report needs an attack beside clean: its verdict would rest on nothing")
    outcomes = attack_all(model, x, y, names, settings, surrogate=surrogate, keep=keep, title=f"attacking {name}")
    few = slice(0, settings.few)
    known = None if keep is None else keep / "checks.json"
    mark = 0 if keep is None else _mark(model, x, y, settings, surrogate)
    stored = None if known is None else _read(known, mark)
    if stored is None:
        factors = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
        sweep = {}
        with counting(len(factors) + 1, f"checking {name}") as tell:
            for eps in (settings.eps * factor for factor in factors):
                atk = PGD(model, eps, eps / 4 or 1.0, 20, check=False, progress=False)
                sweep[eps] = checks.accuracy(atk, x[few], y[few])
                tell(1)
            options: dict[str, Any] = {"progress": False}
            findings = checks.masking(model, x[few], y[few], eps=settings.eps, surrogate=surrogate, **options)
            tell(1)
        stored = {"sweep": list(sweep.items()), "findings": [asdict(finding) for finding in findings]}
        if known is not None:
            _write(known, mark, stored)
    found = [checks.Finding(**finding) for finding in stored["findings"]]
    return Robustness(name, outcomes, {float(e): a for e, a in stored["sweep"]}, found)


def print_outcomes(title: str, models: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Accuracy by attack, a column a model; of several restarts the strongest together, and their spread."""
    table = new_table("accuracy under")
    for name in models:
        table.add_column(name, justify="right")
    for row in _table(models):
        table.add_row(*row)
    show(title, table)


def _table(models: Mapping[str, Mapping[str, Outcome]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for outcomes in models.values() for name in outcomes))
    rows = []
    for name in names:
        cells = []
        for outcomes in models.values():
            o = outcomes.get(name)
            spread = f" (spread {o.spread:.1%})" if o is not None and len(o.runs) > 1 else ""
            cells.append("" if o is None else f"{o.accuracy:.1%}{spread}")
        counts = {len(outcomes[name].right) for outcomes in models.values() if name in outcomes}
        most = max(len(o.right) for outcomes in models.values() for o in outcomes.values())
        label = name if counts == {most} else f"{name}, {max(counts)} images"
        rows.append([label, *cells])
    worst = [f"{float(worst_case(outcomes).double().mean()):.1%}" for outcomes in models.values()]
    return [*rows, ["every attack together", *worst]]


def write_report(found: Sequence[Robustness], out: Path, title: str, settings: Settings) -> None:
    """robustness.csv, README.md, index.html and the figures in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    models = {r.name: r.outcomes for r in found}
    names = list(models)
    pages = []

    def figure(file: str, caption: str, draw: Callable[[Path], None]) -> None:
        draw(out / file)
        pages.append((file, caption))

    bars = {r.name: {n: o.accuracy for n, o in r.outcomes.items()} for r in found}
    figure(
        "attacks.png", f"Accuracy under each attack, {title}",
        lambda path: figures.plot_bars(path, f"Accuracy under attack, {title}", bars, "accuracy"),
    )  # fmt: skip
    curves = {
        r.name: (np.arange(len(curve)), np.asarray(curve))
        for r in found
        if (curve := max((o.losses for n, o in r.outcomes.items() if n.startswith("pgd")), key=len, default=[]))
    }
    if curves:
        figure(
            "loss-against-step.png", f"Loss against step of PGD (mean over images, first restart), {title}",
            lambda path: figures.plot_lines(path, f"Loss against step of PGD, {title}", curves, "step", "cross entropy",
                                            looks=names, from_zero=False),
        )  # fmt: skip
    sweeps = {r.name: (np.array(list(r.sweep)) * 255, np.array(list(r.sweep.values()))) for r in found}
    few = min(settings.few, *(len(r.outcomes["clean"].right) for r in found))
    figure(
        "eps-sweep.png", f"Accuracy under PGD-20 against the radius ({few} images), {title}",
        lambda path: figures.plot_lines(path, f"Accuracy against the radius, PGD-20, {title}", sweeps,
                                        "eps, in 1/255", "accuracy", looks=names),
    )  # fmt: skip
    words = [f"{r.name}: {r.verdict()}" for r in found]
    words += [f"{r.name}, {finding}" for r in found for finding in r.findings]
    note = (
        f"Accuracy on {max(len(o.right) for r in found for o in r.outcomes.values())} test images, L-inf ball of "
        f"{settings.eps * 255:.3g}/255. An attack with restarts counts an image as fooled where any of them fooled it; "
        "the spread is the weakest restart's accuracy less the strongest's."
    )
    write_page(out, "Robustness", ["accuracy under", *names], _table(models), note, pages, words, "robustness.csv")


def _mark(model: Model, x: Tensor, y: Tensor, settings: Settings, surrogate: Model | None) -> int:
    """A checksum of everything that an outcome depends on, this package's version among it."""
    value = zlib.crc32(json.dumps([__version__, asdict(settings)], sort_keys=True).encode())
    for one in (model, surrogate):
        if isinstance(one, torch.nn.Module):
            for name, weight in one.state_dict().items():
                value = zlib.crc32(name.encode(), value)
                value = zlib.crc32(weight.detach().cpu().contiguous().numpy().tobytes(), value)
        value = zlib.crc32(b"|", value)
    for part in (x, y):
        value = zlib.crc32(part.detach().cpu().contiguous().numpy().tobytes(), value)
    return value


def _store(file: Path, mark: int, outcome: Outcome) -> None:
    _write(file, mark, {**vars(outcome), "right": "".join("01"[bit] for bit in outcome.right.int().tolist())})


def _stored(file: Path, mark: int) -> Outcome | None:
    values = _read(file, mark)
    if values is None:
        return None
    right = torch.tensor([bit == "1" for bit in values.pop("right")])
    return Outcome(right=right, **values)


def _write(file: Path, mark: int, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(json.dumps({"mark": mark, **values}) + "\n")


def _read(file: Path, mark: int) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error}); delete it to make it anew") from error
    return values if values.pop("mark", None) == mark else None


def pixels_of(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """`count` of the images, each class its share, as pixels and labels; always the same ones."""
    few = images.sample(count)
    return few.pixels(), few.labels


def check_names(names: Iterable[str]) -> None:
    """Refuse a repeated name, and none."""
    names = list(names)
    if not names:
        raise InputError(f"expected at least one attack of {NAMES}, got none")
    if len(set(names)) != len(names):
        raise InputError(f"each attack can be named once, got {' '.join(names)}")
