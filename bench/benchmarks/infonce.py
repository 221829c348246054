"""Symmetric InfoNCE, forward and backward, d = 512, one thread, against open_clip's ClipLoss.

The limit is that of four products alone (the similarities, again for the gradient, and a gradient to either side), by
torch on tiles of the same size; ClipLoss computes six. `python bench/benchmarks/infonce.py` prints what either takes
in memory above its inputs, with two threads, and how far its gradients are from float64.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import cmr_fast as cf

try:
    from .common import QUICK, Comparison, cost
except ImportError:  # started as a program
    from common import QUICK, Comparison, cost

WIDTH, SCALE = 512, 50.0
SIZE = 512 if QUICK else 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(size: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit vectors, texts near their images, and the scale of a CLIP that has been training for a while."""
    generator = torch.Generator().manual_seed(size)
    image, noise = (torch.randn(size, WIDTH, generator=generator) for _ in range(2))
    pair = [F.normalize(image), F.normalize(image + 6 * noise)]
    return [x.to(dtype).requires_grad_() for x in pair] + [torch.tensor(SCALE).requires_grad_()]


def train(name: str, image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    for x in (image, text, scale):
        x.grad = None
    if name == "ours":
        loss = cf.info_nce(image, text, scale)
    else:
        from open_clip.loss import ClipLoss

        loss = ClipLoss()(image, text, scale.to(image.dtype))
    loss.backward()
    return [loss.detach(), image.grad, text.grad]


def products(dtype: torch.dtype) -> float:
    """G operations a second of the four products, on tiles of 512 x 1024."""
    x, y, tile = (torch.randn(shape).to(dtype) for shape in ((512, WIDTH), (1024, WIDTH), (512, 1024)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(8):
            x @ y.T, x @ y.T, tile @ y, tile.T @ x
        seconds.append(time.perf_counter() - start)
    return 8 * 4 * 2 * 512 * 1024 * WIDTH / statistics.median(seconds) / 1e9


def work(size: int) -> float:
    return 4 * 2 * size * size * WIDTH / 1e9


def comparison(size: int, kind: str) -> Comparison:
    tensors = problem(size, DTYPES[kind])

    def check() -> None:
        small = problem(256, DTYPES[kind])
        exact = float64(small)
        ours, theirs = (errors(train(name, *small), exact) for name in ("ours", "open_clip"))
        for what, a, b in zip(("loss", "image", "text"), ours, theirs, strict=True):
            assert a <= 2 * b + 1e-6, f"error of {what} {a:.1e}, ClipLoss has {b:.1e}"

    return Comparison(
        name=f"InfoNCE {kind}, N = {size:,}, d = {WIDTH}, forward + backward",
        alternative="open_clip ClipLoss",
        ours=lambda: train("ours", *tensors),
        theirs=lambda: train("open_clip", *tensors),
        check=check,
        work=work(size),
        unit="G operations",
        limit=lambda: products(DTYPES[kind]),
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [comparison(256, kind) for kind in DTYPES]
    return [comparison(size, kind) for size in (4096, 16_384) for kind in DTYPES]


def float64(tensors: list[Tensor]) -> list[Tensor]:
    """Loss and gradients from the features as they are, in float64, a block of rows at a time."""
    image, text, scale = (x.detach().double() for x in tensors)
    rows, columns = torch.empty(len(image)).double(), torch.full((len(text),), -torch.inf).double()
    blocks = [slice(i, i + 1024) for i in range(0, len(image), 1024)]
    for block in blocks:
        z = scale * image[block] @ text.T
        rows[block], columns = z.logsumexp(1), torch.logaddexp(columns, z.logsumexp(0))
    own = scale * (image * text).sum(1)
    loss = ((rows - own).mean() + (columns - own).mean()) / 2
    gradients = [-scale * text / len(image), -scale * image / len(image)]
    for block in blocks:
        z = scale * image[block] @ text.T
        slope = ((z - rows[block, None]).exp() + (z - columns).exp()) * scale / (2 * len(image))
        gradients[0][block] += slope @ text
        gradients[1] += slope.T @ image[block]
    return [loss, *gradients]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


MEMORY = """
import re, sys
sys.path[:0] = {path!r}
import torch
from infonce import DTYPES, problem, train
torch.set_num_threads(2)
train({name!r}, *problem(64, DTYPES[{kind!r}]))
tensors = problem({size}, DTYPES[{kind!r}])
for x in tensors:
    x.grad = torch.zeros_like(x)
def status(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
train({name!r}, *tensors)
print(status('VmHWM') - before)
"""


def memory(name: str, size: int, kind: str) -> float:
    """MB of resident memory above inputs and gradients at the peak of forward and backward, in a process of its own."""
    script = MEMORY.format(name=name, size=size, kind=kind, path=[str(Path(__file__).resolve().parent)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


class InfoNCE:
    """Lower is better: seconds, memory, error, and our time as a share of ClipLoss's."""

    version = "1"
    params = (tuple(DTYPES),)
    param_names = ("dtype",)
    timeout = 600

    def setup(self, kind: str) -> None:
        self.tensors = problem(SIZE, DTYPES[kind])

    def time_train(self, kind: str) -> None:
        train("ours", *self.tensors)

    def track_peak_megabytes(self, kind: str) -> float:
        return memory("ours", 2 * SIZE, kind)

    def track_gradient_error(self, kind: str) -> float:
        return errors(train("ours", *self.tensors), float64(self.tensors))[1]

    def track_time_over_open_clip(self, kind: str) -> float:
        return cost(lambda: comparison(SIZE, kind))

    track_time_over_open_clip.unit = "ours / ClipLoss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16_384, 65_536])
    arguments = parser.parse_args()
    rows = []
    print("| N | dtype | ours, MB | ClipLoss, MB | share | error of the image's gradient, ours | ClipLoss |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for kind in DTYPES:
            row = {"size": size, "dtype": kind, "ours_mb": memory("ours", size, kind)}
            cells = ["", "", "", ""]
            if size <= 16_384:  # 34 GB beyond
                tensors = problem(size, DTYPES[kind])
                exact = float64(tensors)
                row["open_clip_mb"] = memory("open_clip", size, kind)
                row |= {f"{name}_error": errors(train(name, *tensors), exact)[1] for name in ("ours", "open_clip")}
                cells = [
                    f"{row['open_clip_mb']:,.0f}",
                    f"{row['ours_mb'] / row['open_clip_mb']:.1%}",
                    f"{row['ours_error']:.1e}",
                    f"{row['open_clip_error']:.1e}",
                ]
            rows.append(row)
            print(f"| {size:,} | {kind} | {row['ours_mb']:,.0f} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
