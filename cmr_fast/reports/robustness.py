"""What attacks leave of a classifier, and whether its robustness is real: the table, the checks, the plots, a verdict.

The rebuttal of Feature Scattering (Zhang and Wang 2019) answers a charge of gradient masking with four checks: black
box by transfer, stronger white-box attacks with restarts, the loss against the step, an attack without gradients. All
four are here, with what came later: APGD on the DLR loss and AutoAttack's own warnings (Croce and Hein 2020).

Every run of an attack with restarts goes to its end and is judged there, the first as the others. The rebuttal's number
is the lowest of the runs, and max - min over them; an image that any run fooled is out in the row's own number, which
is lower still.
"""

import json
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmr_fast import __version__
from cmr_fast._files import write_aside
from cmr_fast._terminal import counting, new_table, show
from cmr_fast.attacks import checks, registry
from cmr_fast.attacks.base import Attack
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.registry import STANDARD, check_names
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.attacks.victim import Model, Victim
from cmr_fast.data.images import Images
from cmr_fast.errors import InputError
from cmr_fast.reports.outcomes import BROKEN, Examined, Outcome, draw, going_on, worst_case
from cmr_fast.reports.page import write_page

__all__ = [
    "STANDARD", "Outcome", "Robustness", "Settings", "attack_all", "attack_of", "check_names", "examine", "pixels_of",
    "print_outcomes", "worst_case", "write_report",
]  # fmt: skip

FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of eps, in the sweep
MISLED = 0.05  # PGD overstates where the strongest attack leaves this much less


@dataclass(frozen=True)
class Settings:
    """How a classifier is attacked.

    Raises
    ------
    InputError
        For values out of their range.
    """

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
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not number or not 0 <= self.eps <= 1:
            raise InputError(f"eps must be from 0 to 1, pixels being from 0 to 1, got {self.eps!r}")
        for name, least in (("images", 1), ("few", 1), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be at least {least}, a whole number, got {value!r}")


def attack_of(
    name: str,
    model: Model,
    settings: Settings,
    *,
    seed: int | None = None,
    surrogate: Model | None = None,
) -> Attack | Transfer | None:
    """The attack of that name, one restart of it, as a report runs it.

    Parameters
    ----------
    name, model, surrogate
        As of registry.make.
    settings
        eps, and the type of the gradients.
    seed
        None: that of the settings.

    Returns
    -------
    Attack, Transfer or None
        None for "clean".
    """
    return registry.make(
        name, model, eps=settings.eps, surrogate=surrogate,
        dtype=torch.bfloat16 if settings.fast else None, seed=settings.seed if seed is None else seed, check=False,
        progress=False,
    )  # fmt: skip


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
    quiet: bool = False,
) -> dict[str, Outcome]:
    """Every attack of `names`.

    Images that the model has wrong as they are count as fooled and are not attacked. Attacks that take thousands of
    queries an image see the first `settings.few` of them only.

    Parameters
    ----------
    model
        A classifier.
    x, y
        Pixels float (N, 3, H, W) from 0 to 1, and labels int (N,).
    names
        As of registry.read.
    settings
        Radius, batch, seed.
    surrogate
        What transfer attacks are crafted on.
    keep
        A folder that holds each finished attack, so that a report that was killed goes on; what lies there from another
        model, other images or settings is made anew.
    title
        Of the progress bar.
    quiet
        No progress on the terminal.

    Returns
    -------
    dict of Outcome
        By name.

    Raises
    ------
    InputError
        Before any work, for unknown names, attacks that the number of classes rules out, transfers without a surrogate
        or on a copy of the victim.
    """
    check_names(names)
    keep = _folder(keep)
    x, y = _samples(model, x, y)
    for name, why in registry.unfit(names, _classes(model, x)).items():
        raise InputError(f"{name} {why}; leave it out")
    for name in names:
        atk = attack_of(name, model, settings, surrogate=surrogate)
        if isinstance(atk, Transfer):
            atk.refuse_a_copy(x)
    batches = zip(x.split(settings.batch), y.split(settings.batch), strict=True)
    clean = torch.cat([_right(model, *part) for part in batches])
    checksums = [0, 0] if keep is None else [_checksum(model, x, y, settings, other) for other in (None, surrogate)]
    result: dict[str, Outcome] = {}
    passes = {name: _passes(name, len(x), settings) for name in names}
    progress = nullcontext(lambda n: None) if quiet else counting(sum(passes.values()), title)
    with progress as advance, going_on(keep, result):
        for name in names:
            file = None if keep is None else keep / f"{name}.json"
            checksum = checksums[registry.read(name).transfer]
            stored = None if file is None else _stored(file, checksum)
            if stored is None:
                stored = _run(name, model, x, y, clean, settings, surrogate, advance)
                if file is not None:
                    _store(file, checksum, stored)
            else:
                advance(passes[name])
            result[name] = stored
    return result


def _samples(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    images, labels, _ = PGD(model).checked(x, y)
    if not len(images):
        raise InputError("a report needs at least one image, got none")
    return images, labels


def _folder(keep: object) -> Path | None:
    if keep is not None and not isinstance(keep, (str, Path)):
        raise InputError(f"keep must be the path of a folder, got {keep!r}")
    return None if keep is None else Path(keep)


def _classes(model: Model, x: Tensor) -> int:
    with Victim(model).prepare(x) as victim:
        scores = victim.scores(x[:1])
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise InputError(f"a classifier must return logits (B, classes) of two classes or more, got {(*scores.shape,)}")
    return scores.shape[1]


def _count(name: str, images: int, settings: Settings) -> int:
    return min(images, settings.few) if registry.read(name).entry.slow else images


def _passes(name: str, images: int, settings: Settings) -> int:
    """Batches that an attack takes, over all its restarts."""
    return -(-_count(name, images, settings) // settings.batch) * registry.read(name).restarts


def _run(
    name: str, model: Model, x: Tensor, y: Tensor, clean: Tensor, settings: Settings, surrogate: Model | None,
    advance: Callable[[int], object],
) -> Outcome:  # fmt: skip
    count, began = _count(name, len(x), settings), time.perf_counter()
    every = torch.ones(count, dtype=torch.bool)
    runs, curves = [], []
    for restart in range(registry.read(name).restarts):
        atk = attack_of(name, model, settings, seed=settings.seed + restart, surrogate=surrogate)
        right, weights, sums = clean[:count].clone(), 0, Tensor()
        for rows in torch.arange(count).split(settings.batch):
            rows = rows[clean[rows]]
            if atk is not None and len(rows):
                info = atk(x[rows], y[rows], index=rows, return_info=True)[1]
                assert info.success is not None
                right[rows] = ~info.success.cpu()
                if info.losses.numel():
                    summed = info.losses.double().sum(dim=1).cpu()
                    sums, weights = (summed if not weights else sums + summed), weights + len(rows)
            advance(1)
        runs.append(float(right.double().mean()))
        every &= right
        if weights:
            curves.append((sums / weights).tolist())
    return Outcome(name, every, runs, curves, time.perf_counter() - began, registry.read(name).entry.in_ball)


def _right(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """bool (B,) on the CPU: who is classified right, in evaluation mode."""
    with Victim(model).prepare(x) as victim:
        return (victim.scores(x).argmax(dim=1) == y).cpu()


@dataclass(frozen=True)
class Robustness(Examined):
    """All of one classifier.

    Attributes
    ----------
    name
        Of the model.
    outcomes
        By attack.
    sweep
        Accuracy by eps under PGD-20.
    findings
        Of the checks.
    left_out
        Attacks that the number of classes rules out, and why.
    """

    name: str
    outcomes: dict[str, Outcome]
    sweep: dict[float, float]
    findings: list[checks.Finding]
    left_out: dict[str, str] = field(default_factory=dict)
    measure = "accuracy"

    def suspicions(self) -> list[str]:
        """The checks that are; where none is, how much PGD overstates."""
        names = [finding.name for finding in self.findings if finding.suspicious]
        pgd, left = self._pgd()
        over = left - self.worst
        if names or pgd == "clean" or over <= MISLED:
            return names
        return [f"{pgd} overstates by {over:.1%}, its loss is a poor guide here"]

    def broken(self) -> bool:
        """Whether next to nothing survives."""
        return self.worst <= BROKEN

    def curve(self) -> list[float]:
        """Of the longest PGD."""
        curves = (o.curves[0] for n, o in self.outcomes.items() if n.startswith("pgd") and o.curves)
        return max(curves, key=len, default=[])

    def _pgd(self) -> tuple[str, float]:
        """Madry's evaluation, as most papers give it: the first of the PGD rows."""
        rows = [(n, o.accuracy) for n, o in self.outcomes.items() if re.fullmatch(r"pgd\d+(x\d+)?", n)]
        return rows[0] if rows else ("clean", self.outcomes["clean"].accuracy)

    def numbers(self) -> str:
        """Clean, PGD, all together, the strongest alone, the spread of restarts, what was left out."""
        (pgd, left), worst = self._pgd(), self.worst
        alone = "" if pgd == "clean" else f"{pgd} leaves {left:.1%}, "
        numbers = f"Clean {self.outcomes['clean'].accuracy:.1%}, {alone}every attack together {worst:.1%}"
        if worst > BROKEN:
            within = (o for n, o in self.outcomes.items() if n != "clean" and o.in_ball)
            by = min(within, key=lambda o: o.accuracy)
            numbers += f" (the strongest alone, {by.name}, {by.accuracy:.1%})"
        numbers += "."
        restarted = [o for o in self.outcomes.values() if len(o.runs) > 1]
        if restarted:
            each = (f"{o.name} {o.lowest:.1%}, max - min {o.spread:.1%}" for o in restarted)
            numbers += f" The lowest run alone leaves: {'; '.join(each)}."
        if self.left_out:
            numbers += " Left out: " + "; ".join(f"{name} {why}" for name, why in self.left_out.items()) + "."
        return numbers


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
    """Attacks, eps sweep and checks of one classifier.

    Parameters
    ----------
    name
        Of the model.
    model, x, y, settings, surrogate, keep
        As of attack_all.
    names
        Attacks; None: STANDARD, less the transfers without a surrogate. Attacks that the number of classes rules out
        (DLR needs 3, targeted DLR 4) are left out before the work begins, and the verdict says so.

    Returns
    -------
    Robustness
        With its verdict.

    Raises
    ------
    InputError
        As attack_all, and where no attack is left.
    """
    if names is None:
        names = [n for n in STANDARD if surrogate is not None or not registry.read(n).transfer]
    check_names(names)
    keep = _folder(keep)
    x, y = _samples(model, x, y)
    if "clean" not in names:
        names = ["clean", *names]
    left_out = registry.unfit(names, _classes(model, x))
    names = [n for n in names if n not in left_out]
    if all(n == "clean" or not registry.read(n).entry.in_ball for n in names):
        why = "".join(f" ({n} {w})" for n, w in left_out.items())
        raise InputError(f"a report needs an attack in the ball beside clean: its verdict would rest on nothing{why}")
    outcomes = attack_all(model, x, y, names, settings, surrogate=surrogate, keep=keep, title=f"attacking {name}")
    few = slice(0, settings.few)
    file = None if keep is None else keep / "checks.json"
    checksum = 0 if keep is None else _checksum(model, x, y, settings, surrogate)
    stored = None if file is None else _read(file, checksum)
    if stored is None:
        sweep = {}
        with counting(len(FACTORS) + 1, f"checking {name}") as advance, going_on(keep, outcomes):
            for eps in (settings.eps * factor for factor in FACTORS):
                atk = PGD(model, eps, None, 20, check=False, progress=False)
                sweep[eps] = checks.accuracy(atk, x[few], y[few])
                advance(1)
            findings = checks.masking(model, x[few], y[few], eps=settings.eps, surrogate=surrogate, progress=False)
            advance(1)
        stored = {"sweep": list(sweep.items()), "findings": [asdict(finding) for finding in findings]}
        if file is not None:
            _write(file, checksum, stored)
    findings = [checks.Finding(**finding) for finding in stored["findings"]]
    return Robustness(name, outcomes, {float(e): a for e, a in stored["sweep"]}, findings, left_out)


def print_outcomes(title: str, models: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Accuracy by attack, a column a model; of several restarts all together, the lowest alone, and max - min.

    Parameters
    ----------
    title
        Above the table.
    models
        Outcomes by model and attack.
    """
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
            runs = f" (lowest run {o.lowest:.1%}, max - min {o.spread:.1%})" if o and len(o.runs) > 1 else ""
            cells.append("" if o is None else f"{o.accuracy:.1%}{runs}")
        counts = {len(outcomes[name].right) for outcomes in models.values() if name in outcomes}
        most = max(len(o.right) for outcomes in models.values() for o in outcomes.values())
        label = name if counts == {most} else f"{name}, {max(counts)} images"
        if not all(outcomes[name].in_ball for outcomes in models.values() if name in outcomes):
            label += ", outside the ball"
        rows.append([label, *cells])
    worst = [f"{float(worst_case(outcomes).double().mean()):.1%}" for outcomes in models.values()]
    return [*rows, ["every attack together", *worst]]


def write_report(reports: Sequence[Robustness], out: Path, title: str, settings: Settings) -> None:
    """robustness.csv, README.md, index.html and the figures.

    Parameters
    ----------
    reports
        Of one model or more.
    out
        The folder; made where it is missing.
    title
        Of the page.
    settings
        With which they were examined.
    """
    out.mkdir(parents=True, exist_ok=True)
    models = {r.name: r.outcomes for r in reports}
    figures = draw({r.name: r for r in reports}, out, title, loss="cross entropy", unit=(1 / 255, "eps, in 1/255"))
    words = [f"{r.name}: {r.verdict()}" for r in reports]
    words += [f"{r.name}, {finding}" for r in reports for finding in r.findings]
    images = max(len(o.right) for r in reports for o in r.outcomes.values())
    note = (
        f"Accuracy on {images} test images, the sweep and the checks on {min(settings.few, images)} of them, L-inf "
        f"ball of {settings.eps * 255:.3g}/255. Every run of an attack is judged at its last step. With restarts an "
        "image counts as fooled where any run fooled it; the lowest run is the strongest restart alone, max - min the "
        "weakest run's accuracy less the strongest's. fgsm starts at the clean image, pgd and cw at a random point."
    )
    write_page(out, "Robustness", ["accuracy under", *models], _table(models), note, figures, words, "robustness.csv")


def _checksum(model: Model, x: Tensor, y: Tensor, settings: Settings, surrogate: Model | None) -> int:
    """Of everything that an outcome depends on, this package's version among it."""
    value = zlib.crc32(json.dumps([__version__, "at the last step", asdict(settings)], sort_keys=True).encode())
    for one in (model, surrogate):
        if isinstance(one, torch.nn.Module):
            value = weights_crc32(one, value)
        elif one is not None:  # of a function only what it does can be looked at
            with Victim(one).prepare(x[:8]) as victim:
                value = zlib.crc32(_bytes(victim.scores(x[:8])), value)
        value = zlib.crc32(b"|", value)
    for part in (x, y):
        value = zlib.crc32(_bytes(part), value)
    return value


def weights_crc32(model: torch.nn.Module, value: int = 0) -> int:
    """Checksum of a model's weights and their names.

    Parameters
    ----------
    model
        On any device.
    value
        What the checksum begins with.
    """
    for name, weight in model.state_dict().items():
        value = zlib.crc32(_bytes(weight), zlib.crc32(name.encode(), value))
    return value


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _store(file: Path, checksum: int, outcome: Outcome) -> None:
    _write(file, checksum, {**vars(outcome), "right": "".join("01"[bit] for bit in outcome.right.int().tolist())})


def _stored(file: Path, checksum: int) -> Outcome | None:
    values = _read(file, checksum)
    if values is None:
        return None
    right = torch.tensor([bit == "1" for bit in values.pop("right")])
    return Outcome(right=right, **values)


def _write(file: Path, checksum: int, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        aside.write_text(json.dumps({"mark": checksum, **values}) + "\n")


def _read(file: Path, checksum: int) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {type(values).__name__}")
    except ValueError as error:
        raise InputError(f"{file}: damaged ({error}); delete it to make it anew") from error
    return values if values.pop("mark", None) == checksum else None


def pixels_of(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """Some images, each class its share; always the same ones.

    Parameters
    ----------
    images
        A split.
    count
        How many; all where there are no more.

    Returns
    -------
    pixels, labels
        float32 (N, 3, H, W) from 0 to 1, int64 (N,).
    """
    few = images.sample(count)
    return few.pixels(), few.labels
