from pathlib import Path

import numpy as np
import pytest

from cmr_fast.cli.main import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `run`, on data.npz."""
    folder = tmp_path_factory.mktemp("outputs")
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 40), ("query", 12), ("database", 20)):
        arrays |= {f"{split}_image": random.random((count, 6)), f"{split}_text": random.random((count, 5))}
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(folder / "data.npz", **arrays)
    small = ["--dim", "8", "--image-hidden", "8", "--text-hidden", "8", "--epochs", "1", "--quiet"]
    assert main(["train", "acmr", "--data", str(folder / "data.npz"), "--out", str(folder / "run"), *small]) == 0
    return folder
