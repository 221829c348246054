"""R@K between images and their captions: the table, the curve over K, training curves, and what is found first."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast._terminal import show, table_of_numbers
from cmr_fast.errors import InputError
from cmr_fast.methods.evaluation import caption_results
from cmr_fast.reports import figures
from cmr_fast.reports.page import write_page
from cmr_fast.reports.retrieval import read_history
from cmr_fast.retrieval import CaptionRetrieval, evaluate_captions

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedDataset, CaptionedImages

KS = (1, 5, 10)
SHOWN, FIRST = 6, 3
WAYS = {"tr": "TR", "ir": "IR"}
HEAD = [*(f"{name} R@{k}" for name in WAYS.values() for k in KS), "TR median", "IR median", "rsum"]


def row_of(results: Mapping[str, Any]) -> list[str]:
    """R@K in percent, median ranks and rsum of what `caption_results` gives, in the order of HEAD."""
    recalls = [f"{100 * results[way][f'R@{k}']:.1f}" for way in WAYS for k in KS]
    return [*recalls, *(f"{results[way]['median_rank']:g}" for way in WAYS), f"{results['rsum']:.1f}"]


def print_results(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """R@K both ways on standard output, a row a model."""
    rows = ((name, *row_of(result)) for name, result in results.items())
    show(title, table_of_numbers(("percent", *HEAD), rows))


def write_report(
    runs: "Mapping[str, tuple[Path, Any, CaptionedDataset]]", out: Path, *, force: bool = False
) -> dict[str, dict[str, Any]]:
    """Write figures, results.csv, README.md and index.html to a folder.

    Parameters
    ----------
    runs
        By name: run folder, its model, its data set.
    out
        The folder.
    force
        Write over the files of an earlier report.

    Returns
    -------
    dict
        What `caption_results` gives of each.

    Raises
    ------
    InputError
        Where `out` holds a report already (without force) or is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder to write")
    if (out / "README.md").exists() and not force:
        raise InputError(f"{out}: holds a report already; --force writes over it")
    out.mkdir(parents=True, exist_ok=True)
    results, ranks, pages = {}, {}, []
    for number, (name, (path, model, dataset)) in enumerate(runs.items(), 1):
        suffix = "" if len(runs) == 1 else f"-{number}"
        with torch.no_grad():
            image, text = (model.embed(modality, dataset.test) for modality in ("image", "text"))
        ranks[name] = evaluate_captions(image, text, dataset.test.captions()[1])
        results[name] = caption_results(ranks[name])
        pages += _training(path, out, name, suffix)
        file = f"found{suffix}.png"
        _plot_found(out / file, f"{name}: images and the first captions found", dataset.test, image, text)
        pages.append((file, f"Test images of {name} and their first {FIRST} captions; right ones with a +"))
    pages.insert(0, _curves(ranks, out))
    table = [[name, runs[name][2].name, *row_of(result)] for name, result in results.items()]
    note = (
        "TR: an image is found where any of its captions is among the first K of all captions; IR: a caption where its "
        "image is among the first K of all images. In percent; rsum is the sum of the six R@K."
    )
    write_page(out, "Retrieval between images and captions", ["model", "data", *HEAD], table, note, pages)
    return results


def _curves(ranks: Mapping[str, CaptionRetrieval], out: Path) -> tuple[str, str]:
    last = min(min(len(r.text_ranks), len(r.image_ranks)) for r in ranks.values())
    ks = np.unique(np.geomspace(1, min(100, last), 30).astype(int))
    curves = {}
    for name, r in ranks.items():
        shares = r.recall(ks.tolist())
        curves[name] = {way: (ks, np.array(list(shares[key].values()))) for way, key in (("i2t", "tr"), ("t2i", "ir"))}
    title = "Recall at K, test split"
    figures.plot_directions(out / "recall-at-k.png", title, curves, "K", "R@K", looks=list(curves), log_x=True)
    return "recall-at-k.png", title


def _training(path: Path, out: Path, name: str, suffix: str) -> list[tuple[str, str]]:
    history = read_history(path)
    if not history:
        return []
    lines = {
        "loss": {"loss": history["loss"]},
        "validation R@1": {w: history[f"valid_{w}1"] for w in WAYS if f"valid_{w}1" in history},
        "validation rsum": {"rsum": history["valid_rsum"]} if "valid_rsum" in history else {},
    }
    panels = {title: curves for title, curves in lines.items() if curves}
    file = f"losses{suffix}.png"
    figures.plot_losses(out / file, f"Training of {name}", history["epoch"].tolist(), panels)
    return [(file, f"Loss and validation by epoch, {name}")]


def _plot_found(path: Path, title: str, split: "CaptionedImages", image: Tensor, text: Tensor) -> None:
    """The first images of a split, each with the captions that are most similar to it."""
    captions, owner = split.captions()
    chosen = torch.arange(min(SHOWN, len(split)))
    pixels = split.select(chosen).pixels()
    found = (image[chosen] @ text.T).topk(min(FIRST, len(captions)), dim=1).indices
    with figures._panels(path, title, len(chosen), 1, (9.0, 1.5 * len(chosen))) as (_, axes):
        for row, axis in enumerate(axes):
            axis.imshow(pixels[row].permute(1, 2, 0).numpy())
            axis.set_axis_off()
            lines = [f"{'+' if owner[i] == row else '   '} {captions[i]}" for i in found[row].tolist()]
            axis.text(1.1, 0.5, "\n".join(lines), transform=axis.transAxes, va="center", fontsize=8)
