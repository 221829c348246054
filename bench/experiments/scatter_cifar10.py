"""Four ways to train a small classifier on CIFAR-10 and what attacks leave of each: trains one, resumable.

    python bench/experiments/scatter_cifar10.py DATA OUT small [--epochs 15] [--threads 1]

The runs are ordinary run folders; `cmr-fast report OUT/* --surrogate OUT/small-plain-seed1 --out report` measures them.
DATA is CIFAR-10's python version. Batch size and smoothing sweeps: `--batch-size`, `--smoothing` and `--train`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from cmr_fast.data import load_images
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.methods.scatter import Scatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("preset", choices=[name for name in Scatter.presets if name.startswith("small")])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, help="training images, all unless given")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--smoothing", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    config, name = replace(Scatter.presets[given.preset], epochs=given.epochs), given.preset
    for field in ("batch_size", "smoothing"):
        if (value := getattr(given, field)) is not None:
            config, name = replace(config, **{field: value}), f"{name}-{field}{value}"
    data = load_images(given.data, train=given.train)
    run = RunConfig(
        out=given.out / f"{name}-seed{given.seed}", seed=given.seed, precision="bf16-mixed", resume=True,
        valid_fraction=0.02, patience=0, threads=given.threads,
    )  # fmt: skip
    print(train(Scatter, config, data, run).results)


if __name__ == "__main__":
    main()
