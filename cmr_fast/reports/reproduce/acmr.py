"""ACMR: Tables 2, 3 and 5 and Figures 3 to 6, on Wikipedia or on what the user has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmr_fast.data import load
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.methods.acmr import ACMR, ACMRConfig
from cmr_fast.reports.reproduce.common import Item, Section, Study, changed, chosen, make, spread

CONVENTIONS = ("all", "topk_hits@50")
WAYS = ("i2t", "t2i", "average")
HEAD = ("", "mAP(all) I2T", "T2I", "average", "mAP@50 hits I2T", "T2I", "average")
PAPER_5 = {  # Wikipedia
    "paper: imi only": (0.352, 0.430, 0.391),
    "paper: imd only": (0.425, 0.413, 0.419),
    "paper: full": (0.509, 0.431, 0.470),
}


def settings_of(dataset: PairedDataset) -> tuple[str, ACMRConfig]:
    """The preset that was made for the data set, else the default; its name."""
    name = next((n for n, source in ACMR.preset_data.items() if dataset.name.startswith(source)), "default")
    if name == "wikipedia" and dataset.text_dim > 100:
        name = "wikipedia-tfidf"
    config: ACMRConfig = ACMR.all_presets()[name]
    return name, config


def dataset_of(study: Study) -> PairedDataset:
    """The data set, read once."""
    if "dataset" not in study.cache:
        study.cache["dataset"] = load(study.data)
    dataset: PairedDataset = study.cache["dataset"]
    return dataset


def measured(run: Any) -> dict[str, Any]:
    """Of a finished run what the tables need."""
    names = (*CONVENTIONS, "similarity", "modality", "best_epoch", "epochs")
    return {name: run.results[name] for name in names}


def row(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and deviation over seeds, both conventions, both directions."""
    return [name, *(spread([run[c][way] for run in runs]) for c in CONVENTIONS for way in WAYS)]


def table_5(study: Study) -> list[Section]:
    """Terms alone, the full method, none and stronger adversaries; who can tell the modality."""
    dataset = dataset_of(study)
    preset, base = settings_of(dataset)
    variants: dict[str, dict[str, Any]] = {
        "imi only": {"terms": "imi"},
        "imi only, alpha 10, lambda 1": {"terms": "imi", "alpha": 10.0, "triplet_weight": 1.0},
        "imd only": {"terms": "imd"},
        "full": {},
        "full, no adversary": {"adversary": 0.0},
        "full, D's rate x 1": {"classifier_rate": 1.0},
        "full, D's rate x 20": {"classifier_rate": 20.0},
    }
    rows = []
    for name, changes in variants.items():
        config = changed(base, **changes)
        runs = study.runs(f"{preset} {name}", "acmr", config, dataset, measured, **ACMR.run_settings(preset))
        told = [spread([run["modality"][who] for run in runs]) for who in ("classifier_accuracy", "probe_accuracy")]
        rows.append([*row(name, runs), *told])
    rows += [[name, *(f"{v:.3f}" for v in values), "", "", "", "", ""] for name, values in PAPER_5.items()]
    notes = [f"Preset {preset}; what a row changes is in its name."]
    return [
        Section("The terms of the objective, and the adversary", (*HEAD, "D is right", "a fresh probe"), rows, notes)
    ]


ITEMS = (Item("Table 5", "The terms of the objective", table_5),)
NOTE = "mAP(all) divides by all relevant items, mAP@50 hits by those among the first 50. Mean ± deviation over seeds."


def reproduce(data: str, out: Path, tables: Sequence[int], figures: Sequence[int], seeds: int, quiet: bool) -> None:
    """Make ACMR's tables and figures."""
    items = chosen(ITEMS, tables, figures)
    make(Study(data, out, seeds, quiet), "ACMR: the paper's tables and figures", items, NOTE)
