"""What the package itself costs: to import, to start the command, to store."""

import resource
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cmr_fast

from .common import QUICK, SkipNotImplemented

PROGRAMS = {
    "import cmr_fast": "import torch, cmr_fast",
    "search": "import torch, cmr_fast; cmr_fast.HammingIndex(64)",
    "losses": "import torch, cmr_fast; cmr_fast.losses.ClipLoss()",
    "methods": "import torch; from cmr_fast.methods.acmr import ACMR",
    "cmr-fast --help": "import sys; sys.argv = ['cmr-fast', '--help']; from cmr_fast.cli import main; main()",
}


def seconds(program: str) -> float:
    """Of a Python that runs it: processor time, which other work on the machine does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Start:
    """Lower is better: the processor time of a process as a share of one that imports torch alone."""

    version = "1"
    params = (tuple(PROGRAMS),)
    param_names = ("program",)
    timeout = 300

    def track_time_over_torch(self, program: str) -> float:
        ratios = []
        for turn in range(1 if QUICK else 5):
            order = (PROGRAMS[program], "import torch")
            times = [seconds(x) for x in (order if turn % 2 else order[::-1])]
            ratios.append(times[0] / times[1] if turn % 2 else times[1] / times[0])
        return statistics.median(ratios)

    track_time_over_torch.unit = "ours / import torch"

    def track_modules(self, program: str) -> float:
        count = "; import sys; sys.stderr.write(str(len(sys.modules)))"
        run = f"try:\n    exec({PROGRAMS[program]!r})\nexcept SystemExit: pass\nexec({count[2:]!r})"
        done = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True)
        return float(done.stderr.splitlines()[-1])

    track_modules.unit = "modules loaded"


class Library:
    """Lower is better: bytes."""

    version = "1"
    params = (("_cpu", "_cuda", "*.py"),)
    param_names = ("part",)

    def track_bytes(self, part: str) -> float:
        if part == "*.py":
            return float(sum(path.stat().st_size for path in Path(cmr_fast.__file__).parent.rglob("*.py")))
        found = find_spec(f"cmr_fast.{part}")
        if found is None or found.origin is None:
            raise SkipNotImplemented(f"cmr_fast.{part} is not built")
        return float(Path(found.origin).stat().st_size)

    track_bytes.unit = "bytes"
