"""What a batch in parts (`chunk`) costs: a step of `finetune` in 4 parts against the large batch at once.

    python bench/experiments/gradcache.py --json bench/results/gradcache_cpu.json

EfficientNet-Lite0 beside MiniLM, photos of 128 pixels, one thread. The two steps take turns; seconds are of the CPU,
the median of the rounds. Memory is what a step adds to the resident set at its peak, in a process of its own after a
step on two images. Both steps' gradients are compared first.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.mat_step import batch_of

from cmr_fast.methods.mat import Finetune, FinetuneConfig

MEMORY = """
import re, sys
sys.path.insert(0, {path!r})
import torch
from experiments.gradcache import stepper
torch.set_num_threads(1)
stepper(2, 0)()
step = stepper({count}, {chunk})
def status(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
step()
print(status('VmHWM') - before)
"""


def stepper(count: int, chunk: int):
    """One step without a change of weights; it returns the model."""
    torch.manual_seed(0)
    model = Finetune(FinetuneConfig(batch_size=count, lr=0.0, chunk=chunk))
    model.fit_inputs(batch_of(2))
    model.eval()
    batch, optimizers = batch_of(count), model.optimizers()

    def step() -> Finetune:
        torch.manual_seed(0)
        model.step(batch, optimizers, Tensor.backward, 0.0)
        return model

    return step


def megabytes(count: int, chunk: int) -> float:
    script = MEMORY.format(path=str(Path(__file__).resolve().parent.parent), count=count, chunk=chunk)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, chunks = arguments.batch, (0, arguments.batch // 4)
    steps = {chunk: stepper(count, chunk) for chunk in chunks}
    whole, parts = (dict(steps[chunk]().named_parameters()) for chunk in chunks)
    worst = max(
        float((parts[name].grad - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-12))
        for name, p in whole.items()
        if p.grad is not None and float(p.grad.abs().max()) > 1e-6
    )
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for _ in range(arguments.rounds):
        for chunk in chunks:
            start = time.process_time()
            steps[chunk]()
            seconds[chunk].append(time.process_time() - start)
    del steps, whole, parts
    medians = {chunk: statistics.median(values) for chunk, values in seconds.items()}
    memory = {chunk: megabytes(count, chunk) for chunk in chunks}
    rows = [
        {
            "batch": count, "chunk": chunk, "cpu_seconds": round(medians[chunk], 3),
            "time_ratio": round(medians[chunk] / medians[0], 3), "mb": round(memory[chunk]),
            "memory_ratio": round(memory[chunk] / memory[0], 3),
        }
        for chunk in chunks
    ]  # fmt: skip
    for row in rows:
        print(row)
    print(f"largest difference of a gradient, over its largest entry: {worst:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"gradient_difference": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
