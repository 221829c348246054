"""Triplet margin losses on a GPU, forward and backward, d = 200, 10 classes: the CUDA kernels against the same sweep in
torch: `python bench/benchmarks/triplet_cuda.py [--json FILE]`. Device times, and torch's peak memory above the inputs.
"""

import torch
from torch import Tensor

from cmr_fast.ops import triplet_margin

try:
    from .gpu import Report, in_turn, median, peak_bytes, ratio
except ImportError:  # started as a program
    from gpu import Report, in_turn, median, peak_bytes, ratio

WIDTH, CLASSES, MARGIN = 200, 10, 0.05
BACKENDS = ("cuda", "torch")


def train(backend: str, mining: str, x: Tensor, labels: Tensor) -> list[Tensor]:
    loss = triplet_margin(x, labels, MARGIN, mining=mining, distance="cosine", backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, x)]


def case(report: Report, mining: str, size: int) -> dict[str, object]:
    x = torch.randn(size, WIDTH, device="cuda").requires_grad_()
    labels = torch.randint(0, CLASSES, (size,), device="cuda")
    calls = {name: lambda name=name: train(name, mining, x, labels) for name in BACKENDS}
    found, want = calls["cuda"](), calls["torch"]()
    for what, a, b in zip(("loss", "gradient"), found, want, strict=True):
        apart = float((a - b).norm() / b.norm())
        assert apart <= 1e-3, f"{what} differs from torch's by {apart:.1e}"
    memory = {f"{name}_MB": peak_bytes(calls[name]) / 1e6 for name in BACKENDS}
    times = in_turn(calls, report.rounds)
    return {f"{name}_s": median(times, name) for name in BACKENDS} | memory | {
        "cuda_over_torch": ratio(times, "torch", "cuda")
    }  # fmt: skip


def main() -> int:
    report = Report(__doc__, "cuda")
    for size in (256,) if report.quick else (1024, 4096):
        for mining in ("all", "semihard", "hard"):
            name = f"triplets, {mining}, B = {size:,}"
            report.row(name, lambda mining=mining, size=size: case(report, mining, size))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
