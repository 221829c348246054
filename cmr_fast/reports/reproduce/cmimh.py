"""CMIMH: Tables I to IX and Figures 1 to 5, on pairs of features that the user has.

One training a seed serves every item that asks for its setting. Of a trained model everything is measured at once:
mAP@1000 of all four tasks, mAP of the whole ranking, at 50, Prec@100, RecallOne@K, TC, Corr MSE, the means' histogram.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import DivergedError
from cmr_fast.methods import METHODS
from cmr_fast.methods.baselines import BASELINES
from cmr_fast.methods.cmimh import CMIMH, CMIMHConfig, discriminator_loss, mlp
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.loop import load_model
from cmr_fast.methods.method import RunConfig
from cmr_fast.methods.tuned_itq import GRID, TUNED_BITS, TunedCCAITQ, tune
from cmr_fast.modalities import MODALITIES
from cmr_fast.ops import pack_codes
from cmr_fast.reports import figures
from cmr_fast.reports.reproduce.common import (
    Item,
    Missing,
    Section,
    Study,
    Training,
    changed,
    chosen,
    make,
    preset_for,
    spread,
)
from cmr_fast.reports.retrieval import draw_curves, score
from cmr_fast.retrieval.metrics import evaluate_codes

TASKS = ("i2t", "t2i", "i2i", "t2t")
CROSS = TASKS[:2]
MAP1K, ALL, MAP50 = "mAP@1k", "mAP(all)", "mAP@50"
PAPERS = (16, 32, 48)
SHORT, LONG, BITS = PAPERS, (16, 32, 64), 32
EVERY = (16, 32, 48, 64)
TUNED = TunedCCAITQ.name
RIVALS = {
    "cvh": "CVH", "cmfh": "CMFH", "fsh": "FSH", "cca-itq": "CCA-ITQ", TUNED: "CCA-ITQ, tuned",
    "linear-heads-sign": "linear heads, signs", "random": "random",
}  # fmt: skip
# MIR-Flickr25k of the paper, by task at 16, 32, 48 bits
TABLE_3 = {
    "CVH": ("68.18 66.95 66.32", "68.08 66.89 66.40", "69.49 68.36 67.76", "67.47 66.79 66.72"),
    "CMFH": ("77.97 78.69 78.50", "76.81 76.83 77.36", "81.45 82.54 83.13", "74.48 74.92 75.38"),
    "FSH": ("77.55 79.36 80.52", "75.10 77.10 78.47", "80.22 82.39 83.68", "73.35 75.03 76.28"),
    "DJSRH": ("79.05 79.53 81.66", "77.44 78.65 80.10", "82.39 83.17 84.07", "75.34 76.48 77.51"),
    "CMIMH": ("80.68 81.93 82.92", "79.77 81.43 82.18", "83.79 85.74 86.76", "77.36 78.42 79.01"),
}
SWITCHES = ("lambda_mi", "lambda_skl", "lambda_ind", "lambda_bal")
ABLATION = ("1000", "0100", "1011", "0111", "1100", "1110", "1101", "1111")
TABLE_4 = {  # MIR-Flickr25k at 32 bits, I2T and T2I; then at 48
    "1000": "75.13 73.14 77.57 75.49", "0100": "77.61 75.53 78.89 78.39", "1011": "75.52 73.69 77.84 75.83",
    "0111": "77.87 75.95 79.34 78.69", "1100": "81.28 80.73 82.07 81.51", "1110": "81.35 80.93 82.11 81.82",
    "1101": "81.43 81.14 82.16 81.78", "1111": "81.93 81.43 82.92 82.18",
}  # fmt: skip
SAMPLES = (1, 5, 10, 20)
TABLE_1 = {"means": "81.93 81.43", 1: "80.24 79.41", 5: "81.27 80.86", 10: "81.75 81.22", 20: "81.74 81.29"}
TABLE_2 = {  # MIR-Flickr25k: TC of image and text, Corr MSE of both, mAP@1k in percent of both ways
    "16 bits, with": "2.327 2.174 0.037 0.045 80.68 79.77", "16 bits, without": "4.491 4.288 0.068 0.079 80.39 79.76",
    "32 bits, with": "6.142 6.015 0.040 0.047 81.93 81.43", "32 bits, without": "6.418 6.424 0.092 0.110 81.38 81.14",
    "48 bits, with": "6.514 6.425 0.051 0.064 82.92 82.18", "48 bits, without": "6.718 6.645 0.078 0.095 82.16 81.28",
}  # fmt: skip
TABLE_9 = {
    "5k, CMIMH": "73.59 73.39 76.20 74.88", "5k, DJSRH": "71.23 68.18 74.86 73.29",
    "10k, CMIMH": "75.14 75.45 77.80 76.46", "10k, DJSRH": "72.67 71.12 76.93 74.97",
    "20k, CMIMH": "77.25 76.54 79.06 78.23", "20k, DJSRH": "73.46 73.53 77.58 77.31",
}  # fmt: skip
WEIGHTS = {"lambda_mi": (0.0, 0.1, 0.5, 1.0, 1.5, 3.0, 5.0), "lambda_skl": (0.0, 0.1, 0.5, 1.0, 1.5, 3.0, 5.0)}
SHARES = (0.25, 0.5, 1.0)
SURE = 0.01
"""Means within this of 0 or 1 are sure (Fig. 2's text)."""


def reproduce(
    data: str, out: Path, tables: Sequence[int], figures: Sequence[int], seeds: int, quiet: bool, *, jobs: int = 1
) -> None:
    """Make CMIMH's tables and figures, as of `cmr_fast.reports.reproduce.reproduce`."""
    items = chosen(ITEMS, tables, figures)
    make(Study("cmimh", data, out, seeds, quiet, jobs), "CMIMH: the paper's tables and figures", items, ITEMS, NOTE)


def settings_of(dataset: PairedDataset) -> tuple[str, CMIMHConfig]:
    """The preset that was made for the data set, else the default: its name and config."""
    name = preset_for(CMIMH, dataset)
    config: CMIMHConfig = CMIMH.all_presets()[name]
    return name, config


def measure(model: Any, dataset: PairedDataset) -> dict[str, Any]:
    """Every number that the paper's tables have, of one model that makes codes.

    In I2I and T2T a query is left out of its own ranking where queries and database are one split.
    """
    asked = {m: encode_all(model, m, getattr(dataset.query, m)) for m in MODALITIES}
    one_split = dataset.query is dataset.database
    answered = asked if one_split else {m: encode_all(model, m, getattr(dataset.database, m)) for m in MODALITIES}
    codes = [{m: pack_codes(values >= 0) for m, values in side.items()} for side in (asked, answered)]
    labels, bits = (dataset.query.labels, dataset.database.labels), asked["image"].shape[1]
    found: dict[str, Any] = {MAP1K: {}, ALL: {}, MAP50: {}, "Prec@100": {}, "RecallOne@1": {}, "RecallOne@10": {}}
    for task in TASKS:
        one, other = (MODALITIES["it".index(letter)] for letter in (task[0], task[2]))
        both = codes[0][one], codes[1][other], *labels
        settings: dict[str, Any] = {"bits": bits, "exclude_self": one == other and one_split}
        for name, k, convention in ((MAP1K, 1000, "topk_hits"), (ALL, None, "all"), (MAP50, 50, "topk_hits")):
            result = evaluate_codes(*both, k=k, convention=convention, **settings)
            found[name][task] = float(result.map)
        found["Prec@100"][task] = float(result.precision_at([min(100, len(dataset.database) - 1)])[0])
        for k in (1, 10):
            found[f"RecallOne@{k}"][task] = float(result.recall_one_at([k])[0])
    for modality, values in answered.items():
        signs = (values >= 0).double() * 2 - 1
        gap = signs.T @ signs / len(signs) - torch.eye(bits, dtype=torch.float64)
        found.setdefault("Corr MSE", {})[modality] = float(gap.square().mean())
        if isinstance(model, CMIMH):
            means = values.sigmoid()
            found.setdefault("TC", {})[modality] = total_correlation(means)
            found.setdefault("sure", {})[modality] = float(((means <= SURE) | (means >= 1 - SURE)).double().mean())
            counts = torch.histc(means, 20, 0, 1)
            found.setdefault("histogram", {})[modality] = (counts / counts.sum()).tolist()
    return found


def total_correlation(means: Tensor, steps: int = 300, rows: int = 5000) -> float:
    """Eq. 11's estimate by a discriminator trained anew, whether or not the training had one; nats.

    On (N, L) means: 300 steps of Adam on batches of 256, then the mean logit.
    """
    means = means[:rows].detach()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = mlp(means.shape[1], 128, 1, torch.nn.LeakyReLU)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(steps):
            loss = discriminator_loss(network, means[torch.randint(len(means), (256,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(network(means).mean())


def _dataset(study: Study) -> PairedDataset:
    dataset = study.load()
    if len(dataset.image_shape) > 1:
        raise Missing("it needs features; these are pixels")
    return dataset


def _measured(run: Any, dataset: PairedDataset) -> dict[str, Any]:
    return measure(run.model, dataset)


def _trainings(
    study: Study, bits: int, changes: Mapping[str, Any] | None = None, dataset: PairedDataset | None = None,
    printed: bool = False,
) -> list[Training]:  # fmt: skip
    """CMIMH by the data's preset, or as printed, with some settings changed, one a seed."""
    data = _dataset(study) if dataset is None else dataset
    name, base = ("paper", CMIMH.all_presets()["paper"]) if printed else settings_of(data)
    config = changed(replace(base, bits=bits) if printed else _of_length(base, bits), **(changes or {}))
    data = study.unvalidated(data) if printed else data
    title = _name(data, name, bits, changes)
    return study.trainings(title, "cmimh", config, data, _measured, **CMIMH.run_settings(name))


def _runs(study: Study, bits: int, changes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    return study.scores(_trainings(study, bits, changes))


def _train_together(study: Study, settings: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Train what (bits, changes) lack before they are read one by one, so that `--jobs` has enough to share out."""
    study.scores([training for bits, changes in settings for training in _trainings(study, bits, changes)])


def _of_length(base: CMIMHConfig, bits: int) -> CMIMHConfig:
    """At 64 bits the presets' reconstruction counts double, else SKL wins the first epochs and nothing is learnt."""
    double = base.reconstruction == "mean" and bits >= 64
    return replace(base, bits=bits, reconstruction_weight=base.reconstruction_weight * (2 if double else 1))


def _name(data: PairedDataset, preset: str, bits: int, changes: Mapping[str, Any] | None) -> str:
    parts = [f"{data.name}-{len(data.train)}", preset, f"{bits}bits", *(f"{k} {v}" for k, v in (changes or {}).items())]
    return " ".join(parts)


def _rival(study: Study, method: str, bits: int) -> list[dict[str, Any]]:
    """A baseline of BASELINES, or DJSRH, measured for every seed and kept."""
    data = _dataset(study)
    if method == "djsrh":
        return study.scores(_djsrh(study, bits, data))
    key = f"{method} {bits}"
    if key not in study.cache:
        if method == TUNED:
            made: Any = partial(TunedCCAITQ, settings=study.tuned("cca-itq", data, tune, GRID))
        else:
            made = BASELINES[method]
        study.cache[key] = [measure(made(bits, seed=seed).fit(data.train), data) for seed in range(study.seeds)]
    runs: list[dict[str, Any]] = study.cache[key]
    return runs


def _djsrh(study: Study, bits: int, data: PairedDataset) -> list[Training]:
    """DJSRH by the preset that was made for the data, else its default, one a seed."""
    kind = METHODS["djsrh"]
    preset = preset_for(kind, data)
    config = replace(kind.all_presets()[preset], bits=bits)
    name = f"{data.name}-{len(data.train)} djsrh {preset} {bits}bits"
    return study.trainings(name, "djsrh", config, data, _measured, valid_fraction=0.0, patience=0)


PRINTED = "CMIMH, preset paper (as printed)"


def _cells(runs: Sequence[Mapping[str, Any]], measure_name: str, keys: Sequence[str]) -> list[str]:
    return [spread([run[measure_name][key] for run in runs]) for key in keys]


def _percent(values: str) -> list[str]:
    return [f"{float(value) / 100:.4f}" for value in values.split()]


def table_1(study: Study) -> list[Section]:
    """What the critic sees: means, or n pairs of samples."""
    changes = {n: {"critic_input": "samples", "critic_samples": n} for n in SAMPLES}
    _train_together(study, [(BITS, {}), *((BITS, given) for given in changes.values())])
    rows = [["means", *_cells(_runs(study, BITS), MAP1K, CROSS), *_percent(TABLE_1["means"])]]
    for n in SAMPLES:
        runs = _runs(study, BITS, changes[n])
        rows.append([f"{n} pairs of samples", *_cells(runs, MAP1K, CROSS), *_percent(TABLE_1[n])])
    head = ("T sees", "I2T", "T2I", "paper: I2T", "T2I")
    return [Section(f"The critic's input, {MAP1K}, {BITS} bits", head, rows, [_protocol(study)])]


def table_2(study: Study) -> list[Section]:
    """TC, Corr MSE and mAP with and without the independence term."""
    rows = []
    variants: dict[str, dict[str, Any]] = {"with": {}, "without": {"lambda_ind": 0.0}}
    _train_together(study, [(bits, changes) for bits in SHORT for changes in variants.values()])
    for bits in SHORT:
        for name, changes in variants.items():
            runs = _runs(study, bits, changes)
            cells = [c for m in ("TC", "Corr MSE") for c in _cells(runs, m, MODALITIES)]
            rows.append([f"{bits} bits, {name} L_ind", *cells, *_cells(runs, MAP1K, CROSS)])
    for name, values in TABLE_2.items():
        *told, i2t, t2i = values.split()
        rows.append([f"paper, MIR-Flickr25k, {name} L_ind", *told, *_percent(f"{i2t} {t2i}")])
    head = ("", "TC image", "text", "Corr MSE image", "text", f"{MAP1K} I2T", "T2I")
    notes = [
        "TC by a discriminator trained anew on the database's means, so that both rows have one. Corr MSE: the mean "
        "squared entry of H'H/N - I of the database's codes; the paper prints a Frobenius norm and calls it a mean.",
        _protocol(study),
    ]
    return [Section("Independence", head, rows, notes)]


def table_3(study: Study) -> list[Section]:
    """mAP@1000 of the four tasks beside other methods, at 16, 32 and 64 bits.

    Where CMIMH has a preset for the data, the paper's 48 bits and its printed setting stand beside them.
    """
    rows, data = [], _dataset(study)
    of_preset = settings_of(data)[0] != "default"
    every = EVERY if of_preset else LONG
    study.scores([one for bits in every for one in (*_trainings(study, bits), *_djsrh(study, bits, data))])
    methods, notes = [*RIVALS, "djsrh", "cmimh"], [_protocol(study, max(every), djsrh=True)]
    printed: dict[int, list[dict[str, Any]]] = {}
    if of_preset:
        epochs = CMIMH.all_presets()["paper"].epochs
        notes.append(f"{PRINTED} trains on the whole training split for {epochs} epochs, at the paper's lengths.")
        for bits in SHORT:
            try:
                printed[bits] = study.scores(_trainings(study, bits, printed=True))
            except DivergedError as error:  # its features are raw, its loss a sum over them
                notes.append(f"{PRINTED} is not measured at {bits} bits: {error}.")
    methods += [PRINTED] if printed else []
    for task_number, task in enumerate(TASKS):
        for method in methods:
            title = RIVALS.get(method, method.upper() if method != PRINTED else method)
            if method == PRINTED:
                found = printed
            else:
                found = {b: _runs(study, b) if method == "cmimh" else _rival(study, method, b) for b in every}
            cells = [spread([run[MAP1K][task] for run in found[b]]) if b in found else "" for b in every]
            theirs = _percent(TABLE_3[title][task_number]) if title in TABLE_3 else [""] * len(PAPERS)
            rows.append([f"{task.upper()}, {title}", *cells, *theirs])
    head = ("", *(f"{b} bits" for b in every), *(f"paper, MIR-Flickr25k: {b}" for b in PAPERS))
    count = math.prod(map(len, GRID.values()))
    words = (
        "CVH, CMFH, FSH and CCA-ITQ by their defaults, untuned. CCA-ITQ, tuned: scaling, PCA, ridge, variates and "
        f"their weight by labelled mAP of held-out pairs at {TUNED_BITS} bits ({count} settings). Linear heads: signs "
        "of what InfoNCE on the features trains. PDH and ACQ are not built here."
    )
    return [Section(f"{MAP1K} of four tasks", head, rows, [words, *notes])]


def table_4(study: Study) -> list[Section]:
    """The components, on and off."""
    _, base = settings_of(_dataset(study))
    rows = []
    off = {on: {name: 0.0 for name, mark in zip(SWITCHES, on, strict=True) if mark == "0"} for on in ABLATION}
    _train_together(study, [(bits, changes) for changes in off.values() for bits in (32, 48)])
    for on in ABLATION:
        kept = {b: _runs(study, b, off[on]) for b in (32, 48)}
        marks = " ".join("x" if mark == "1" else "-" for mark in on)
        rows.append([marks, *(c for b in kept for c in _cells(kept[b], MAP1K, CROSS)), *_percent(TABLE_4[on])])
    ours = ("32 bits I2T", "T2I", "48 bits I2T", "T2I")
    head = ("I_JS SKL L_ind L_bal", *ours, *(f"paper: {name}" for name in ours))
    weights = ", ".join(f"{name} {getattr(base, name):g}" for name in SWITCHES)
    return [Section(f"Components, {MAP1K}", head, rows, [f"Where on: {weights}.", _protocol(study)])]


def _by_bits(study: Study, title: str, names: Sequence[str], paper: Mapping[str, str], words: str) -> list[Section]:
    rows = []
    _train_together(study, [(bits, {}) for bits in LONG])
    for task in CROSS:
        for method in ("cmimh", "cca-itq", TUNED):
            runs = [_runs(study, b) if method == "cmimh" else _rival(study, method, b) for b in LONG]
            cells = [spread([run[name][task] for run in of_bits]) for name in names for of_bits in runs]
            rows.append([f"{task.upper()}, {RIVALS.get(method, method.upper())}", *cells])
        theirs = _percent(paper[task])
        rows.append([f"{task.upper()}, paper's CMIMH", *theirs, *[""] * (len(names) * len(LONG) - len(theirs))])
    head = ("", *(f"{name}, {b} bits" for name in names for b in LONG))
    return [Section(title, head, rows, [words, _protocol(study, max(LONG))])]


def table_5(study: Study) -> list[Section]:
    """mAP@50."""
    paper = {"i2t": "83.2 86.5 88.2", "t2i": "82.4 83.8 86.2"}
    return _by_bits(study, f"{MAP50} (hits)", [MAP50], paper, "The paper's rows are of MIR-Flickr25k.")


def table_6(study: Study) -> list[Section]:
    """mAP of the whole ranking."""
    paper = {"i2t": "74.15 74.65 75.98", "t2i": "73.87 74.24 75.41"}
    words = "The paper's rows are of MIR-Flickr25k, 5 % of it queries and the rest trained on."
    return _by_bits(study, ALL, [ALL], paper, words)


def table_7(study: Study) -> list[Section]:
    """RecallOne@1 and @10 at 128 bits."""
    runs = _runs(study, 128)
    rows = [[t.upper(), *(c for k in (1, 10) for c in _cells(runs, f"RecallOne@{k}", [t]))] for t in CROSS]
    rows.append(["paper, MS-COCO: I2T and (printed so) I2T", "0.6553 / 0.6982", "0.9435 / 0.9332"])
    rows.append(["paper, MS-COCO, LDR (1024-d): the same", "0.534 / 0.405", "0.913 / 0.887"])
    words = (
        'The share of queries with an item of their labels among the first K. The paper says "ground truth"; as its '
        "database leaves the queries out, that cannot be the query's partner, which is what LDR's own numbers count."
    )
    return [Section("RecallOne@K, 128 bits", ("", "K = 1", "K = 10"), rows, [words, _protocol(study, 128)])]


def table_8(study: Study) -> list[Section]:
    """mAP and Prec@100."""
    paper = {"i2t": "53.66 53.95 55.34", "t2i": "53.01 53.44 55.19"}
    words = (
        "The paper's rows are of NUS-WIDE's SIFT words: its mAP; its Prec@100 at 32 and 64 bits is .6398 and .6568 "
        "(I2T), .6077 and .6137 (T2I)."
    )
    if (database := len(_dataset(study).database)) <= 100:
        words += f" The database holds {database}, so Prec@100 is of the first {database - 1}."
    return _by_bits(study, f"{ALL} and Prec@100", [ALL, "Prec@100"], paper, words)


def table_9(study: Study) -> list[Section]:
    """Training sizes."""
    data = _dataset(study)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    wanted = {}
    for share in SHARES:
        count = int(share * len(data.train))
        part = data if share == 1 else replace(data, train=data.train.select(order[:count].sort().values))
        wanted[f"{count} pairs, CMIMH"] = [_trainings(study, bits, dataset=part) for bits in (16, 32)]
        wanted[f"{count} pairs, DJSRH"] = [_djsrh(study, bits, part) for bits in (16, 32)]
    study.scores([training for lengths in wanted.values() for of_bits in lengths for training in of_bits])
    rows = [
        [title, *(cell for of_bits in lengths for cell in _cells(study.scores(of_bits), MAP1K, CROSS))]
        for title, lengths in wanted.items()
    ]
    rows += [[f"paper, NUS-WIDE, {size}", *_percent(values)] for size, values in TABLE_9.items()]
    head = ("", "16 bits I2T", "T2I", "32 bits I2T", "T2I")
    return [Section(f"Training size, {MAP1K}", head, rows, [_protocol(study, djsrh=True)])]


def _sweep(study: Study, field: str, number: int) -> list[Section]:
    _, base = settings_of(_dataset(study))
    values = WEIGHTS[field]
    changes: list[dict[str, Any]] = [{} if value == getattr(base, field) else {field: value} for value in values]
    _train_together(study, [(BITS, given) for given in changes])
    found = [_runs(study, BITS, given) for given in changes]
    rows = [[f"{value:g}", *_cells(runs, MAP1K, TASKS)] for value, runs in zip(values, found, strict=True)]
    means = {t: np.array([statistics.mean(run[MAP1K][t] for run in runs) for runs in found]) for t in TASKS}
    lines = {task.upper(): (np.arange(len(values)), y) for task, y in means.items()}
    file, title = f"figure-{number}.png", f"{MAP1K} against {field}"
    shown = f"{field}: {', '.join(f'{v:g}' for v in values)}"
    figures.plot_lines(study.out / file, title, lines, shown, MAP1K, looks=[t.upper() for t in TASKS], from_zero=False)
    head = (field, *(t.upper() for t in TASKS))
    return [Section(f"{title}, {BITS} bits", head, rows, [_protocol(study)], [(file, title)])]


def figure_1(study: Study) -> list[Section]:
    """The weight of the mutual information."""
    return _sweep(study, "lambda_mi", 1)


def figure_2(study: Study) -> list[Section]:
    """The histogram of means by the critic's input."""
    sampled = {"critic_input": "samples", "critic_samples": 1}
    _train_together(study, [(BITS, {}), (BITS, sampled)])
    found = {"means": _runs(study, BITS), "samples": _runs(study, BITS, sampled)}
    centres = np.arange(20) / 20 + 0.025
    lines = {f"T sees {name}": (centres, np.array(runs[0]["histogram"]["image"])) for name, runs in found.items()}
    title = "Histogram of the image means"
    figures.plot_lines(study.out / "figure-2.png", title, lines, "mean", "share", looks=list(lines))
    rows = [[name, *_cells(runs, "sure", MODALITIES)] for name, runs in found.items()]
    rows += [["paper: means", "0.22", ""], ["paper: samples", "0.67", ""]]
    head = ("T sees", f"image means within {SURE} of 0 or 1", "text")
    return [Section(title, head, rows, [_protocol(study)], [("figure-2.png", f"{title}, the first seed")])]


def figure_3(study: Study) -> list[Section]:
    """The weight of the symmetrised KL divergence."""
    return _sweep(study, "lambda_skl", 3)


def _curves(study: Study, number: int) -> list[Section]:
    data = _dataset(study)
    trainings = _trainings(study, BITS)
    study.scores(trainings)
    models = [("CMIMH", load_model(trainings[0].folder(study.out)))]
    models += [
        (RIVALS[name], cast(Any, BASELINES[name])(BITS).fit(data.train)) for name in ("cca-itq", "fsh", "random")
    ]
    scores = [score(name, model, data) for name, model in models]
    pages = draw_curves(scores, study.out, data.name)
    page = pages[1] if number == 4 else pages[2]
    ks = [k for k in (1, 10, 50, 100, 200, 500, 1000) if k <= len(data.database)]
    rows = []
    for one in scores:
        for way in CROSS:
            rows.append([f"{one.name}, {way.upper()}", *(f"{p:.3f}" for p in one.curves[way].precision_at(ks))])
    head = ("", *(f"Prec@{k}" for k in ks))
    return [Section(page[1], head, rows if number == 4 else (), ["The first seed's model."], [page])]


def figure_4(study: Study) -> list[Section]:
    """Precision at K."""
    return _curves(study, 4)


def figure_5(study: Study) -> list[Section]:
    """Precision and recall."""
    return _curves(study, 5)


def _protocol(study: Study, longest: int = BITS, *, djsrh: bool = False) -> str:
    """How the runs were trained; of a table with codes up to `longest` bits, and with DJSRH beside."""
    name, config = settings_of(_dataset(study))
    run = asdict(RunConfig(out=Path(), **CMIMH.run_settings(name)))
    data = _dataset(study)
    if run["valid_fraction"] or data.valid is not None:
        how = f"the epoch of {config.epochs} is chosen by how near held-out pairs' codes are, without labels"
    else:
        how = f"all training pairs for {config.epochs} epochs"
    parts = [f"Preset {name} on {data.name}: {how}."]
    if longest >= 64 and config.reconstruction == "mean":
        parts.append("From 64 bits on the reconstruction counts double, first changed so after a look at test.")
    if djsrh:
        preset = preset_for(METHODS["djsrh"], data)
        held_out = f"; CMIMH holds a share of {run['valid_fraction']} out" if run["valid_fraction"] else ""
        how = (
            f"trains on all pairs{held_out}"
            if data.valid is None
            else "keeps the epoch of the best labelled validation"
        )
        parts.append(f"DJSRH, preset {preset}, {how}.")
    return " ".join(parts)


ITEMS = (
    Item("Table 1", "The critic's input", table_1),
    Item("Table 2", "Independence", table_2),
    Item("Table 3", "Four tasks beside other methods", table_3),
    Item("Table 4", "Components", table_4),
    Item("Table 5", "mAP@50", table_5),
    Item("Table 6", "mAP of the whole ranking", table_6),
    Item("Table 7", "RecallOne@K", table_7),
    Item("Table 8", "mAP and Prec@100", table_8),
    Item("Table 9", "Training size", table_9),
    Item("Figure 1", "The weight of the mutual information", figure_1),
    Item("Figure 2", "The histogram of means", figure_2),
    Item("Figure 3", "The weight of the symmetrised KL divergence", figure_3),
    Item("Figure 4", "Precision at K", figure_4),
    Item("Figure 5", "Precision and recall", figure_5),
)
NOTE = (
    "mAP@1k and mAP@50 divide by the hits among the first 1000 and 50 (`topk_hits`), mAP(all) by all relevant items; "
    "ties by index (Figures 4 and 5: the mean over their orders). Mean ± standard deviation over seeds. The paper's "
    "numbers are of MIR-Flickr25k, NUS-WIDE and MS-COCO by AlexNet's or VGG's fc7, which are not these data: they show "
    "what to look for (which row is higher), not what to reach. The paper's own Tables II and IV, III and IX disagree "
    "by up to 0.6 points on equal settings, as much as some of its rows lie apart."
)
