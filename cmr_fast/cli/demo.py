"""`cmr-fast demo`: the whole way on the built-in data, from training to search, attack, evaluation and a report."""

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmr_fast._terminal import busy, new_table, show
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.data.pairs import PairedDataset

ACMR_SETTINGS: dict[str, Any] = {"epochs": 6, "learning_rate": 3e-4, "similarity": "cosine", "reg": 1.0}
CMIMH_SETTINGS: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 64,
    "hidden": 256,
    "critic_hidden": 128,
    "critic_dim": 64,
    "lr": 0.03,
    "decoder_lr": 0.03,
    "lambda_bal": 1.0,
    "reconstruction": "mean",
    "reconstruction_weight": 20.0,
    "weight_decay": 1e-4,
    "inputs": "standard",
    "straight_through": "means",
    "init": "he",  # with torch's smaller weights, a minute does not get CMIMH off its start
}
"""What differs from the defaults: smaller and faster, for 2000 small scenes and a minute."""
CCA_DIM, CCA_RIDGE = 16, 0.3
TSNE_POINTS = 300
TELLS_ALL = re.compile("picture of|image shows|dark background")
"""The caption of five that names every object of a scene."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole way on built-in data: train ACMR and CMIMH, index, search, attack, evaluate, report. About a minute.

    Example:  cmr-fast demo --out my-demo
    """

    out: Path = Path("cmr-fast-demo")
    """Folder for the demo's results; every run makes its own numbered folder in it."""
    seed: int = 0
    """Seed of the data, the weights and the batches."""

    def __call__(self) -> None:
        """Run the command."""
        demo(self.out, seed=self.seed)


def demo(out: Path, *, seed: int = 0, epochs: int | None = None, count: int | None = None) -> Path:
    """Train ACMR and CMIMH on the built-in shapes, index and search codes, attack, evaluate, report; prints as it goes.

    Parameters
    ----------
    out
        Folder that gets a new folder run-1, run-2, … at every call; nothing that is there is touched.
    seed
        Of the data, the weights and the batches.
    epochs
        For both methods; None: the demo's own.
    count
        Scenes in all splits; None: the data set's default.

    Returns
    -------
    Path
        The new folder.

    Raises
    ------
    InputError
        Where `out` is a file, or `seed` none from 0 to 2^64 - 1.
    """
    from cmr_fast.data import load, save_pairs
    from cmr_fast.methods import METHODS
    from cmr_fast.methods._runfolder import record_source
    from cmr_fast.methods.loop import RunConfig, train
    from cmr_fast.ops._tensors import as_seed
    from cmr_fast.reports.retrieval import print_results, write_report

    as_seed(seed, "--seed")
    started = time.perf_counter()
    folder = new_folder(out)
    options: dict[str, Any] = {"seed": seed} | ({} if count is None else {"count": count})
    dataset, raw = load("shapes", **options), load("shapes", form="raw", **options)
    print(
        f"Built-in data: scenes of coloured shapes with captions. {len(dataset.train)} pairs to train on, "
        f"{len(dataset.query)} queries, {len(dataset.database)} in the database, {dataset.num_classes} labels."
    )
    reduced = by_cca(dataset)
    save_pairs(folder / f"{reduced.name}.npz", reduced)
    plans: tuple[tuple[str, Any, dict[str, Any], PairedDataset, str, dict[str, Any]], ...] = (
        ("acmr", METHODS["acmr"], ACMR_SETTINGS, dataset, "shapes", options),
        ("cmimh", METHODS["cmimh"], CMIMH_SETTINGS, reduced, str(folder / f"{reduced.name}.npz"), {}),
    )
    runs = []
    for name, method, changed, data, source, how in plans:
        config = method.Config(**(changed if epochs is None else changed | {"epochs": epochs}))
        print(f"\nTraining {name.upper()} on {data.name}, {config.epochs} epochs", flush=True)
        run = train(method, config, data, RunConfig(out=folder / name, seed=seed))
        record_source(run.path, source, how)
        runs.append((run.path, run.model, data))
    search_in_words(runs[1][1], reduced, raw, folder)
    attack_queries(runs[0][1], dataset)
    print("\nMeasuring and drawing", flush=True)
    with busy("drawing"):
        scores = write_report(runs, folder / "report", tsne_points=TSNE_POINTS)
    print()
    print_results(
        scores, title="Retrieval on the query split (a random ranking scores high: many scenes share a label)"
    )
    print(f"\nReport: {folder / 'report' / 'index.html'}   ({time.perf_counter() - started:.0f} s in all)")
    print(f"Next:   cmr-fast evaluate {folder / 'acmr'} --convention every --k 50")
    print("        cmr-fast train acmr --data PATH      on your own data; cmr-fast train acmr --help tells how")
    return folder


def by_cca(dataset: "PairedDataset") -> "PairedDataset":
    """The data set with CCA's variates for features, learnt on its training split: CMIMH's inputs.

    In the paper they are 1024 principal components; the data are more there.
    """
    import torch

    from cmr_fast.data import Pairs
    from cmr_fast.methods.baselines import CCA

    cca = CCA(CCA_DIM, CCA_RIDGE).fit(dataset.train)

    def mapped(pairs: Pairs) -> Pairs:
        assert isinstance(pairs.text, torch.Tensor)
        return Pairs(cca.encode("image", pairs.image), cca.encode("text", pairs.text), pairs.labels)

    return replace(
        dataset,
        name=f"{dataset.name}-cca",
        train=mapped(dataset.train),
        query=mapped(dataset.query),
        database=mapped(dataset.database),
    )


def search_in_words(model: Any, dataset: "PairedDataset", raw: "PairedDataset", folder: Path, shown: int = 3) -> None:
    """Index the database images' codes and print what a few captions find; `raw`: the same rows as captions."""
    import torch

    from cmr_fast.methods.evaluation import encode_all
    from cmr_fast.ops import pack_codes
    from cmr_fast.retrieval.index import HammingIndex

    asked = dataset.query.select(torch.arange(min(shown, len(dataset.query)))).text
    assert isinstance(asked, torch.Tensor)
    logits = encode_all(model, "image", dataset.database.image)
    index = HammingIndex(logits.shape[1])
    index.add(pack_codes(logits, threshold=0.0).numpy())
    index.save(folder / "images.cmrx")
    loaded = HammingIndex.load(folder / "images.cmrx")
    queries = pack_codes(encode_all(model, "text", asked), threshold=0.0).numpy()
    distances, ids = loaded.search(queries, 3)
    print(f"\nSearching {loaded.ntotal} images by text, Hamming distance of {loaded.bits} bits ({folder}/images.cmrx)")
    for query in range(len(queries)):
        table = new_table("", "", "", "")
        table.show_header = False
        wanted = dataset.query.labels[query]
        for row, distance in zip(ids[query].tolist(), distances[query].tolist(), strict=True):
            if row < 0:
                continue
            shared = (wanted & dataset.database.labels[row]).nonzero()[:, 0].tolist()
            names = ", ".join(dataset.class_names[label] for label in shared)
            picture = next(caption for caption in raw.database.text[row] if TELLS_ALL.search(caption))
            table.add_row("  →", picture, f"distance {distance}", f"shares {names}" if names else "shares nothing")
        show(f'"{raw.query.text[query][0]}"', table)


def attack_queries(model: Any, dataset: "PairedDataset", count: int = 100, share: float = 0.02) -> None:
    """Print what attacks on the features of image queries leave of R@K; `share` of the features' range is the ball."""
    import torch

    from cmr_fast.attacks.ranking import recall_under_attack
    from cmr_fast.ops.labels import share_label
    from cmr_fast.reports import recall

    rows = torch.arange(min(count, len(dataset.query)))
    relevant = share_label(dataset.query.labels[rows], dataset.database.labels)
    rows = rows[relevant.any(dim=1)]
    encoder, gallery = recall.queried(model, dataset.database.text)
    x, bounds = dataset.query.image, (float(dataset.query.image.min()), float(dataset.query.image.max()))
    with busy("attacking"):
        result = recall_under_attack(
            encoder, x[rows], gallery, relevant[rows], eps=share * (bounds[1] - bounds[0]), bounds=bounds,
            attacks=("pgd20", "apgd50-dlr"), batch=count, check=False, progress=False,
        )  # fmt: skip
    table = new_table("a relevant text among the first", *(str(k) for k in result.clean))
    for name, left in result.rows():
        table.add_row(name, *(f"{value:.0%}" for value in left.values()))
    print()
    show(
        f"Attacking {len(rows)} image queries of {model.name.upper()}, features within {share:.0%} of their range",
        table,
    )


def new_folder(out: Path) -> Path:
    """The first of out/run-1, out/run-2, … that is not there yet, made."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder for the demo's results")
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = out / f"run-{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
