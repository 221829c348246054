"""A paper's tables and figures by one call, as far as the data at hand permit: ours beside the paper's.

Each paper is a module here with `ITEMS`, its tables and figures, and
`reproduce(data, out, tables, figures, seeds, quiet)`, which makes those that are asked for and writes one report.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cmr_fast.errors import InputError

PAPERS: Mapping[str, str] = {"acmr": "acmr", "cmimh": "cmimh", "scatter": "scatter"}
"""Of a paper's name the module here."""


def reproduce(
    paper: str,
    data: str,
    out: Path,
    *,
    tables: Sequence[int] = (),
    figures: Sequence[int] = (),
    seeds: int = 3,
    quiet: bool = False,
    jobs: int = 1,
    **options: Any,
) -> None:
    """Make a paper's tables and figures; what is in `out` from an earlier call is not made again.

    Parameters
    ----------
    paper
        One of PAPERS.
    data
        A folder, file or name that `cmr_fast.data` reads.
    out
        The folder of runs and report.
    tables, figures
        Their numbers; none of either: all that the data permit.
    seeds
        How many, from 0.
    quiet
        Print nothing.
    jobs
        Trainings at a time, a process each with one thread; 1: one after the other, with all threads.
    options
        What only that paper's function takes.

    Raises
    ------
    InputError
        For an unknown paper, table or figure, and no seed or job.
    """
    if paper not in PAPERS:
        raise InputError(f"reproduces {', '.join(PAPERS)}, got {paper!r}")
    if seeds < 1:
        raise InputError(f"seeds must be 1 or more, got {seeds}")
    function: Callable[..., None] = import_module(f"{__name__}.{PAPERS[paper]}").reproduce
    function(data, out, tables, figures, seeds, quiet, jobs=jobs, **options)
