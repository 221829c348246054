"""Train ACMR in one process and on two ranks: the same losses, epoch by epoch.

    python examples/train_on_two_ranks.py

Needs the extra `train`: pip install "cmr-fast[train]". On two machines start the same command on both by torchrun:
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m cmr_fast train acmr ...
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = "--data shapes --epochs 3 --inner-steps 1 --device cpu --threads 1 --seed 1 --valid-fraction 0 --quiet"


def losses(out: Path, *flags: str) -> list[float]:
    """The loss of each epoch of a training that is a command of its own."""
    command = [sys.executable, "-m", "cmr_fast", "train", "acmr", *FLAGS.split(), "--out", str(out), *flags]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    with open(out / "metrics.csv", newline="") as file:
        return [float(row["embedding_loss"]) for row in csv.DictReader(file)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        alone = losses(Path(folder) / "one")
        together = losses(Path(folder) / "two", "--devices", "2")
        for epoch, (one, two) in enumerate(zip(alone, together, strict=True), 1):
            print(f"epoch {epoch}: {one:.4f} in one process, {two:.4f} on two ranks")


if __name__ == "__main__":
    main()
