"""Results tables and the papers' figures from trained runs: scores, PNG files and an index page."""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError
from cmr_fast.methods._runfolder import CONFIG, read_json, read_run
from cmr_fast.methods.evaluation import averaged, encode_all, evaluate_many
from cmr_fast.reports import figures
from cmr_fast.reports.page import folder_names, write_page

if TYPE_CHECKING:
    from cmr_fast.data.pairs import PairedDataset
    from cmr_fast.retrieval.metrics import RetrievalResult

CUT = 50
TSNE_POINTS, TSNE_LEAST = 1000, 5
_CHEAP_CCA = 2048  # CCA takes an eigendecomposition of each feature covariance


@dataclass(frozen=True)
class Score:
    """One model on one data set: a row of the results table, and the curves of a report.

    Parameters
    ----------
    name, data
        Of the model and the data set.
    whole, top
        mAP(all), and mAP@50 over the hits, {"i2t", "t2i", "average"} each.
    curves
        {"i2t", "t2i"} under tie-aware ranking; empty where no curves are drawn.
    deviations
        Of a mean over seeds, beside `numbers`; empty of one model.
    """

    name: str
    data: str
    whole: Mapping[str, float]
    top: Mapping[str, float]
    curves: "Mapping[str, RetrievalResult]" = field(default_factory=dict)
    deviations: tuple[float, ...] = ()

    @classmethod
    def over_seeds(cls, name: str, scores: "Sequence[Score]") -> "Score":
        """The mean of two or more scores on one data set, and their standard deviations."""
        whole, top = (
            {way: statistics.mean(getattr(s, part)[way] for s in scores) for way in ("i2t", "t2i", "average")}
            for part in ("whole", "top")
        )
        deviations = tuple(statistics.stdev(values) for values in zip(*(s.numbers() for s in scores), strict=True))
        return cls(name, scores[0].data, whole, top, deviations=deviations)

    @classmethod
    def of(cls, name: str, data: str, results: Mapping[str, Any]) -> "Score":
        """The row of what `final_results` measured, as results.json of a run holds it."""
        return cls(name, data, results["all"], results[f"topk_hits@{CUT}"])

    def numbers(self) -> tuple[float, ...]:
        """I2T, T2I, average under mAP(all), then the same under mAP@50 (hits)."""
        return tuple(means[what] for means in (self.whole, self.top) for what in ("i2t", "t2i", "average"))

    def cells(self, digits: int) -> list[str]:
        """The numbers as a table has them, with ± and the deviation where they are means."""
        shown = [f"{n:.{digits}f}" for n in self.numbers()]
        return (
            [f"{n} ± {d:.{digits}f}" for n, d in zip(shown, self.deviations, strict=True)] if self.deviations else shown
        )


COLUMNS = (
    *("I2T mAP(all)", "T2I mAP(all)", "average mAP(all)"),
    *(f"I2T mAP@{CUT} hits", f"T2I mAP@{CUT} hits", f"average mAP@{CUT} hits"),
)


def score(name: str, model: Any, dataset: "PairedDataset") -> Score:
    """Both directions under both conventions of the results table. Raises InputError where the metrics refuse."""
    settings: list[dict[str, Any]] = [
        {"convention": "all"},
        {"convention": "topk_hits", "k": CUT},
        {"ties": "tie_aware"},
    ]
    results = []
    for result in evaluate_many(model, dataset, settings):
        if isinstance(result, InputError):
            raise result
        results.append(result)
    whole, top, curves = results
    return Score(name, dataset.name, averaged(whole), averaged(top), curves)


def baselines_for(models: Iterable[Any], dataset: "PairedDataset") -> list[tuple[str, Any]]:
    """To set beside `models`: CCA and semantic matching for embeddings, CCA-ITQ per code length, random.

    CCA and CCA-ITQ only where they take seconds.
    """
    from cmr_fast.methods.baselines import CCA, CCAITQ, Random, SemanticMatching

    if len(dataset.image_shape) > 1:  # they take features
        return []
    models = list(models)
    code_bits = sorted({bits for model in models if (bits := _bits(model))})
    baselines: list[tuple[str, Any]] = []
    if max(dataset.image_dim, dataset.text_dim) <= _CHEAP_CCA:
        if any(not model.binary for model in models):
            dim = min(7, dataset.image_dim, dataset.text_dim)
            baselines.append((f"CCA, {dim} dims", CCA(dim).fit(dataset.train)))
        baselines += [(f"CCA-ITQ, {bits} bits", CCAITQ(bits).fit(dataset.train)) for bits in code_bits]
    if any(not model.binary for model in models):
        baselines.append(("semantic matching", SemanticMatching().fit(dataset.train)))
    bits = code_bits[0] if code_bits else 64
    return [*baselines, (f"random, {bits} bits", Random(bits).fit(dataset.train))]


def print_results(scores: Sequence[Score], title: str) -> None:
    """The results table on standard output; the best of each column in bold."""
    from cmr_fast._terminal import new_table, show

    several = len({s.data for s in scores}) > 1
    table = new_table("")
    if several:
        table.add_column("data")
    for convention in ("mAP(all)", f"mAP@{CUT} hits"):
        for what in ("I2T", "T2I", "average"):
            table.add_column(f"{convention}\n{what}" if what == "I2T" else f"\n{what}", justify="right")
    for s in scores:
        best = np.max([other.numbers() for other in scores if other.data == s.data], axis=0)
        numbers = zip(s.numbers(), s.cells(3), best, strict=True)
        cells = [f"[bold]{cell}[/bold]" if n == top else cell for n, cell, top in numbers]
        table.add_row(s.name, *([s.data] if several else []), *cells)
    show(title, table)


Loaded = tuple[Path, Any, "PairedDataset"]


def write_report(
    runs: Sequence[Loaded],
    out: Path,
    *,
    with_baselines: bool = True,
    tsne_points: int = TSNE_POINTS,
    force: bool = False,
) -> list[Score]:
    """Write figures with their values as CSV, results.csv, README.md and index.html to a folder.

    Runs that differ in the seed alone also get a row of their mean ± standard deviation.

    Parameters
    ----------
    runs
        (run folder, its model, its data set) each; runs on one data set share their curves.
    out
        The folder.
    with_baselines
        CCA, CCA-ITQ and random beside the runs.
    tsne_points
        Pairs in each t-SNE, 0 for none.
    force
        Write over the files of an earlier report; anything else in the folder stays as it is.

    Returns
    -------
    list of Score
        The rows of the table.

    Raises
    ------
    InputError
        Where `out` holds a report already (without force) or is a file, and where there are no runs.
    """
    if not runs:
        raise InputError("a report needs at least one run, got none")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder to write")
    if (out / "README.md").exists() and not force:
        raise InputError(f"{out}: holds a report already; --force writes over it")
    out.mkdir(parents=True, exist_ok=True)
    names = _names([(path, model) for path, model, _ in runs])
    scores: list[Score] = []
    pages: list[tuple[str, str]] = []  # (file, caption)
    groups: dict[str, list[int]] = {}
    for number, data in enumerate(_data_names([dataset for _, _, dataset in runs])):
        groups.setdefault(data, []).append(number)
    for data, members in groups.items():
        dataset = replace(runs[members[0]][2], name=data)
        group = [score(names[i], runs[i][1], replace(runs[i][2], name=data)) for i in members]
        means = _over_seeds(group, [runs[i] for i in members])
        if with_baselines:
            models = [runs[i][1] for i in members]
            group += [score(name, model, dataset) for name, model in baselines_for(models, dataset)]
        scores += [*means, *group]
        pages += draw_curves(group, out, data, suffix="" if len(groups) == 1 else f"-{_slug(data)}")
    for number, (path, model, dataset) in enumerate(runs):
        suffix = "" if len(runs) == 1 else f"-{_slug(names[number])}"
        pages += draw_run(path, model, dataset, out, names[number], suffix, tsne_points)
    write_index(out, scores, pages)
    return scores


def draw_curves(scores: Sequence[Score], out: Path, data: str, suffix: str = "") -> list[tuple[str, str]]:
    """Precision-scope, precision at K, precision-recall of models on one data set; returns (file, caption) of each."""
    database = scores[0].curves["i2t"].num_database
    looks = [s.name for s in scores]
    drawn = []

    def figure(file: str, caption: str, curves: Mapping[str, Any], x: str, y: str, log_x: bool = False) -> None:
        title = f"{caption.partition(' (')[0]}, {data}"
        figures.plot_directions(out / file, title, curves, x, y, looks=looks, log_x=log_x)
        _write_curves((out / file).with_suffix(".csv"), curves, x, y)
        drawn.append((file, f"{caption}, {data}"))

    def precision(ks: np.ndarray) -> dict[str, dict[str, figures.Curve]]:
        return {
            s.name: {d: (ks, np.asarray(result.precision_at(ks))) for d, result in s.curves.items()} for s in scores
        }

    last = min(1000, database)
    scope = np.unique(np.linspace(min(50, last), last, 40).astype(int))
    caption = "Precision-scope (ACMR, Fig. 3)"
    figure(f"precision-scope{suffix}.png", caption, precision(scope), "scope K (items shown)", "precision")
    ks = np.unique(np.geomspace(1, last, 40).astype(int))
    caption = "Precision at K (CMIMH, Fig. 4)"
    figure(f"precision-at-k{suffix}.png", caption, precision(ks), "K (items shown)", "precision at K", log_x=True)
    by_rank = {s.name: {d: _by_rank(result) for d, result in s.curves.items()} for s in scores}
    figure(f"precision-recall{suffix}.png", "Precision-recall by rank (CMIMH, Fig. 5)", by_rank, "recall", "precision")
    coded = [s for s in scores if s.curves["i2t"].metric == "hamming"]
    if any(not s.name.startswith("random") for s in coded):  # alone, chance has nothing to be beside
        by_radius = {s.name: {d: _by_radius(result) for d, result in s.curves.items()} for s in coded}
        caption = "Precision-recall by Hamming radius (mean over queries)"
        figure(f"precision-recall-radius{suffix}.png", caption, by_radius, "recall", "precision")
    return drawn


def draw_run(
    path: Path,
    model: Any,
    dataset: "PairedDataset",
    out: Path,
    name: str,
    suffix: str = "",
    tsne_points: int = TSNE_POINTS,
) -> list[tuple[str, str]]:
    """Loss curves from the run's metrics.csv, and t-SNE of the query split; returns (file, caption) of each."""
    drawn = []
    history = read_history(path)
    panels = loss_panels(history)
    if panels:
        file = f"losses{suffix}.png"
        figures.plot_losses(out / file, f"Training of {name}, {dataset.name}", history["epoch"].tolist(), panels)
        drawn.append((file, f"Losses and validation mAP by epoch (ACMR, Fig. 5), {name}"))
    shown = min(tsne_points, len(dataset.query))
    if shown >= TSNE_LEAST:
        file = f"tsne{suffix}.png"
        draw_tsne(out / file, f"t-SNE of {name}, {dataset.name}", model, dataset, shown)
        drawn.append((file, f"t-SNE of {shown} query pairs in the common space (ACMR, Fig. 4), {name}"))
    return drawn


def draw_tsne(path: Path, title: str, model: Any, dataset: "PairedDataset", shown: int) -> None:
    """t-SNE of `shown` query pairs, drawn by lot, where the model ranks them; of codes as signs."""
    rows = np.sort(np.random.default_rng(0).permutation(len(dataset.query))[:shown])
    how = "subspace" if hasattr(model, "subspace") else "encode"
    points = {m: encode_all(model, m, getattr(dataset.query, m), how).numpy()[rows] for m in ("image", "text")}
    if not model.binary and model.metric == "cosine":
        points = {m: x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for m, x in points.items()}
    elif model.binary:
        points = {m: np.where(x >= 0, 1.0, -1.0) for m, x in points.items()}
    labels = None if dataset.query.multi_label else dataset.query.labels.numpy()[rows]
    figures.plot_tsne(path, title, points["image"], points["text"], labels, dataset.class_names)


def read_history(run: Path) -> dict[str, np.ndarray]:
    """metrics.csv by column, float64 (epochs,), NaN where a value is missing. Empty where there is no such file."""
    file = (run if run.is_dir() else run.parent) / "metrics.csv"
    if not file.is_file():
        return {}
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in (rows[0] if rows else ())}
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: expected one number per column and epoch ({error})") from error


def loss_panels(history: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Fig. 5's embedding and adversarial loss (where a method has them), validation mAP, then each term."""
    first = [name for name in ("embedding_loss", "adversarial_loss", "loss") if name in history]
    panels = {name.replace("_", " "): {name: history[name]} for name in first}
    if "adversarial_loss" in history:
        chance = np.full(len(history["epoch"]), 2 * np.log(2))
        panels["adversarial loss"]["2 log 2, at chance"] = chance
    valid = {"I2T": "valid_i2t", "T2I": "valid_t2i", "average": "valid_map"}
    if "valid_map" in history:
        panels["validation mAP(all)"] = {line: history[name] for line, name in valid.items() if name in history}
    for name, values in history.items():
        if name not in first and name not in ("epoch", "seconds") and not name.startswith("valid_"):
            stem, _, side = name.rpartition("_")
            title, line = (stem, side) if side in ("image", "text") else (name, name)
            if side == "accuracy":  # of those that tell the modality: ACMR's classifier, a fresh probe
                title, line = "accuracy in telling the modality", stem
            panels.setdefault(title.replace("_", " "), {})[line] = values
    return panels


def write_index(out: Path, scores: Sequence[Score], pages: Sequence[tuple[str, str]]) -> None:
    """results.csv, README.md and index.html: the table and every figure with its caption."""
    rows = [[s.name, s.data, *s.cells(4)] for s in scores]
    note = (
        "I2T: image queries rank texts; T2I: text queries rank images. mAP(all) divides by all relevant items "
        f"(convention `all`), mAP@{CUT} hits by those among the first {CUT} (`topk_hits`)."
    )
    write_page(out, "Results", ["model", "data", *COLUMNS], rows, note, pages)


def _names(runs: Sequence[tuple[Path, Any]]) -> list[str]:
    """Short names: method, bits, seed; where two would be the same the folder's name, with its parent's if need be."""
    names = []
    for path, model in runs:
        run = read_run(path if path.is_dir() else path.parent)
        seed = None if run is None else run["seed"]
        bits = _bits(model)
        names.append(model.name.upper() + (f", {bits} bits" if bits else "") + (f", seed {seed}" if seed else ""))
    folders = folder_names([path if path.is_dir() else path.parent for path, _ in runs])
    return [n if names.count(n) == 1 else f"{n} ({folder})" for n, folder in zip(names, folders, strict=True)]


def _data_names(datasets: "Sequence[PairedDataset]") -> list[str]:
    """One label for all that is the same to rank: the name, with sizes and then a number where others share it."""

    def size(values: Any) -> str:
        return "x".join(map(str, getattr(values, "shape", ())[1:]))

    ranked = []
    for d in datasets:
        sizes = f"images of {size(d.query.image)} and texts of {size(d.query.text)}"
        ranked.append((d.name, sizes, d.query.fingerprint(), d.database.fingerprint()))
    labels: dict[tuple[Any, ...], str] = {}
    for one in ranked:
        name, sizes = one[:2]
        several = len({other[1] for other in ranked if other[0] == name}) > 1
        labels[one] = f"{name}, {sizes}" if several else name
    for shared in set(labels.values()):
        same = [one for one, label in labels.items() if label == shared]
        if len(same) > 1:
            labels |= {one: f"{shared} ({number})" for number, one in enumerate(same, 1)}
    return [labels[one] for one in ranked]


def _bits(model: Any) -> int | None:
    return getattr(model.config, "bits", None) if model.binary else None


def _over_seeds(scores: Sequence[Score], runs: "Sequence[Loaded]") -> list[Score]:
    """A row for each group of runs that differ in the seed alone; none where two have one seed.

    The training splits' checksums are not compared: what is held out, and adversarial samples, go by the seed.
    """
    groups: dict[str, list[tuple[Any, Score]]] = {}
    for one, (path, _, dataset) in zip(scores, runs, strict=True):
        config = (path if path.is_dir() else path.parent) / CONFIG
        if config.is_file():
            stored = read_json(config, run=dict, config=dict)
            what = {name: value for name, value in stored["run"].items() if name not in _SEED}
            data = {name: value for name, value in (stored.get("data") or {}).items() if name != "crc32"}
            parts = [stored.get("method"), stored["config"], what, data, dataset.query.fingerprint()]
            groups.setdefault(json.dumps(parts, sort_keys=True), []).append((stored["run"].get("seed"), one))
    means = []
    for found in groups.values():
        group = [one for _, one in found]
        if len(group) > 1 and len({seed for seed, _ in found}) == len(group):
            stem = re.sub(r"( \(.*\))?$", "", group[0].name).partition(", seed ")[0]
            means.append(Score.over_seeds(f"{stem}, {len(group)} seeds", group))
    names = [one.name for one in means]
    return [
        replace(one, name=f"{one.name} ({names[:n].count(one.name) + 1})") if names.count(one.name) > 1 else one
        for n, one in enumerate(means)
    ]


_SEED = ("seed", "out", "device", "resume", "quiet", "threads", "checkpoint_seconds")  # a run may differ in, and be one


def _write_curves(path: Path, curves: Mapping[str, Any], x: str, y: str) -> None:
    """(model, direction, x, y) of every point of a figure, as CSV."""
    with write_aside(path) as aside, open(aside, "w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["model", "direction", x, y])
        for name, both in curves.items():
            for direction, (xs, ys) in both.items():
                writer.writerows([name, direction, f"{a:g}", f"{b:.6f}"] for a, b in zip(xs, ys, strict=True))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _by_rank(result: "RetrievalResult") -> figures.Curve:
    """At most 200 of the ranks, the first ones kept denser."""
    curve = result.precision_recall_by_rank()
    rows = np.unique(np.geomspace(1, len(curve.at), 200).astype(int)) - 1
    return curve.recall[rows], curve.precision[rows]


def _by_radius(result: "RetrievalResult") -> figures.Curve:
    curve = result.precision_recall_by_radius(average="macro", empty="skip")
    defined = np.isfinite(curve.precision)
    return curve.recall[defined], curve.precision[defined]
