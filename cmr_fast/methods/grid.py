"""Choosing settings by the validation split."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cmr_fast._files import write_aside
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods.loop import train
from cmr_fast.methods.method import Method, RunConfig


@dataclass(frozen=True)
class GridSearch:
    """Every combination tried, and the best by validation mAP."""

    rows: list[dict[str, Any]]
    """One dict per combination: the grid's fields, valid_map, best_epoch, seconds and run (its folder)."""
    best: Any
    """The config of the best row by what the method is chosen by (of most valid_map); the first of equals."""
    path: Path
    """The run folder of that row."""


def grid_search(
    method: str | type[Method],
    config: Any,
    grid: Mapping[str, Sequence[Any]],
    dataset: PairedDataset,
    run: RunConfig,
) -> GridSearch:
    """Train every combination of `grid` (field of the method's config -> values) and pick by the validation score.

    The test splits take no part in the choice: the table holds validation values alone. Writes a run folder per
    combination, grid.csv and grid.md under `run.out`; with run.resume it goes on where it stopped.

    Raises InputError for a field that the config lacks, an empty list of values, or no validation split.
    """
    kind = METHODS[method] if isinstance(method, str) else method
    config = kind.Config() if config is None else config
    known = {f.name for f in fields(config)}
    if unknown := sorted(set(grid) - known):
        raise InputError(f"{kind.name} has no setting {unknown[0]!r} to search over, expected one of {sorted(known)}")
    if empty := [name for name, values in grid.items() if not len(values)]:
        raise InputError(f"the grid of {empty[0]} holds no values, expected at least one")
    if dataset.valid is None and run.valid_fraction == 0:
        raise InputError("choosing settings needs a validation split: valid_fraction above 0, got 0")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    tried = [replace(config, **chosen) for chosen in combinations]
    folder = Path(run.out)
    rows: list[dict[str, Any]] = []
    for chosen, candidate in zip(combinations, tried, strict=True):
        name = "_".join(f"{field}={value}" for field, value in chosen.items()) or "default"
        done = train(kind, candidate, dataset, replace(run, out=folder / name))
        by = done.model.monitor[-1]
        outcome = {key: done.results[key] for key in ("valid_map", by, "best_epoch", "train_seconds")}
        rows.append(chosen | outcome | {"run": name})
    best = max(range(len(rows)), key=lambda row: rows[row][by])
    _write_tables(folder, rows, best)
    return GridSearch(rows, tried[best], folder / rows[best]["run"])


def _write_tables(folder: Path, rows: list[dict[str, Any]], best: int) -> None:
    columns = list(rows[0])
    with write_aside(folder / "grid.csv") as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    shown[best] = [f"**{value}**" for value in shown[best]]
    lines = [columns, ["---"] * len(columns), *shown]
    with write_aside(folder / "grid.md") as aside:
        aside.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
