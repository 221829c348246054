"""ACMR: Tables 2, 3 and 5 and Figures 3 to 6, on Wikipedia or on what the user has.

Every row is one training a seed; a setting that several items share is trained once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmr_fast.data.pairs import PairedDataset
from cmr_fast.methods.acmr import ACMR, ACMRConfig
from cmr_fast.methods.baselines import CCA, LinearHeads, Random, SemanticMatching
from cmr_fast.methods.evaluation import encode_all, final_results
from cmr_fast.methods.loop import load_model
from cmr_fast.modalities import MODALITIES
from cmr_fast.reports import figures
from cmr_fast.reports.reproduce.common import Item, Missing, Section, Study, Training, changed, chosen, make, spread
from cmr_fast.reports.retrieval import draw_curves, loss_panels, read_history, score

CONVENTIONS = ("all", "topk_hits@50")
WAYS = ("i2t", "t2i", "average")
HEAD = ("", "mAP(all) I2T", "T2I", "average", "mAP@50 hits I2T", "T2I", "average")
TOLD = ("D is right", "a fresh probe")
# (I2T, T2I, average); of Wikipedia, Table 2's shallow and deep features
SHALLOW = {
    "CCA": (0.255, 0.185, 0.220), "Multimodal DBN": (0.149, 0.150, 0.150), "Bimodal-AE": (0.236, 0.208, 0.222),
    "CCA-3V": (0.275, 0.224, 0.249), "LCFS": (0.279, 0.214, 0.246), "Corr-AE": (0.280, 0.242, 0.261),
    "JRL": (0.344, 0.277, 0.311), "JFSSL": (0.306, 0.228, 0.267), "ACMR": (0.366, 0.277, 0.322),
}  # fmt: skip
DEEP = {
    "CCA": (0.267, 0.222, 0.245), "CCA-3V": (0.437, 0.383, 0.410), "LCFS": (0.455, 0.398, 0.427),
    "Corr-AE": (0.402, 0.395, 0.398), "JRL": (0.453, 0.400, 0.426), "JFSSL": (0.428, 0.396, 0.412),
    "CMDN": (0.488, 0.427, 0.458), "ACMR": (0.619, 0.489, 0.546),
}  # fmt: skip
TABLE_3 = {
    "pascal": {
        "CCA": (0.363, 0.219, 0.291), "Corr-AE": (0.489, 0.444, 0.467), "JRL": (0.504, 0.489, 0.496),
        "CMDN": (0.534, 0.534, 0.534), "ACMR": (0.535, 0.543, 0.539),
    },
    "nus": {
        "CCA": (0.189, 0.188, 0.189), "Corr-AE": (0.366, 0.417, 0.392), "JRL": (0.426, 0.376, 0.401),
        "CMDN": (0.492, 0.515, 0.504), "ACMR": (0.544, 0.538, 0.541),
    },
}  # fmt: skip
TABLE_5 = {"imi only": (0.352, 0.430, 0.391), "imd only": (0.425, 0.413, 0.419), "full": (0.509, 0.431, 0.470)}
GRID = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
STEPS = (1, 2, 3, 4, 5, 6)
SEVEN = 7  # dimensions of CCA's row


def reproduce(
    data: str, out: Path, tables: Sequence[int], figures: Sequence[int], seeds: int, quiet: bool, *, jobs: int = 1
) -> None:
    """Make ACMR's tables and figures, as of `cmr_fast.reports.reproduce.reproduce`."""
    items = chosen(ITEMS, tables, figures)
    make(Study(data, out, seeds, quiet, jobs), "ACMR: the paper's tables and figures", items, ITEMS, NOTE)


def settings_of(dataset: PairedDataset) -> tuple[str, ACMRConfig]:
    """The preset that was made for the data set, else the default: its name and config."""
    of_wikipedia = dataset.name.startswith("wikipedia") and dataset.image_dim == 128
    name = "default" if not of_wikipedia else "wikipedia" if dataset.text_dim == 10 else "wikipedia-tfidf"
    config: ACMRConfig = ACMR.all_presets()[name]
    return name, config


def _measured(run: Any, dataset: PairedDataset) -> dict[str, Any]:
    return {name: run.results[name] for name in (*CONVENTIONS, "similarity", "modality", "best_epoch", "epochs")}


def _trainings(
    study: Study, dataset: PairedDataset, changes: Mapping[str, Any] | None = None, preset: str | None = None
) -> list[Training]:
    """A preset with some settings changed, one a seed."""
    name, base = settings_of(dataset)
    if preset is not None:
        name, base = preset, ACMR.all_presets()[preset]
    config = changed(base, **(changes or {}))
    title = _name(dataset, name, changes)
    return study.trainings(title, "acmr", config, dataset, _measured, **ACMR.run_settings(name))


def _runs(study: Study, trainings: Mapping[str, Sequence[Training]]) -> dict[str, list[dict[str, Any]]]:
    """Of each row its runs; all that are missing are trained together."""
    found = iter(study.scores([training for row in trainings.values() for training in row]))
    return {name: [next(found) for _ in row] for name, row in trainings.items()}


def _name(dataset: PairedDataset, preset: str, changes: Mapping[str, Any] | None) -> str:
    return " ".join([f"{dataset.name}-{dataset.text_dim} {preset}", *(f"{k} {v}" for k, v in (changes or {}).items())])


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name, *(spread([run[c][way] for run in runs]) for c in CONVENTIONS for way in WAYS)]


def _paper(name: str, values: Sequence[float], cells: int) -> list[str]:
    return [f"paper: {name}", *(f"{v:.3f}" for v in values), *[""] * (cells - 4)]


def _comparison(study: Study, dataset: PairedDataset, title: str, paper: Mapping[str, Any]) -> Section:
    """Baselines, ACMR by its preset, by labels, by the default and as printed, and the paper's rows."""
    dims = min(SEVEN, dataset.image_dim, dataset.text_dim)
    chance = [Random(64, seed=seed) for seed in range(study.seeds)]
    fitted: list[tuple[str, list[Any]]] = [("random", chance), (f"CCA, {dims} dims", [CCA(dims)])]
    rows = [_row(title, [final_results(m.fit(dataset.train), dataset) for m in models]) for title, models in fitted]
    heads = [LinearHeads(seed=seed).fit(dataset.train) for seed in range(study.seeds)]
    rows.append(_row("linear heads, InfoNCE", [final_results(model, dataset) for model in heads]))
    rows.append(_row("semantic matching", [final_results(SemanticMatching().fit(dataset.train), dataset)]))
    name, _ = settings_of(dataset)
    ours = {"default": _trainings(study, dataset, preset="default")}
    if name != "default":
        ours = {
            f"ACMR, preset {name}": _trainings(study, dataset),
            "the same, ranked by labels": _trainings(study, dataset, {"similarity": "labels"}),
        } | ours
    found = _runs(study, ours | {"ACMR, preset paper (as printed)": _trainings(study, dataset, preset="paper")})
    by = " ".join(dict.fromkeys(run["similarity"] for run in found["default"]))
    titles = {"default": f"ACMR, default (ranked by {by}, as validation chose)"}
    rows += [_row(titles.get(title, title), runs) for title, runs in found.items()]
    rows += [_paper(n, values, len(HEAD)) for n, values in paper.items()]
    words = (
        f"{len(dataset.train)} training pairs, {len(dataset.query)} queries, {len(dataset.database)} in the database."
    )
    return Section(title, HEAD, rows, [words, _protocol(name, "default")])


def _protocol(*presets: str) -> str:
    def said(name: str) -> str:
        run = {"valid_fraction": 0.1, "patience": 20} | ACMR.run_settings(name)
        return f"{name}: a share of {run['valid_fraction']} held out, patience {run['patience']}"

    return "Epochs are chosen by validation mAP. " + "; ".join(said(n) for n in dict.fromkeys(presets)) + "."


def table_2(study: Study) -> list[Section]:
    """Wikipedia: SIFT with LDA and with tf-idf text, or the user's deep features."""
    dataset = study.load()
    if not dataset.name.startswith("wikipedia"):
        raise Missing("it is of Wikipedia; give --data the folder of its files, or your features, named wikipedia...")
    if dataset.image_dim != 128:
        words = f"{dataset.image_dim}-d images, {dataset.text_dim}-d texts beside VGG's fc7 and 3,000 words"
        return [_comparison(study, dataset, f"Wikipedia, deep features ({words})", DEEP)]
    sections = [_comparison(study, dataset, "Wikipedia, shallow features (SIFT 128-d, LDA 10-d)", SHALLOW)]
    tfidf = study.load(features="tfidf")
    sections.append(_comparison(study, tfidf, "Wikipedia, SIFT 128-d, tf-idf 1,000-d (not in the paper)", {}))
    needs = "Its deep half needs VGG's fc7 (4096-d) and 3,000 words of every pair: one .npz, see docs/data.md."
    return [*sections, Section("Wikipedia, deep features", notes=[f"Not made: {needs}"])]


def table_3(study: Study) -> list[Section]:
    """Pascal Sentence and NUS-WIDE-10k, where the data are one of them; other data in their place."""
    dataset = study.load()
    needs = (
        "VGG's fc7 (4096-d) and 1,000 words of Pascal Sentence or NUS-WIDE-10k, one .npz whose name has pascal or nus "
        "in it (docs/data.md)"
    )
    if dataset.name.startswith("wikipedia"):
        raise Missing(f"it needs {needs}")
    paper = next((paper for name, paper in TABLE_3.items() if name in dataset.name.lower()), {})
    section = _comparison(study, dataset, dataset.name, paper)
    return [section if paper else replace(section, notes=[*section.notes, f"Not the paper's data: it has {needs}."])]


VARIANTS: Mapping[str, dict[str, Any]] = {
    "imi only": {"terms": "imi"},
    "imi only, alpha 10, lambda 1": {"terms": "imi", "alpha": 10.0, "triplet_weight": 1.0},
    "imd only": {"terms": "imd"},
    "full": {},
    "full, no adversary": {"adversary": 0.0},
    "full, D's rate that of the projectors": {"classifier_rate": 1.0},
    "full, D's rate 20 times that": {"classifier_rate": 20.0},
}


def table_5(study: Study) -> list[Section]:
    """Terms alone, the full method, none and stronger adversaries; who can tell the modality."""
    dataset = study.load()
    preset, _ = settings_of(dataset)
    found = _runs(study, {name: _trainings(study, dataset, changes) for name, changes in VARIANTS.items()})
    told = {
        name: [[run["modality"][who] for run in runs] for who in ("classifier_accuracy", "probe_accuracy")]
        for name, runs in found.items()
    }
    chance = [final_results(Random(64, seed=seed).fit(dataset.train), dataset) for seed in range(study.seeds)]
    rows = [[*_row("random", chance), "", ""]]
    rows += [[*_row(name, runs), *map(spread, told[name])] for name, runs in found.items()]
    head = (*HEAD, *TOLD)
    rows += [_paper(name, values, len(head)) for name, values in TABLE_5.items()]
    notes = [
        f"Images of {dataset.image_dim} features, texts of {dataset.text_dim}; the paper does not say what its Table 5 "
        f"is of. Preset {preset}; what a row changes is in its name. {_protocol(preset)}",
        departures(preset),
        "D is right: the modality classifier's accuracy on the queries, 0.5 at chance. Below it D has not followed the "
        "projectors. A fresh probe is a classifier of D's shape, trained on half of them and asked of the other half: "
        "the modality gap that is there.",
        verdict(found),
        order(found),
    ]
    return [Section("The terms of the objective, and the adversary", head, rows, notes)]


def departures(preset: str) -> str:
    """What a preset sets otherwise than the paper as printed."""
    presets = ACMR.all_presets()
    ours, paper = asdict(presets[preset]), asdict(presets["paper"])
    told = [f"{name} {value} ({paper[name]})" for name, value in ours.items() if value != paper[name]]
    return f"Otherwise than --preset paper, whose values are in brackets: {', '.join(told)}."


def _mean(runs: Sequence[Mapping[str, Any]], *path: str) -> float:
    return float(np.mean([run[path[0]][path[1]] for run in runs]))


def verdict(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether a fresh probe does worse with an adversary than without one, and what that is worth in mAP(all)."""
    plain = "full, no adversary"
    rivals = [name for name in found if name.startswith("full") and name != plain]
    best = min(rivals, key=lambda name: _mean(found[name], "modality", "probe_accuracy"))
    probes = [_mean(found[name], "modality", "probe_accuracy") for name in (plain, best)]
    gain = _mean(found[best], "all", "average") - _mean(found[plain], "all", "average")
    told = f"{probes[0]:.3f} without an adversary, {probes[1]:.3f} with the one that leaves it least ({best})"
    if probes[1] > probes[0] - 0.02:
        return f"A fresh probe tells the modalities as well with the adversary as without it ({told}): the gap stays."
    return f"The adversary hides the modality from a fresh probe ({told}); mAP(all) changes by {gain:+.3f}."


def order(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether the full method is above its parts, as the paper has it, by more than seeds explain."""
    full = np.array([run["all"]["average"] for run in found["full"]])
    told = []
    for name in ("imi only", "imi only, alpha 10, lambda 1", "imd only", "full, no adversary"):
        apart = full - np.array([run["all"]["average"] for run in found[name]])
        if len(apart) == 1:
            told.append(f"{apart[0]:+.3f} over {name!r}")
        else:
            error = apart.std(ddof=1) / len(apart) ** 0.5
            told.append(f"{apart.mean():+.3f} over {name!r} (standard error {error:.3f})")
    one = " One seed cannot tell such differences from chance." if len(full) == 1 else ""
    return f"The paper has the full method above its parts. Here it is, in mAP(all) by seed: {'; '.join(told)}.{one}"


def _model(study: Study, dataset: PairedDataset, changes: Mapping[str, Any] | None = None) -> tuple[Path, Any]:
    """The first seed's folder and model; all seeds are trained where they are not there yet."""
    trainings = _trainings(study, dataset, changes)
    study.scores(trainings)
    folder = trainings[0].folder(study.out)
    return folder, load_model(folder)


def figure_3(study: Study) -> list[Section]:
    """Precision-scope curves, and their values."""
    dataset = study.load()
    dims = min(SEVEN, dataset.image_dim, dataset.text_dim)
    models = [
        ("ACMR", _model(study, dataset)[1]), (f"CCA, {dims} dims", CCA(dims).fit(dataset.train)),
        ("semantic matching", SemanticMatching().fit(dataset.train)), ("random", Random(64).fit(dataset.train)),
    ]  # fmt: skip
    scores = [score(name, model, dataset) for name, model in models]
    pages = draw_curves(scores, study.out, dataset.name)[:1]
    last = min(1000, len(dataset.database))
    scopes = np.unique([k for k in (10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, last) if k <= last])
    rows = [
        [f"{s.name}, {way.upper()}", *(f"{p:.3f}" for p in s.curves[way].precision_at(scopes))]
        for s in scores for way in ("i2t", "t2i")
    ]  # fmt: skip
    words = f"K goes to {last}: the database holds {len(dataset.database)}. The first seed's model."
    return [Section("Precision by scope", ["", *(f"K = {k}" for k in scopes)], rows, [words], pages)]


def figure_4(study: Study) -> list[Section]:
    """t-SNE of the query split after three trainings."""
    dataset = study.load()
    panels: dict[str, dict[str, Any]] = {
        "a, imi without adversary": {"terms": "imi", "adversary": 0.0},
        "b, imi with adversary": {"terms": "imi"},
        "c, full": {},
    }
    pages = []
    study.scores([training for changes in panels.values() for training in _trainings(study, dataset, changes)])
    for name, changes in panels.items():
        _, model = _model(study, dataset, changes)
        rows = torch.arange(len(dataset.query))[:1000]
        points = {m: encode_all(model, m, getattr(dataset.query, m), "subspace")[rows] for m in MODALITIES}
        if model.metric == "cosine":
            points = {m: torch.nn.functional.normalize(x) for m, x in points.items()}
        labels = None if dataset.query.multi_label else dataset.query.labels[rows].numpy()
        file = f"figure-4-{name[0]}.png"
        image, text = (points[m].numpy() for m in MODALITIES)
        figures.plot_tsne(study.out / file, f"{name}, {dataset.name}", image, text, labels, dataset.class_names)
        pages.append((file, f"t-SNE of {len(rows)} query pairs: {name}"))
    return [Section("The common space", notes=["The first seed's models."], figures=pages)]


def figure_5(study: Study) -> list[Section]:
    """Losses by epoch, and who can tell the modality."""
    dataset = study.load()
    folder, _ = _model(study, dataset)
    history = read_history(folder)
    figures.plot_losses(
        study.out / "figure-5.png", f"Training on {dataset.name}", history["epoch"].tolist(), loss_panels(history)
    )
    words = "The first seed. Training stops early; the paper plots 200 epochs. mAP is the validation split's."
    return [Section("Losses by epoch", notes=[words], figures=[("figure-5.png", "Losses, mAP, and the modality")])]


def figure_6(study: Study) -> list[Section]:
    """mAP against alpha, beta and k, one at a time."""
    dataset = study.load()
    preset, base = settings_of(dataset)
    sections = []
    for field, values in (("alpha", GRID), ("beta", GRID), ("inner_steps", STEPS)):
        changes = {f"{value:g}": {} if value == getattr(base, field) else {field: value} for value in values}
        found = _runs(study, {value: _trainings(study, dataset, given) for value, given in changes.items()})
        rows, lines = [_row(value, runs) for value, runs in found.items()], {}
        for number, way in enumerate(WAYS, 1):
            y = np.array([float(row[number].partition(" ")[0]) for row in rows])
            lines[way.upper()] = (np.arange(len(values)), y)
        file = f"figure-6-{field}.png"
        looks, title = [way.upper() for way in WAYS], f"mAP(all) against {field}, {dataset.name}"
        shown = f"{field}: {', '.join(f'{v:g}' for v in values)}"
        figures.plot_lines(study.out / file, title, lines, shown, "mAP(all)", looks=looks)
        words = f"Preset {preset}, everything else as there; {field} there is {getattr(base, field):g}."
        sections.append(Section(f"{field}", [field, *HEAD[1:]], rows, [words], [(file, title)]))
    return sections


ITEMS = (
    Item("Table 2", "Wikipedia", table_2),
    Item("Table 3", "Pascal Sentence and NUS-WIDE-10k", table_3),
    Item("Table 5", "The terms of the objective, and the adversary", table_5),
    Item("Figure 3", "Precision by scope", figure_3),
    Item("Figure 4", "The common space", figure_4),
    Item("Figure 5", "Losses by epoch", figure_5),
    Item("Figure 6", "alpha, beta and k", figure_6),
)
NOTE = (
    "mAP(all) divides by all relevant items, mAP@50 hits by those among the first 50; the paper does not say which it "
    "gives. Mean ± standard deviation over seeds; the test split is looked at after training only. What differs from "
    "the paper: it prints 1,300 / 1,566 pairs of Wikipedia where the public files hold 2,173 / 693; its losses are "
    "sums over triplets where our presets take means, which is why its alpha and beta are not ours; its Tables 2 and 5 "
    "disagree on one model."
)
