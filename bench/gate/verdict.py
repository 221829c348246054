"""What two sets of samples say."""

import math
import statistics
from dataclasses import dataclass, field

from asv._stats import is_different
from asv_runner.statistics import compute_stats

# B / A from which a cost has changed: above what a busy machine does to one commit beside itself.
FACTORS = {"time": 1.15, "memory": 1.3, "instructions": 1.1}
UNITS = {"time": "ms", "memory": "MB", "instructions": "M"}
LEAST = {"memory": 0.5}  # MB that matter
FAILS = ("WORSE", "BROKEN", "DIFFERENT", "GONE", "TOO FEW")


@dataclass(frozen=True)
class Row:
    """A case's cost on both commits. `word` is same, better, new, accepted or one of FAILS."""

    case: str
    cost: str
    word: str
    a: float = math.nan
    b: float = math.nan
    ratio: float = math.nan
    low: float = math.nan  # 99 % interval of the ratio
    high: float = math.nan
    said: str = ""
    samples: int = 0

    @property
    def measured(self) -> bool:
        return self.word in ("same", "better", "WORSE", "accepted") and math.isfinite(self.ratio)

    @property
    def failed(self) -> bool:
        return self.word in FAILS


@dataclass
class Samples:
    """Of one cost of one case: a quad is A, B, B, A."""

    quads: list[tuple[float, float, float, float]] = field(default_factory=list)


def judged(case: str, cost: str, samples: Samples, least: int, factor: float | None = None) -> Row:
    """The row. `least` is how many quads there have to be, `factor` takes the place of the cost's own."""
    factor = factor or FACTORS[cost]
    quads = samples.quads
    if len(quads) < least:
        return Row(case, cost, "TOO FEW", said=f"{len(quads)} of {least} quads", samples=len(quads))
    if not all(math.isfinite(x) and x > 0 for quad in quads for x in quad):
        return Row(case, cost, "BROKEN", said="a sample is no positive number", samples=len(quads))
    ratios = [(b1 + b2) / (a1 + a2) for a1, b1, b2, a2 in quads]
    a, b = (statistics.median(x for quad in quads for x in (quad[i], quad[j])) for i, j in ((0, 3), (1, 2)))
    ratio, about = compute_stats(ratios, 1)
    low, high = (about["ci_99_a"], about["ci_99_b"]) if len(ratios) > 1 else (ratio, ratio)
    worse = ratio > factor and b - a > LEAST.get(cost, 0)
    better = ratio < 1 / factor and a - b > LEAST.get(cost, 0)
    sure = certain(quads) if cost == "time" else True
    word = "same" if not sure else "WORSE" if worse else "better" if better else "same"
    return Row(case, cost, word, a, b, ratio, low, high, samples=len(quads))


def certain(quads: list[tuple[float, float, float, float]]) -> bool:
    """asv's test, which is Mann and Whitney's, on samples as shares of their quad: what drifts falls out."""
    a, b = [], []
    for quad in quads:
        mean = sum(quad) / 4
        a += [quad[0] / mean, quad[3] / mean]
        b += [quad[1] / mean, quad[2] / mean]
    return bool(is_different(a, b, compute_stats(a, 1)[1], compute_stats(b, 1)[1]))


def shown(cost: str, value: float) -> str:
    return f"{value * {'time': 1e3, 'memory': 1, 'instructions': 1e-6}[cost]:,.3g} {UNITS[cost]}"


def line(row: Row) -> str:
    if not math.isfinite(row.ratio):
        return f"| {row.case} | {row.cost} | | | | {row.word}{': ' if row.said else ''}{row.said} |"
    between = f"{row.ratio:.3f}" + (f" ({row.low:.3f} to {row.high:.3f})" if row.samples > 1 else "")
    return f"| {row.case} | {row.cost} | {shown(row.cost, row.a)} | {shown(row.cost, row.b)} | {between} | {row.word} |"
