"""`cmr-fast reproduce`: a paper's tables and figures, ours beside the paper's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from cmr_fast.cli.common import check_folder, check_least, refuse_flags
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run a paper's tables, ablations, sweeps and figures, as far as the data permit, into one report.

    What was stopped goes on with the same command; a finished run is not made again.

    Example:  cmr-fast reproduce acmr --data wikipedia --table 5 --seeds 3

    Example:  cmr-fast reproduce scatter --data PATH/cifar-10-batches-py --scale tiny
    """

    paper: Positional[Literal["acmr", "cmimh", "scatter"]]
    """Whose. Of scatter what its rebuttal has, in its order: Table 1 black box with two surrogates, 2 white box with
    restarts, 3 local search, 4 batch size, 5 label smoothing, Figure 1 loss against step from 20 random starts."""
    data: str
    """A folder or file, or a name under $CMR_FAST_DATA."""
    table: tuple[int, ...] = ()
    """Only these tables of the paper. None, and no --figure: all that the data permit."""
    figure: tuple[int, ...] = ()
    """Only these figures."""
    seeds: int | None = None
    """How many, from 0: the tables give their mean and standard deviation. None: 3, of scatter 1."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    """Of scatter. tiny: WRN-10-1, 600 training images, minutes, which show that everything runs and nothing else;
    small: WRN-10-1, 12 epochs of 10,000 images, for a CPU; paper: WRN-28-10, 200 epochs, for a GPU."""
    jobs: int = 1
    """Trainings at a time, a process each with one thread: as many as cores at most. 1: one after the other, with all
    threads."""
    out: Path | None = None
    """The folder of runs and report. None: runs/reproduce-PAPER."""
    quiet: bool = False
    """Print nothing."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.reports.reproduce import reproduce

        check_least(seeds=(self.seeds, 1), jobs=(self.jobs, 1))
        seeds, options = 3, dict[str, Any](jobs=self.jobs)
        if self.paper == "scatter":
            seeds, options = 1, options | {"scale": self.scale}
        else:
            refuse_flags({"scale": self.scale != "tiny"}, "is for scatter")
        out = Path(f"runs/reproduce-{self.paper}") if self.out is None else self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file, expected a folder to write")
        check_folder(out)
        try:
            reproduce(
                self.paper, self.data, out, tables=self.table, figures=self.figure, seeds=self.seeds or seeds,
                quiet=self.quiet, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("go on with the same command: what is finished is kept") from None
