"""`cmr-fast demo`: the whole way on the built-in data, from training to search, evaluation and a report."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmr_fast._commands import record_source
from cmr_fast._terminal import busy, new_table, show
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.data.pairs import PairedDataset

SETTINGS: dict[str, dict[str, Any]] = {"acmr": {"epochs": 30}, "cmimh": {"epochs": 30}}
"""What differs from the papers' settings: fewer epochs, so that the demo is short."""
TSNE_POINTS = 300


def demo(out: Path, *, seed: int = 0, epochs: int | None = None, count: int | None = None) -> Path:
    """Train ACMR and CMIMH on the built-in shapes, index and search the codes, evaluate, report; prints as it goes.

    out      folder that gets a new folder run-1, run-2, … at every call; nothing that is there is touched
    epochs   for both methods, None for SETTINGS; count: scenes in all splits, None for the data set's default
    Returns the new folder. Raises InputError where `out` is a file.
    """
    from cmr_fast.data import load
    from cmr_fast.methods import METHODS
    from cmr_fast.methods.loop import RunConfig, train
    from cmr_fast.report import print_results, write_report

    started = time.perf_counter()
    folder = new_folder(out)
    options: dict[str, Any] = {"seed": seed} | ({} if count is None else {"count": count})
    dataset, raw = load("shapes", **options), load("shapes", form="raw", **options)
    print(
        f"Built-in data: scenes of coloured shapes with captions. {len(dataset.train)} pairs to train on, "
        f"{len(dataset.query)} queries, {len(dataset.database)} in the database, {dataset.num_classes} labels."
    )
    runs = []
    for name, changed in SETTINGS.items():
        config = METHODS[name].Config(**changed)
        if epochs is not None:
            config = replace(config, epochs=epochs)
        print(f"\nTraining {name.upper()}, {config.epochs} epochs", flush=True)
        run = train(name, config, dataset, RunConfig(out=folder / name, seed=seed))
        record_source(run.path, "shapes", options)
        runs.append((run.path, run.model, dataset))
    codes = next(model for _, model, _ in runs if model.output == "code")
    search_in_words(codes, dataset, raw, folder)
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
        for found, distance in zip(ids[query].tolist(), distances[query].tolist(), strict=True):
            if found < 0:
                continue
            shared = (wanted & dataset.database.labels[found]).nonzero()[:, 0].tolist()
            names = ", ".join(dataset.class_names[label] for label in shared)
            picture = max(raw.database.text[found], key=len)
            table.add_row("  →", picture, f"distance {distance}", f"shares {names}" if names else "shares nothing")
        show(f'"{raw.query.text[query][0]}"', table)


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
