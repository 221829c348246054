"""`cmr-fast dedup`: which packed codes to keep of those that are near-duplicates, over files larger than memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from cmr_fast._terminal import counting
from cmr_fast.cli.codes import open_codes
from cmr_fast.cli.common import check_least, check_output, naming, write_arrays
from cmr_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Write the rows of packed codes (uint8 .npy, as `encode` writes them) that stay when near-duplicates go.

    Codes that a chain of pairs within the radius joins are one group, of which one row stays. A run that was killed
    goes on where it was when the same command is given again.

    Example:  cmr-fast dedup codes.npy --radius 2 --out keep.npy
    """

    codes: Positional[Path]
    """.npy file, uint8 (N, bytes), mapped into memory and not read as a whole, or another that `index` takes."""
    radius: int
    """Hamming distance up to which two codes are near-duplicates; 0: equal codes only."""
    out: Path
    """.npy file to write: int64, the rows to keep, rising; rows and not ids, where the codes have ids. PATH.state
    beside it says until the end how far a run has come."""
    groups: Path | None = None
    """Another .npy file to write: int64 (N,), the group of each row, numbered in the order of their first rows."""
    keep: Literal["first", "last"] = "first"
    """Which row of a group stays."""
    threads: int | None = None
    """CPU threads. None: all that this process may use."""
    force: bool = False
    """Overwrite the output files."""

    def __call__(self) -> None:
        """Run the command."""
        import numpy as np

        from cmr_fast.retrieval.duplicates import near_duplicates

        check_least(radius=(self.radius, 0), threads=(self.threads, 1))
        outputs = [path for path in (self.out, self.groups) if path is not None]
        for path in outputs:
            if path.suffix != ".npy":
                raise InputError(f"{path}: expected a name in .npy, got {path.suffix!r}")
            check_output(path, self.force, self.codes)
        if self.groups is not None and self.groups.resolve() == self.out.resolve():
            raise InputError(f"{self.groups}: is what --out names, expected another file for --groups")
        source = open_codes(self.codes, None)
        codes = source if isinstance(source, np.ndarray) else source.codes
        state = self.out.with_name(f"{self.out.name}.state")
        try:
            with naming(codes=self.codes), counting(len(codes), "comparing") as progress:
                found = near_duplicates(
                    codes, self.radius, self.keep, threads=self.threads, progress=progress, state=state
                )
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("the same command goes on where this one was, to half a minute") from error
        write_arrays(dict(zip(outputs, (found.kept, found.groups), strict=False)))
        state.unlink(missing_ok=True)
        print(
            f"{self.out}: {len(found.kept)} of {len(codes)} rows stay, {len(codes) - len(found.kept)} go: pairs within "
            f"{self.radius} bits join each to one that stays"
        )
