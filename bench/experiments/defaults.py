"""ACMR and CMIMH by their defaults, one setting on several data sets: bench/results/defaults.{json,md}.

    python bench/experiments/defaults.py --data digits-halves digits-hog digits-fourier --seeds 0 1 2
    python bench/experiments/defaults.py --data lda tfidf flickr8k --methods cmimh --epochs 25

Digits in two views are scikit-learn's 1,797 (1,300 for training, which the other 497 rank): the left and right half of
each, its pixels beside oriented gradients, its pixels beside Fourier magnitudes. lda and tfidf are Wikipedia's texts
beside SIFT. Wikipedia and Flickr8k are found under $CMR_FAST_DATA. A run that stands in the .json is not made again
without --fresh, so in a clone, whose .json holds them all, the command as it stands trains nothing.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmr_fast._files import write_aside
from cmr_fast.data import load
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.methods import METHODS
from cmr_fast.methods.baselines import CCA, CCAITQ, SemanticMatching
from cmr_fast.methods.evaluation import averaged, evaluate_model
from cmr_fast.methods.loop import RunConfig, train

RESULTS = Path(__file__).resolve().parent.parent / "results" / "defaults"
DATA = ("digits-halves", "digits-hog", "digits-fourier", "lda", "tfidf", "flickr8k")
BASELINES = {"CCA, 7 dims": "acmr", "semantic matching": "acmr", "CCA-ITQ, 32 bits": "cmimh"}


def digits(views: str) -> PairedDataset:
    """1,300 pairs for training and as the database, 497 queries."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, count = found.images, len(found.images)
    image = pixels.reshape(count, -1)
    if views == "halves":
        image, text = pixels[:, :, :4].reshape(count, -1), pixels[:, :, 4:].reshape(count, -1)
    elif views == "hog":
        down, across = np.gradient(pixels, axis=(1, 2))
        size, way = np.hypot(across, down), (np.arctan2(down, across) % np.pi / np.pi * 8).astype(int) % 8
        cells = [np.where(way == w, size, 0).reshape(count, 2, 4, 2, 4).sum((2, 4)) for w in range(8)]
        text = np.stack(cells, axis=-1).reshape(count, -1)
    else:
        text = np.abs(np.fft.fft2(pixels))[:, :, :5].reshape(count, -1)
    order = np.random.default_rng(0).permutation(count)

    def split(rows: np.ndarray) -> Pairs:
        sides = (torch.as_tensor(side[rows], dtype=torch.float32) for side in (image, text))
        return Pairs(*sides, torch.as_tensor(found.target[rows]))

    database = split(order[:1300])
    return PairedDataset(f"digits-{views}", database, split(order[1300:]), database)


def read(name: str) -> PairedDataset:
    """A data set by its name here."""
    if name.startswith("digits-"):
        return digits(name.removeprefix("digits-"))
    root = Path(os.environ.get("CMR_FAST_DATA", "."))
    return load(root / "flickr8k") if name == "flickr8k" else load(root / "wikipedia", features=name)


def run(name: str, data: PairedDataset, method: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """One training by the method's default, or one baseline."""
    row: dict[str, Any] = {"data": name, "method": method, "seed": seed}
    if method in BASELINES:
        made: Any = {"CCA": CCA, "sem": SemanticMatching}.get(method[:3]) if "ITQ" not in method else CCAITQ
        model = made(32, seed=seed) if "ITQ" in method else made(min(7, data.text_dim)) if made is CCA else made()
        return row | averaged(evaluate_model(model.fit(data.train), data))
    config = METHODS[method].Config()
    if epochs is not None:
        config = replace(config, epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig(out=Path(folder) / "run", seed=seed, device="cpu", quiet=True, checkpoint_seconds=1e9)
        done = train(method, config, data, settings).results
    more = {key: done[key] for key in ("similarity", "epochs", "best_epoch") if key in done}
    return row | done["all"] | more | {"of": config.epochs}


def markdown(runs: list[dict[str, Any]]) -> str:
    """A table a data set."""
    lines = [
        "# One setting on several data sets", "",
        "`python bench/experiments/defaults.py --fresh`, one CPU thread. mAP(all), mean ± standard deviation over "
        "seeds. Every training holds a tenth of the training pairs out (Flickr8k has its own validation split) and "
        "looks at the queries once.", "",
        "| data | method | I2T | T2I | average | seeds | epochs |", "|---|---|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for name in DATA:
        for method in ("CCA, 7 dims", "semantic matching", "acmr", "CCA-ITQ, 32 bits", "cmimh"):
            group = [r for r in runs if (r["data"], r["method"]) == (name, method)]
            if group:
                ways = ("i2t", "t2i", "average")
                cells = [_spread([r[way] for r in group]) if way in group[0] else "" for way in ways]
                long = [f"{r['best_epoch']} of {r['epochs']} (at most {r['of']})" for r in group if "of" in r]
                by = " ".join(dict.fromkeys(r["similarity"] for r in group if "similarity" in r))
                title = method.upper() + (f", by {by}" if by else "") if method in METHODS else method
                lines.append(f"| {name} | {title} | {' | '.join(cells)} | {len(group)} | {'; '.join(long)} |")
    return "\n".join([*lines, ""])


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=("acmr", "cmimh"), default=["acmr", "cmimh"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=None, help="at most, where the default's take too long")
    parser.add_argument("--fresh", action="store_true", help="make the runs asked for again, though the .json has them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="without a suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = options.out.with_suffix(".json")
    runs: list[dict[str, Any]] = json.loads(store.read_text()) if store.exists() else []
    for name in options.data:
        data = None
        for method in options.methods:
            for seed in options.seeds:
                beside = [b for b, of in BASELINES.items() if of == method and (seed == options.seeds[0] or "ITQ" in b)]
                for what in (*beside, method):
                    others = [r for r in runs if (r["data"], r["method"], r["seed"]) != (name, what, seed)]
                    if len(others) < len(runs) and not options.fresh:
                        continue
                    data, runs = data or read(name), others
                    runs.append(run(name, data, what, seed, options.epochs))
                    print(runs[-1], flush=True)
                    for suffix, text in ((".json", json.dumps(runs, indent=1) + "\n"), (".md", markdown(runs))):
                        with write_aside(options.out.with_suffix(suffix)) as aside:
                            aside.write_text(text)


if __name__ == "__main__":
    main()
