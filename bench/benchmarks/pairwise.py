"""DCMH's likelihood, forward and backward, one thread, against eager torch on the full n x N arrays.

A step of DCMH takes a batch of 128 against 10,000 buffered codes; SSAH's code takes the whole training set against
itself (rows "squared, both"). Labels go in as 24-bit multi-hot rows, as packed bytes for ours and as floats for theirs,
which makes S by a product in every step, as the published code does; one row has S given to both. The limit is that of
the products alone, Theta and a gradient to each side that has one, in tiles that stay in cache.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

import cmr_fast as cf

from .common import Comparison, cost, one_thread

CLASSES, SHARE = 24, 0.15
ROWS, COLUMNS = 256, 512  # tiles of the limit


def problem(n: int, size: int, bits: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(bits)
    f, g = (torch.randn(count, bits, generator=generator) for count in (n, size))
    hot = [torch.rand(count, CLASSES, generator=generator) < SHARE for count in (n, size)]
    return f.requires_grad_(), g, *hot


def eager(f: Tensor, g: Tensor, s: Tensor, squared: bool = False) -> Tensor:
    theta = 0.5 * f @ g.T
    return 0.5 * (s * theta - softplus(theta)).square().sum() if squared else (softplus(theta) - s * theta).sum()


def products(n: int, size: int, bits: int, gradients: int) -> float:
    """M pairs a second of the products that no scheme saves."""
    f, g = torch.randn(n, bits), torch.randn(size, bits)
    out = [torch.zeros(n, bits), torch.zeros(size, bits)][:gradients]
    theta = torch.empty(min(n, ROWS), COLUMNS)
    start = time.perf_counter()
    for i in range(0, n, ROWS):
        for j in range(0, size, COLUMNS):
            left, right = f[i : i + ROWS], g[j : j + COLUMNS]
            tile = theta[: len(left), : len(right)]
            torch.mm(left, right.T, out=tile)
            out[0][i : i + ROWS].addmm_(tile, right)
            if gradients == 2:
                out[1][j : j + COLUMNS].addmm_(tile.T, left)
    return n * size / 1e6 / (time.perf_counter() - start)


def sides(
    n: int, size: int, bits: int, *, squared: bool = False, given: bool = False, both: bool = False
) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Ours and theirs: the loss and its gradients, of f, or of f and g."""
    f, g, mine, theirs = problem(n, size, bits)
    wanted = [f, g.requires_grad_()] if both else [f]
    positive = 0.999 if squared else 1.0
    labels = cf.pack_codes(mine), cf.pack_codes(theirs)
    hot = mine.float(), theirs.float()
    s = positive * (hot[0] @ hot[1].T > 0).float() if given else None
    loss = cf.pairwise_squared if squared else cf.pairwise_nll

    def ours() -> tuple[Tensor, ...]:
        total = loss(f, g, labels, threads=1) if s is None else loss(f, g, s, positive=1.0, threads=1)
        return total.detach(), *torch.autograd.grad(total, wanted)

    def eagerly() -> tuple[Tensor, ...]:
        similar = positive * (hot[0] @ hot[1].T > 0).float() if s is None else s
        total = eager(f, g, similar, squared)
        return total.detach(), *torch.autograd.grad(total, wanted)

    return ours, eagerly


def likelihood(n: int, size: int, bits: int, **options: bool) -> Comparison:
    ours, theirs = sides(n, size, bits, **options)
    said = [name for name in ("squared", "both") if options.get(name)] + (["S given"] if options.get("given") else [])

    def check() -> None:
        for a, b in zip(ours(), theirs(), strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            assert error < 1e-4, f"apart by {error:.1e} of the largest"

    return Comparison(
        name=f"{n:,} x {size:,}, {bits} bits" + "".join(f", {x}" for x in said),
        alternative="eager torch" if options.get("given") else "eager torch, S by a product",
        ours=ours,
        theirs=theirs,
        check=check,
        work=n * size / 1e6,
        unit="M pairs",
        limit=lambda: products(n, size, bits, 2 if options.get("both") else 1),
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [likelihood(16, 500, 16)]
    rows = [likelihood(128, 10_000, bits) for bits in (16, 64)]
    rows += [likelihood(128, 10_000, 16, given=True), likelihood(128, 10_000, 16, squared=True)]
    rows += [likelihood(3000, 3000, bits, both=True) for bits in (16, 64)]
    rows += [likelihood(10_000, 10_000, bits, squared=True, both=True) for bits in (16, 32, 64)]
    return [*rows, likelihood(10_000, 10_000, 64, both=True)]


def peak_megabytes(call: Callable[[], object]) -> float:
    """What a call takes above what is there before, at its highest (Linux)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(what: str) -> int:
        return int(re.search(rf"{what}:\s+(\d+)", status.read_text())[1])

    eager(*(x.detach() for x in problem(4, 4, 4)[:2]), torch.zeros(4, 4))  # wakes the libraries
    clear.write_text("5")
    before = read("VmRSS")
    call()
    return (read("VmHWM") - before) / 1024


class Pairwise:
    """asv: costs, so lower is better."""

    version = "1"
    params = (16, 64)
    param_names = ("bits",)

    def track_time_over_eager(self, bits: int) -> float:
        return cost(lambda: likelihood(128, 10_000, bits), 7)

    def track_megabytes_of_3000_by_3000(self, bits: int) -> float:
        return peak_megabytes(sides(3000, 3000, bits, both=True)[0])


def main() -> None:
    """Memory: `python -m benchmarks.pairwise` in bench/."""
    print("| forward and backward | ours, MB above the inputs | eager torch, MB |\n|---|---|---|")
    with one_thread():
        for n, size, both in ((128, 10_000, False), (3000, 3000, True), (10_000, 10_000, True)):
            ours, theirs = (peak_megabytes(side) for side in sides(n, size, 16, both=both))
            print(f"| {n:,} x {size:,}, 16 bits | {ours:.1f} | {theirs:.0f} |")


if __name__ == "__main__":
    main()
