"""Every case of `bench/gate/cases.py` on every instruction set of the CPU and on plain torch, one thread.

One that this machine does not have is skipped.
"""

import os
import sys
from pathlib import Path

from cmr_fast.ops import _dispatch

from .common import SkipNotImplemented

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gate.cases import CASES

WAYS = ("avx512_vpopcntdq", "avx512bw", "avx2", "neon", "scalar", "torch")
TIMED = tuple(name for name, (_, costs) in CASES.items() if "time" in costs)


class Ways:
    """Lower is better: seconds a call."""

    version = "1"
    params = (TIMED, WAYS)
    param_names = ("case", "way")
    timeout = 120

    def setup(self, case: str, way: str) -> None:
        native = _dispatch.native()
        if way == "torch":
            os.environ["CMR_FAST_BACKEND"] = "torch"
        elif isinstance(native, ImportError) or way not in native.available_isas():
            raise SkipNotImplemented(f"no {way} here")
        else:
            os.environ["CMR_FAST_ISA"] = way
        self.call = CASES[case][0]()
        self.call()

    def time_case(self, case: str, way: str) -> None:
        self.call()

    def teardown(self, case: str, way: str) -> None:
        for name in ("CMR_FAST_BACKEND", "CMR_FAST_ISA"):
            os.environ.pop(name, None)
