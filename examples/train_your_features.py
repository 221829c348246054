"""Train ACMR on features of your own, measure it, and search with what it learned.

    python examples/train_your_features.py

Needs the extra `train`: pip install "cmr-fast[train]".
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from cmr_fast import data
from cmr_fast.methods.acmr import ACMRConfig
from cmr_fast.methods.loop import RunConfig, evaluate_model, train


def features(count: int, seed: int) -> dict[str, np.ndarray]:
    """What your networks give: image (N, 64) and text (N, 40) of the same things, and class ids (N,)."""
    centres = np.random.default_rng(0).standard_normal((6, 16))
    maps = [np.random.default_rng(width).standard_normal((16, width)) for width in (64, 40)]
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, count)
    shared = centres[labels] + 0.5 * rng.standard_normal((count, 16))
    image, text = (np.maximum(shared @ m, 0).astype(np.float32) for m in maps)
    return {"image": image, "text": text, "labels": labels}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # One .npz with train_, query_ and database_ times image, text and labels; `cmr-fast train --data` takes it too
        parts = {"train": features(400, 1), "query": features(100, 2), "database": features(400, 3)}
        path = Path(folder) / "features.npz"
        np.savez(path, **{f"{part}_{name}": x for part, arrays in parts.items() for name, x in arrays.items()})

        pairs = data.load(str(path))
        run = train("acmr", ACMRConfig(epochs=5, inner_steps=1), pairs, RunConfig(out=f"{folder}/run", seed=0))
        scores = evaluate_model(run.model, pairs, convention="all")
        print({direction: round(result.map, 3) for direction, result in scores.items()})

        # What it learned, on images and texts that it has not seen: the nearest texts of the first image
        with torch.no_grad():
            image = run.model.encode("image", pairs.query.image[:1])
            text = run.model.encode("text", pairs.database.text)
        nearest = torch.nn.functional.cosine_similarity(image, text).topk(3).indices
        print("texts for image 0, class", int(pairs.query.labels[0]), "are of", pairs.database.labels[nearest].tolist())


if __name__ == "__main__":
    main()
