"""`cmr-fast reproduce`: a paper's tables and figures, ours beside the paper's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from cmr_fast.cli.common import check_folder, check_least
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a paper's tables, ablations, sweeps and figures, as far as the data permit, into one report.

    What was stopped goes on with the same command; a finished run is not made again.

    Example:  cmr-fast reproduce acmr --data wikipedia --table 5 --seeds 3
    """

    paper: Positional[Literal["acmr", "cmimh"]]
    """Whose."""
    data: str
    """A folder or file, or a name under $CMR_FAST_DATA."""
    table: tuple[int, ...] = ()
    """Only these tables of the paper. None, and no --figure: all that the data permit."""
    figure: tuple[int, ...] = ()
    """Only these figures."""
    seeds: int = 3
    """How many, from 0: the tables give their mean and standard deviation."""
    out: Path | None = None
    """The folder of runs and report. None: runs/reproduce-PAPER."""
    quiet: bool = False
    """Print nothing."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.reports.reproduce import reproduce

        check_least(seeds=(self.seeds, 1))
        out = Path(f"runs/reproduce-{self.paper}") if self.out is None else self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file, expected a folder to write")
        check_folder(out)
        reproduce(
            self.paper, self.data, out, tables=self.table, figures=self.figure, seeds=self.seeds, quiet=self.quiet
        )
