"""Margin loss over all triplets, forward and backward, d = 200, 10 classes, one thread.

Against pytorch-metric-learning's TripletMarginLoss, and against plain torch with sort and prefix sums. The limit is
that of the products alone, by torch on the same thread: distances and gradient, 2 B^2 d operations each.
`python bench/benchmarks/triplet.py` prints what either takes in memory above its inputs;
`bench/results/triplet_memory.json` is its `--json`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cmr_fast.losses import TripletMarginLoss

try:
    from .common import Comparison, cost
except ImportError:  # started as a program
    from common import Comparison, cost

WIDTH, CLASSES, MARGIN = 200, 10, 0.05


def problem(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, WIDTH, generator=generator)
    return x.requires_grad_(), torch.randint(0, CLASSES, (size,), generator=generator)


def sort_and_prefix_sums(x: Tensor, labels: Tensor) -> Tensor:
    """Plain torch, and its autograd: AvgNonZeroReducer's mean over all triplets of unit vectors."""
    x = torch.nn.functional.normalize(x)
    d = torch.cdist(x, x)
    alike = labels[:, None] == labels
    positive = alike & ~torch.eye(len(x), dtype=torch.bool)
    nearest = d.masked_fill(alike, float("inf")).sort(1).values
    count = torch.searchsorted(nearest.detach(), d.detach() + MARGIN)
    sums = torch.nn.functional.pad(nearest.masked_fill(nearest == float("inf"), 0).cumsum(1), (1, 0))
    hinges = (count * (d + MARGIN) - sums.gather(1, count)).masked_fill(~positive, 0)
    return hinges.sum() / count.masked_fill(~positive, 0).sum().clamp(min=1)


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "ours":
        return TripletMarginLoss(MARGIN)
    if name == "pytorch-metric-learning":
        from pytorch_metric_learning.losses import TripletMarginLoss as Theirs

        return Theirs(MARGIN)
    return sort_and_prefix_sums


def train(name: str, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x.grad = None
    loss = loss_of(name)(x, labels)
    loss.backward()
    return loss.detach(), x.grad


def products(size: int) -> float:
    """G operations a second of the two products that no scheme saves."""
    x, _ = problem(size)
    x = x.detach()
    e, out, gradient = *torch.empty(2, size, size), torch.empty(size, WIDTH)
    e.normal_()
    start = time.perf_counter()
    torch.mm(x, x.T, out=out)
    torch.mm(e, x, out=gradient)
    return work(size) / (time.perf_counter() - start)


def work(size: int) -> float:
    return 4 * size * size * WIDTH / 1e9


def comparison(size: int, alternative: str) -> Comparison:
    x, labels = problem(size)

    def check() -> None:
        ours, theirs = train("ours", x, labels), train(alternative, x, labels)
        assert abs(ours[0] - theirs[0]) <= 1e-4 * theirs[0], f"loss {ours[0]}, theirs {theirs[0]}"
        apart = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
        assert apart <= 1e-3, f"gradients differ by {apart:.1e}"

    return Comparison(
        name=f"all triplets, B = {size}, d = {WIDTH}, {CLASSES} classes, forward + backward",
        alternative=alternative,
        ours=lambda: train("ours", x, labels),
        theirs=lambda: train(alternative, x, labels),
        check=check,
        work=work(size),
        unit="G operations",
        limit=lambda: products(size),
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    plain, pml = "plain torch, sort + prefix sums", "pytorch-metric-learning"
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        pml = plain
    if quick:
        return [comparison(256, pml)]
    rows = [comparison(size, pml) for size in (256, 512, 1024)] if pml != plain else []
    return [*rows, *(comparison(size, plain) for size in (256, 512, 1024, 2048, 4096))]


MEMORY = """
import re, sys
sys.path[:0] = {path!r}
import torch
from triplet import problem, train
torch.set_num_threads(1)
train({name!r}, *problem(64))
x, labels = problem({size})
def status(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
train({name!r}, x, labels)
print(status('VmHWM') - before)
"""


def memory(name: str, size: int) -> float:
    """MB of resident memory above the inputs at the peak of one forward and backward pass, in a process of its own."""
    script = MEMORY.format(name=name, size=size, path=[__file__.rsplit("/", 1)[0]])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


class AllTriplets:
    """Lower is better: seconds, memory, and our time as a share of the alternatives'."""

    version = "1"
    params = ((256, 1024),)
    param_names = ("size",)
    timeout = 600

    def setup(self, size: int) -> None:
        self.problem = problem(size)

    def time_train(self, size: int) -> None:
        train("ours", *self.problem)

    def track_peak_megabytes(self, size: int) -> float:
        return memory("ours", size)

    def track_time_over_torch(self, size: int) -> float:
        return cost(lambda: comparison(size, "plain torch, sort + prefix sums"))

    track_time_over_torch.unit = "ours / plain torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    print("| B | ours, MB | plain torch | pytorch-metric-learning | ours / pytorch-metric-learning |")
    print("|---|---|---|---|---|")
    for size in (256, 512, 1024, 4096):
        names = ("ours", "plain torch", "pytorch-metric-learning")[: 3 if size <= 1024 else 1]
        taken = [memory(name, size) for name in names]
        rows.append({"size": size, **{f"{name}, MB": value for name, value in zip(names, taken, strict=True)}})
        row = [f"{value:,.1f}" for value in taken] + [""] * (3 - len(taken))
        print(f"| {size} | {' | '.join(row)} | {f'{taken[0] / taken[2]:.2%}' if len(taken) == 3 else ''} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
