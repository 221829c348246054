"""Instructions of one call of every case of `bench/gate/cases.py`, counted by callgrind: a cost without noise.

On the best instruction set that valgrind knows, AVX2 of x86-64. What a case calls of torch is counted too.
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import cmr_fast

from .common import SkipNotImplemented

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gate import measure
from gate.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
COUNTED = tuple(name for name, (_, costs) in CASES.items() if "instructions" in costs)


def counted(cases: tuple[str, ...] = COUNTED) -> dict[str, int] | str:
    """The counts, or why there are none. A case that has none of its own is missing."""
    if shutil.which("valgrind") is None:
        return "no valgrind on the PATH"
    with TemporaryDirectory() as name:
        folder, installed = Path(name), Path(cmr_fast.__file__).resolve().parents[1]
        counts, broken = measure.instructions((installed,), ROOT, list(cases), folder, measure.shim(folder))
    for case, why in broken.items():
        print(f"{case}: {why}", file=sys.stderr)
    return {case: count for case, (count,) in counts.items()}


class Instructions:
    """Lower is better."""

    version = "1"
    params = (COUNTED,)
    param_names = ("case",)
    timeout = 1200

    def setup_cache(self) -> dict[str, int] | str:
        return counted()

    def setup(self, found: dict[str, int] | str, case: str) -> None:
        if isinstance(found, str):
            raise SkipNotImplemented(found)

    def track_instructions(self, found: dict[str, int], case: str) -> float:
        return float(found[case])

    track_instructions.unit = "instructions"
