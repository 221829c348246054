"""MAT's study (Tables 1 to 3, 5, figures) at a chosen size: all defences from one model, attacked, what findings hold.

Runs are in OUT/runs, what attacks leave of them in OUT/hits; what is there already is not made again, so that a study
that was stopped goes on. Intervals are 95 % of 2,000 bootstrap draws of images, each with its captions and its pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cmr_fast._files import write_aside
from cmr_fast._terminal import show, table_of_numbers
from cmr_fast.attacks.multimodal.recall import WAYS
from cmr_fast.attacks.multimodal.ttc import Counterattack
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS, candidates
from cmr_fast.methods._runfolder import CONFIG, RESULTS, describe, read_json, same, write_json
from cmr_fast.methods.loop import load_model, train
from cmr_fast.methods.mat import MatConfig, PgdConfig
from cmr_fast.methods.method import CaptionRetriever, RunConfig
from cmr_fast.models.mlm import MaskedLM
from cmr_fast.reports import figures, mat_figures
from cmr_fast.reports.attacked_captions import KS, examine
from cmr_fast.reports.bootstrap import interval as _interval
from cmr_fast.reports.defended_captions import examine_adaptive
from cmr_fast.reports.page import write_page
from cmr_fast.reports.robustness import weights_crc32

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedDataset, CaptionedImages

START, FINETUNE, TECOA, MAT_IMG, MAT = "start", "finetune", "TeCoA", "MAT_Img", "MAT"
EDA, HUMAN, RANDAUG = "MA2T EDA", "MA2T Human", "MA2T RandAug"
LATER: Mapping[str, tuple[str, dict[str, Any]]] = {
    "MMCoA": ("mmcoa", {}),
    "FARE": ("fare", {"lr": 1e-5}),  # by AdamW
    "LEAF": ("leaf", {"lr": 1e-5}),
}
"""Later work, in a study where it is asked for."""
TTC = "TTC"
"""The start model under a counterattack at test time, attacked through it; nothing is trained."""
ROWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    FINETUNE: ("finetune", {}),
    TECOA: ("tecoa", {}),
    MAT_IMG: ("mat-img", {}),
    MAT: ("mat", {}),
    EDA: ("mat", {"augment_text": "eda"}),
    HUMAN: ("mat", {"augment_text": "human"}),
    RANDAUG: ("mat", {"augment_image": "randaug"}),
}
BOTH_SIDES = ("co-attack", "sga")
ATTACKS = ("pgd10", "apgd10-ce", "bert-attack", *BOTH_SIDES)
GAP = (MAT, HUMAN)  # attacked on training images too


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes
    ----------
    steps, batch
        Of every training.
    image_steps, alpha
        Of PGD in it.
    lr
        Of SGD in the beginning.
    images, captions
        Of the test split the first so many, and of each image.
    """

    steps: int
    batch: int
    image_steps: int
    alpha: float
    lr: float
    images: int
    captions: int


SCALES = {
    "tiny": Scale(steps=10, batch=32, image_steps=2, alpha=1 / 255, lr=1e-3, images=20, captions=1),
    "small": Scale(steps=100, batch=32, image_steps=2, alpha=1 / 255, lr=1e-3, images=100, captions=5),
    "paper": Scale(steps=5000, batch=128, image_steps=10, alpha=0.5 / 255, lr=1e-4, images=1000, captions=5),
}


@dataclass(frozen=True)
class Hits:
    """{attack: {way: bool (images or captions, K's)}}, "clean" among them, and int (captions,), whose each is."""

    found: Mapping[str, Mapping[str, np.ndarray]]
    owner: np.ndarray

    def at_one(self, attack: str) -> tuple[np.ndarray, np.ndarray]:
        """float (images,) each: of an image its own hit at 1, and the share of its captions'."""
        images, captions = (self.found[attack][way][:, 0].astype(float) for way in WAYS)
        return images, np.bincount(self.owner, captions, len(images)) / np.bincount(self.owner, minlength=len(images))


@dataclass(frozen=True)
class Finding:
    """What the paper found: `better` has the higher mean of R@1 both ways than `worse`, under these attacks."""

    words: str
    better: str
    worse: str
    attacks: Sequence[str] = BOTH_SIDES


FINDINGS = (
    Finding("Multimodal training defends: MAT over clean fine-tuning (Table 1)", MAT, FINETUNE),
    Finding("Attacking both sides in training beats images alone: MAT over MAT_Img (Table 1)", MAT, MAT_IMG),
    Finding("Training the whole model on attacked images loses to TeCoA's image tower (Table 1)", TECOA, MAT_IMG),
    Finding("MAT over TeCoA (Table 1)", MAT, TECOA),
    Finding("Clean recall is the price: fine-tuning over MAT without an attack (Table 1)", FINETUNE, MAT, ("clean",)),
    Finding("More captions help: MA2T Human over MAT (Table 3)", HUMAN, MAT),
    Finding("EDA helps: MA2T EDA over MAT (Table 3)", EDA, MAT),
    Finding("RandAugment helps: MA2T RandAug over MAT (Table 3)", RANDAUG, MAT),
    Finding("Captions by people beat EDA's: MA2T Human over MA2T EDA (Table 3)", HUMAN, EDA),
    Finding("MAT defends against captions attacked alone: over TeCoA under BERT-Attack (Table 5)", MAT, TECOA,
            ("bert-attack",)),
)  # fmt: skip
OVERFIT = "More captions narrow the gap between training and test images under Co-Attack: MA2T Human (Table 2)"


def study(
    dataset: "CaptionedDataset", out: Path, *, start: Path, mlm: Path, scale: str = "tiny",
    seeds: Sequence[int] = (0,), rows: Sequence[str] = (), quiet: bool = False, wanted: Sequence[str] = (),
    texts: Mapping[str, str] | None = None, images: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train every row from one model, attack it, and write the report.

    Parameters
    ----------
    dataset
        Images with captions; its validation split is left out.
    out
        The folder; a study that was begun there goes on.
    start
        A run on captions that everything begins with.
    mlm
        A masked language model's folder.
    scale
        Of SCALES.
    seeds
        Of the trainings: each row is trained once a seed.
    rows
        Of ROWS, LATER, "MA2T NAME" of files, and TTC. None: ROWS, and those of files.
    quiet
        Print nothing.
    wanted
        Figures that are trainings, of mat_figures.FIGURES; 1 and 2 are always there.
    texts, images
        Name -> a file of augmented texts or images, as `cmr-fast augment` makes it.

    Returns
    -------
    dict
        What results.json holds: recalls by row, findings with their intervals.

    Raises
    ------
    InputError
        For unknown scales and rows, and a folder that holds a study of other settings, attacks or weights.
    """
    if scale not in SCALES:
        raise InputError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    texts, images = mat_figures.check_names(texts or {}, images or {})
    ours = {f"MA2T {name}": ("mat", {"augment_text": file}) for name, file in texts.items()}
    ours |= {f"MA2T {name}": ("mat", {"augment_image": file}) for name, file in images.items()}
    known = {**ROWS, **ours, **LATER}
    rows = rows or (*ROWS, *ours)
    if unknown := [name for name in rows if name not in known and name != TTC]:
        raise InputError(f"rows must be of {', '.join([*known, TTC])}, got {unknown[0]!r}")
    sweeps = mat_figures.sweeps(wanted, reference=str(start), texts=texts, images=images)
    if not seeds:
        raise InputError("seeds must be one number or more, got none")
    size, words = SCALES[scale], MaskedLM.load(mlm)
    parts = {"test": _first(dataset.test, size), "train": _first(dataset.train, size)}
    data = replace(dataset, valid=None, test=parts["test"])
    hits: dict[str, list[dict[str, Hits]]] = {}
    for seed in seeds:
        for name in (START, *rows) if seed == seeds[0] else rows:
            folder = out / "runs" / f"{_slug(name)}-seed{seed}"
            trains = name not in (START, TTC)
            model = _trained(known[name], data, folder, start, mlm, size, seed, quiet) if trains else load_model(start)
            assert isinstance(model, CaptionRetriever)
            file = f"{_slug(name)}-seed{seed}"
            defence = Counterattack(model.dual, seed=seed) if name == TTC else None
            found = {"test": _hits(out, file, model, parts["test"], words, ATTACKS, defence)}
            if name in GAP:
                found["train"] = _hits(out, f"{file}-train", model, parts["train"], words, ("co-attack",))
            hits.setdefault(name, []).append(found)
    points: dict[str, dict[str, dict[str, float]]] = {}
    for settings in [s for sweep in sweeps.values() for line in sweep.lines.values() for _, s in line]:
        run = f"{(slug := mat_figures.slug_of(settings))}-seed{seeds[0]}"
        if slug not in points:
            model = _trained(("mat-img", settings), data, out / "runs" / run, start, mlm, size, seeds[0], quiet)
            left = _hits(out, run, model, parts["test"], words, ("sga",) if settings else ATTACKS).found
            points[slug] = {a: {way: float(left[a][way][:, 0].mean()) for way in WAYS} for a in ("clean", "sga")}
    reference = candidates.reference_model(str(start))
    shown = dataset.train.select(torch.arange(min(size.images, len(dataset.train))))
    measured = mat_figures.measure(reference, shown, texts=texts, images=images)
    out.mkdir(parents=True, exist_ok=True)
    densities, pages = mat_figures.write_densities(measured, out)
    swept, more = mat_figures.write_sweeps(sweeps, points, out)
    title = f"MAT's study on {dataset.name}, scale {scale}"
    results = {
        "data": dataset.name,
        "scale": scale,
        "steps": size.steps,
        "batch": size.batch,
        "images": len(parts["test"]),
        "seeds": list(seeds),
        "recalls": {name: _recalls([seed["test"] for seed in found]) for name, found in hits.items()},
        "findings": _findings(hits),
        "figures": {"densities": densities, "sweeps": swept, "words": mat_figures.words_of(measured)},
    }
    write_json(out / "results.json", results)
    _write(results, out, title, size, [*pages, *more])
    if not quiet:
        _print(results, title)
    return results


def _first(split: "CaptionedImages", size: Scale) -> "CaptionedImages":
    part = split.select(torch.arange(min(size.images, len(split))))
    return replace(part, text=tuple(row[: size.captions] for row in part.text), rows=None)


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace("_", "-")


def _trained(
    row: tuple[str, Mapping[str, Any]], data: "CaptionedDataset", folder: Path, start: Path, mlm: Path, size: Scale,
    seed: int, quiet: bool,
) -> Any:  # fmt: skip
    """The model of a row, trained where it is not there yet."""
    method, changes = row
    kind = METHODS[method]
    settings = {"start": str(start), "max_steps": size.steps, "batch_size": size.batch, "lr": size.lr, **changes}
    if issubclass(kind.Config, PgdConfig):
        settings |= {"steps": size.image_steps, "alpha": size.alpha}
    if issubclass(kind.Config, MatConfig):
        settings["mlm"] = str(mlm)
    config = kind.completed(kind.Config(**settings))
    run = RunConfig(
        out=folder, seed=seed, resume=True, valid_fraction=0.0, round_steps=max(1, size.steps // 5), quiet=quiet
    )
    if (folder / RESULTS).exists():
        model = load_model(folder)
        if model.config != config:
            raise InputError(f"{folder}: a run of other settings, expected those of this study; name another folder")
        same(folder, read_json(folder / CONFIG), describe(kind, config, data, run), kind)
        return model
    return train(method, config, data, run).model


def _hits(
    out: Path, run: str, model: CaptionRetriever, split: "CaptionedImages", mlm: MaskedLM, attacks: Sequence[str],
    defence: Counterattack | None = None,
) -> Hits:  # fmt: skip
    """What attacks leave of a run, through its defence if any; from the file where it is there."""
    file = out / "hits" / f"{run}.npz"
    of = {
        "weights": (weights_crc32(model.dual), "a model whose weights have", "model to start from"),
        "images": (split.fingerprint(), "images and captions that have", "data set"),
        "words": (weights_crc32(mlm), "a masked language model whose weights have", "masked language model"),
    }
    if not file.exists():
        if defence is None:
            found = examine(model.dual, split, attacks, mlm=mlm).adversarial.hits
        else:
            found = examine_adaptive(defence, split, attacks, mlm=mlm).adversarial.hits
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"{name}/{way}": found[name][way] for name in ("clean", *attacks) for way in WAYS}
        arrays |= {name: checksum for name, (checksum, *_) in of.items()}
        with write_aside(file) as aside, open(aside, "wb") as opened:
            np.savez(opened, **arrays)
    owner = split.captions()[1].numpy()
    with np.load(file, allow_pickle=False) as stored:
        if missing := [name for name in ("clean", *attacks) if not all(f"{name}/{way}" in stored for way in WAYS)]:
            raise InputError(f"{file}: holds no hits of {', '.join(missing)}; remove it, which attacks anew")
        for name, (checksum, whose, what) in of.items():
            if name not in stored and name != "weights":  # of a study that was begun before these were noted
                continue
            if (seen := int(stored[name]) if name in stored else None) != checksum:
                raise InputError(
                    f"{file}: hits of {whose} checksum {seen}, now {checksum}; name another folder for another {what}"
                )
        hits = {name: {way: stored[f"{name}/{way}"] for way in WAYS} for name in ("clean", *attacks)}
    if len(hits["clean"]["tr"]) != len(split) or len(hits["clean"]["ir"]) != len(owner):
        raise InputError(f"{file}: of {len(hits['clean']['tr'])} images, expected {len(split)}; name another folder")
    return Hits(hits, owner)


def _recalls(seeds: Sequence[Hits]) -> dict[str, dict[str, dict[str, float]]]:
    """R@K by attack and way, the mean over the seeds; "worst": of queries that survive all attacks."""
    names = list(seeds[0].found)
    every = [
        {**hits.found, "worst": {way: np.logical_and.reduce([hits.found[n][way] for n in names[1:]]) for way in WAYS}}
        for hits in seeds
    ]
    return {
        name: {
            way: {
                f"R@{k}": float(np.mean([hits[name][way][:, column].mean() for hits in every]))
                for column, k in enumerate(KS)
            }
            for way in WAYS
        }
        for name in (*names, "worst")
    }


def _scores(found: Sequence[Hits], attacks: Sequence[str]) -> np.ndarray:
    """float (images,): of each image, the mean at 1 over attacks and seeds of its own hit and of its captions'."""
    values = [part for hits in found for attack in attacks for part in hits.at_one(attack)]
    return np.asarray(np.mean(values, axis=0))


def _findings(hits: Mapping[str, Sequence[Mapping[str, Hits]]]) -> list[dict[str, Any]]:
    """Each finding whose rows are there: the difference in R@1, its interval, and what that says."""
    told = []
    for finding in FINDINGS:
        if finding.better in hits and finding.worse in hits:
            better, worse = (
                _scores([seed["test"] for seed in hits[name]], finding.attacks)
                for name in (finding.better, finding.worse)
            )
            told.append(_told(finding.words, [better - worse]))
            if lost := [name for name in (finding.better, finding.worse) if _lost(hits[name], hits[START])]:
                told[-1]["verdict"] = f"nothing to tell, {' and '.join(lost)} finds next to nothing unattacked"
    if all(name in hits for name in GAP):
        apart = {
            part: np.subtract(*(_scores([seed[part] for seed in hits[name]], ("co-attack",)) for name in GAP))
            for part in ("train", "test")
        }
        told.append(_told(OVERFIT, [apart["train"], -apart["test"]]))
    return told


def _lost(row: Sequence[Mapping[str, Hits]], start: Sequence[Mapping[str, Hits]]) -> bool:
    """Whether a row's clean R@1 is below a tenth of the model's that it was trained from: the training broke it."""
    clean, before = (float(_scores([seed["test"] for seed in each], ("clean",)).mean()) for each in (row, start))
    return clean < before / 10


def _told(words: str, parts: Sequence[np.ndarray]) -> dict[str, Any]:
    difference, low, high = _interval(parts)
    verdict = mat_figures.verdict(low, high)
    return {"finding": words, "difference": difference, "low": low, "high": high, "verdict": verdict}


HEAD = ("trained by", *(f"{name} {way.upper()}" for name in ("clean", *ATTACKS, "worst") for way in WAYS))


def _table(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, *(f"{100 * recalls[attack][way]['R@1']:.1f}" for attack in ("clean", *ATTACKS, "worst") for way in WAYS)]
        for name, recalls in results["recalls"].items()
    ]


def _words(results: Mapping[str, Any]) -> list[str]:
    return [
        f"{told['finding']}: {told['verdict']} ({100 * told['difference']:+.1f} points of R@1, 95 % from "
        f"{100 * told['low']:+.1f} to {100 * told['high']:+.1f})"
        for told in results["findings"]
    ] + results["figures"]["words"]


def _write(results: Mapping[str, Any], out: Path, title: str, size: Scale, pages: Sequence[tuple[str, str]]) -> None:
    shown = ("clean", *BOTH_SIDES)
    bars = {
        attack: {
            name: float(np.mean([recalls[attack][way]["R@1"] for way in WAYS]))
            for name, recalls in results["recalls"].items()
        }
        for attack in shown
    }
    figures.plot_bars(out / "recall.png", title, bars, "R@1, mean of both ways")
    seeds = len(results["seeds"])
    note = (
        f"R@1 in percent on {results['images']} test images with {size.captions} caption(s) each, queries and gallery "
        f"under attack within 2/255 and one word; {size.steps} steps of batch {size.batch} from one model, "
        f"{size.image_steps} x {size.alpha * 255:.3g}/255 for images in training; {seeds} seed(s). Worst: queries that "
        "survive every attack. Intervals are over images, not over seeds."
    )
    pages = [("recall.png", "R@1 by defence"), *pages]
    write_page(out, title, HEAD, _table(results), note, pages, words=_words(results))


def _print(results: Mapping[str, Any], title: str) -> None:
    show(title, table_of_numbers(("R@1, percent", *HEAD[1:]), _table(results)))
    for line in _words(results):
        print(line)
