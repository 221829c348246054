"""MAT's figures: what augmentations are like in a reference model (1, 2), how many and how strong they are (3 to 8).

    Figure 1    cos(f(aug I), g(T)) and cos(f(I), g(aug T)), "Orig." cos(f(I), g(T)): alignment
    Figure 2    |f(I) - f(aug I)| and |g(T) - g(aug T)|: diversity

of the same pairs that a training gets. The others are trainings of MAT_Img, one a point, under SGA.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError
from cmr_fast.methods.candidates import seen_images
from cmr_fast.methods.ma2t import LEVELS, AugmentConfig, more_pairs
from cmr_fast.reports import figures
from cmr_fast.reports.bootstrap import interval

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedImages
    from cmr_fast.models.dual import DualEncoder

COUNT = 4
ORIGINAL, EDA, HUMAN, RANDAUG, LANGRW, SD = "Orig.", "EDA", "Human", "RandAug", "LangRW", "SD"
MEASURES = {"alignment": "cosine of image and text", "diversity": "distance from the original"}
SIDES = {"image": "augmented images", "text": "augmented captions"}
POINTS = 120  # of a density's curve
_IMAGES = 64  # that are augmented at a time


@dataclass(frozen=True)
class Measured:
    """One augmentation of N originals.

    Attributes
    ----------
    side
        "image" or "text", which was augmented; of the originals "both".
    alignment, diversity
        Float (N, C), of each original's C augmentations; of the originals (N, 1), and no diversity.
    """

    side: str
    alignment: np.ndarray
    diversity: np.ndarray | None = None

    def of(self, measure: str) -> np.ndarray | None:
        """Its values by name."""
        return self.alignment if measure == "alignment" else self.diversity


def check_names(texts: Mapping[str, str], images: Mapping[str, str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Both of them. InputError where a name is one of EDA, Human and RandAug, or in both."""
    if twice := [name for name in (*texts, *images) if name in (ORIGINAL, EDA, HUMAN, RANDAUG)] or [
        *({*texts} & {*images})
    ]:
        raise InputError(
            f"names of files must differ from each other and from {EDA}, {HUMAN} and {RANDAUG}, got {twice[0]} again"
        )
    return texts, images


@torch.no_grad()
def measure(
    reference: "DualEncoder", split: "CaptionedImages", *, texts: Mapping[str, str] | None = None,
    images: Mapping[str, str] | None = None, wordnet: str = "",
) -> dict[str, Measured]:  # fmt: skip
    """Alignment and diversity of EDA, Human (where images have the captions), RandAug and what files hold.

    Parameters
    ----------
    reference
        A dual encoder in evaluation mode.
    split
        N images.
    texts, images
        Name -> a file of texts or of images, as MA2T takes it.
    wordnet
        WordNet's dict folder, for EDA.

    Returns
    -------
    dict
        By name, "Orig." first.

    Raises
    ------
    InputError
        For files that do not fit the images.
    """
    wanted: dict[str, dict[str, Any]] = {EDA: {"augment_text": "eda", "wordnet": wordnet}}
    fewest = min(map(len, split.text)) - 1
    if fewest:
        wanted[HUMAN] = {"augment_text": "human", "augment_count": min(COUNT, fewest)}
    wanted |= {name: {"augment_text": file} for name, file in (texts or {}).items()}
    wanted |= {RANDAUG: {"augment_image": "randaug"}}
    wanted |= {name: {"augment_image": file} for name, file in (images or {}).items()}
    image = seen_images(reference, split.image)
    text = reference.embedded_texts([row[0] for row in split.text]).cpu()
    found = {ORIGINAL: Measured("both", (image * text).sum(dim=1)[:, None].double().numpy())}
    for name, settings in wanted.items():
        more = more_pairs(split, AugmentConfig(**settings), 1)
        rows = torch.arange(len(split), len(more.split))
        if "augment_text" in settings:
            side, own, other = "text", text, image
            seen = reference.embedded_texts([more.split.text[row][0] for row in rows.tolist()]).cpu()
        else:
            side, own, other = "image", image, text
            where = reference.log_scale
            seen = torch.cat([
                reference.encode_image(more.pixels(more.split.select(part)).to(where.device, where.dtype)).cpu()
                for part in rows.split(_IMAGES)
            ])  # fmt: skip
        seen = seen.view(-1, *own.shape).transpose(0, 1)  # (N, C, d)
        alignment, moved = (seen * other[:, None]).sum(dim=2), (seen - own[:, None]).norm(dim=2)
        found[name] = Measured(side, alignment.double().numpy(), moved.double().numpy())
    return found


def density(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A density by Gaussian kernels of Scott's width, at least a hundredth of the range of `at`.

    Parameters
    ----------
    values
        Float (M,).
    at
        Float (P,), where it is asked for.

    Returns
    -------
    ndarray
        Float (P,).
    """
    width = max(float(values.std()) * len(values) ** -0.2, float(np.ptp(at)) / 100)
    kernels = np.exp(-0.5 * ((at[:, None] - values[None]) / width) ** 2)
    return np.asarray(kernels.mean(axis=1) / (width * np.sqrt(2 * np.pi)))


CLAIMS = (
    ("Captions by people are better aligned with their images than EDA's (Figure 1)", HUMAN, EDA, "alignment"),
    ("Captions by people are more diverse than EDA's (Figure 2)", HUMAN, EDA, "diversity"),
    ("Captions by people are better aligned than a language model's rewritings (Figure 1)", HUMAN, LANGRW, "alignment"),
    ("Generated images are more diverse than RandAugment's (Figure 2)", SD, RANDAUG, "diversity"),
)
HEAD = ("augmentation", "side", "measure", "mean", "sd", "5 %", "median", "95 %")


def table_of(found: Mapping[str, Measured]) -> list[list[str]]:
    """Rows in the order of HEAD.

    Parameters
    ----------
    found
        As of `measure`.
    """
    return [
        [name, one.side, what, *(f"{x:.3f}" for x in _numbers(values).values())]
        for what in MEASURES for name, one in found.items() if (values := one.of(what)) is not None
    ]  # fmt: skip


def words_of(found: Mapping[str, Measured]) -> list[str]:
    """What the paper says of Figures 1 and 2, and whether it holds in the reference model.

    Parameters
    ----------
    found
        As of `measure`.
    """
    lines = []
    for claim, more, less, what in CLAIMS:
        if more in found and less in found:
            a, b = (found[name].of(what) for name in (more, less))
            assert a is not None and b is not None
            difference, low, high = interval([a.mean(axis=1) - b.mean(axis=1)])
            lines.append(f"{claim}: {verdict(low, high)} ({difference:+.3f}, 95 % from {low:+.3f} to {high:+.3f})")
    return lines


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says of the claim that it is above 0."""
    return "holds here" if low > 0 else "the reverse holds here" if high < 0 else "cannot be told here"


def _numbers(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, (5, 50, 95))
    return {
        "mean": float(values.mean()), "sd": float(values.std()), "5 %": float(low), "median": float(middle),
        "95 %": float(high),
    }  # fmt: skip


def write_densities(found: Mapping[str, Measured], out: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Figures 1 and 2, and densities.csv.

    Parameters
    ----------
    found
        As of `measure`.
    out
        The report's folder.

    Returns
    -------
    tuple
        {measure: {augmentation: numbers, and the curve}}, and the pages (file, caption).
    """
    told: dict[str, Any] = {}
    pages = []
    for number, (what, xlabel) in enumerate(MEASURES.items(), 1):
        values = {name: v.ravel() for name, one in found.items() if (v := one.of(what)) is not None}
        every = np.concatenate(list(values.values()))
        margin = 0.1 * max(float(np.ptp(every)), 1e-6)
        at = np.linspace(0 if what == "diversity" else every.min() - margin, every.max() + margin, POINTS)
        curves = {name: density(v, at) for name, v in values.items()}
        told[what] = {
            name: _numbers(v) | {"side": found[name].side, "x": at.tolist(), "density": curves[name].tolist()}
            for name, v in values.items()
        }
        file = f"figure-{number}.png"
        panels = {
            title: {name: (at, curves[name]) for name in curves if found[name].side in (side, "both")}
            for side, title in SIDES.items()
        }
        figures.plot_panels(
            out / file, f"Figure {number}: {what} in the reference model", panels, xlabel, "density",
            looks=list(found),
        )  # fmt: skip
        pages.append((file, f"Figure {number}: {what} of augmentations, {xlabel} in the reference model"))
    _write_csv(out / "densities.csv", [HEAD, *table_of(found)])
    return told, pages


# ---- Figures 3 to 8


@dataclass(frozen=True)
class Sweep:
    """A figure of trainings.

    Attributes
    ----------
    title, x
        What it shows, and along which axis.
    lines
        Name -> [(x, settings of mat-img)].
    """

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]


FIGURES = ("3a", "3b", "4", "5", "6", "7", "8")
NUMBERS = tuple(range(1, COUNT + 1))


def sweeps(
    wanted: Sequence[str], *, reference: str, texts: Mapping[str, str], images: Mapping[str, str]
) -> dict[str, Sweep]:
    """The sweeps of Figures 3 to 8; 1 and 2 need none and may be named too.

    Parameters
    ----------
    wanted
        Of "1", "2" and FIGURES.
    reference
        The run that Top is chosen by.
    texts, images
        Name -> file: Figure 5 is of LangRW, 3a and 8 are of SD.

    Raises
    ------
    InputError
        For other figures, and where the file of one is not given.
    """
    if unknown := [name for name in wanted if name not in ("1", "2", *FIGURES)]:
        raise InputError(f"figures must be of 1, 2, {', '.join(FIGURES)}, got {unknown[0]!r}")
    for figure, name, given, flag in (
        ("5", LANGRW, texts, "augment-text"), ("3a", SD, images, "augment-image"), ("8", SD, images, "augment-image"),
    ):  # fmt: skip
        if figure in wanted and name not in given:
            raise InputError(
                f"figure {figure} is of {name}: expected --{flag} {name}=FILE, got {', '.join(given) or 'none'}"
            )

    def numbers(select: str, **augment: str) -> list[tuple[int, dict[str, Any]]]:
        settings = {**augment, "augment_select": select} if select != "first" else dict(augment)
        settings |= {"augment_reference": reference} if select == "top" else {}
        return [(0, {}), *((count, settings | {"augment_count": count}) for count in NUMBERS)]

    def both(**augment: str) -> dict[str, Any]:
        return {"Top": numbers("top", **augment), "random": numbers("random", **augment)}

    def captions(figure: str, name: str, lines: Mapping[str, Any]) -> Sweep:
        return Sweep(f"Figure {figure}: number of {name} captions", "augmented captions of each image", lines)

    def pictures(figure: str, lines: Mapping[str, Any]) -> Sweep:
        return Sweep(f"Figure {figure}: number of {SD} images", "augmented images of each caption", lines)

    strengths = [(0, {}), *((n, {"augment_image": "randaug", "augment_level": n}) for n in range(1, len(LEVELS) + 1))]
    made = {
        "3a": lambda: pictures("3a", both(augment_image=images[SD])),
        "3b": lambda: captions("3b", HUMAN, {"random": numbers("random", augment_text="human")}),
        "4": lambda: captions("4", EDA, {EDA: numbers("first", augment_text="eda")}),
        "5": lambda: captions("5", LANGRW, both(augment_text=texts[LANGRW])),
        "6": lambda: captions("6", HUMAN, both(augment_text="human")),
        "7": lambda: Sweep("Figure 7: strength of RandAugment", "level of Figure 7", {RANDAUG: strengths}),
        "8": lambda: pictures("8", {"Top": numbers("top", augment_image=images[SD])}),
    }
    return {figure: make() for figure, make in made.items() if figure in wanted}


def slug_of(settings: Mapping[str, Any]) -> str:
    """The name of the run of a point: mat-img where nothing is augmented.

    Parameters
    ----------
    settings
        Of mat-img.
    """
    if not settings:
        return "mat-img"
    side = "text" if "augment_text" in settings else "image"
    what = settings[f"augment_{side}"]
    if what not in ("eda", "human", "randaug"):
        what = f"{side}s-{Path(what).stem}"
    parts = ["figure", what, settings.get("augment_select", "")]
    parts += [f"{name[8:]}{settings[name]}" for name in ("augment_count", "augment_level") if name in settings]
    return "-".join(part for part in parts if part).lower()


def write_sweeps(
    wanted: Mapping[str, Sweep], found: Mapping[str, Mapping[str, Mapping[str, float]]], out: Path
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A plot of each sweep under the last of the attacks, and sweeps.csv.

    Parameters
    ----------
    wanted
        As of `sweeps`.
    found
        Run -> {attack: {"tr", "ir": R@1}}, "clean" among them.
    out
        The report's folder.

    Returns
    -------
    tuple
        {figure: {line: [{"x", attack: {way: R@1}}]}}, and the pages.
    """
    told: dict[str, Any] = {}
    pages, rows = [], [("figure", "line", "x", "attack", "R@1 TR", "R@1 IR")]
    for figure, sweep in wanted.items():
        curves: dict[str, dict[str, figures.Curve]] = {}
        for line, points in sweep.lines.items():
            values = [(x, found[slug_of(settings)]) for x, settings in points]
            told.setdefault(figure, {})[line] = [{"x": x, **value} for x, value in values]
            at = np.array([x for x, _ in points], dtype=float)
            attack = list(values[0][1])[-1]
            curves[f"{line}, {attack}"] = {
                way: (at, np.array([value[attack][side] for _, value in values]))
                for way, side in (("i2t", "tr"), ("t2i", "ir"))
            }
            for x, value in values:
                rows += [
                    (figure, line, str(x), name, f"{both['tr']:.4f}", f"{both['ir']:.4f}")
                    for name, both in value.items()
                ]
        file = f"figure-{figure}.png"
        figures.plot_directions(out / file, sweep.title, curves, sweep.x, "R@1", looks=list(curves))
        pages.append((file, f"{sweep.title}, MAT_Img, R@1"))
    if wanted:
        _write_csv(out / "sweeps.csv", rows)
    return told, pages


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with write_aside(path) as aside, open(aside, "w", newline="") as file:
        csv.writer(file).writerows(rows)
