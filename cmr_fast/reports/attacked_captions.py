"""What attacks leave of R@K between images and their captions, with the captions and images that they made.

Adversarial queries search an adversarial gallery, as Co-Attack and SGA measure; beside it stands a clean one, which is
what a search engine has that nobody but the asker attacks.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast._terminal import counting, show, table_of_numbers
from cmr_fast.attacks import saved
from cmr_fast.attacks.multimodal import registry
from cmr_fast.attacks.multimodal.base import DualEncoder
from cmr_fast.attacks.multimodal.recall import WAYS, PairsUnderAttack, Recall, pairs_under_attack
from cmr_fast.attacks.text.candidates import WordModel
from cmr_fast.attacks.text.encoder import FlatTexts, evaluating
from cmr_fast.attacks.victim import widened
from cmr_fast.errors import InputError
from cmr_fast.reports import figures
from cmr_fast.reports.page import write_page
from cmr_fast.retrieval import evaluate_captions

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedImages

KS = (1, 5, 10)
SHOWN = 6
LITTLE = 0.1
"""An undefended model loses more than this share of the queries that were right; less is said to be little."""
_TITLES = {"tr": "TR", "ir": "IR"}
HEAD = (
    "attack", *(f"{_TITLES[way]} R@{k}" for way in WAYS for k in KS),
    *(f"{what} {_TITLES[way]}" for what in ("success", "drop") for way in WAYS),
)  # fmt: skip


SAVED_HEAD = ("attack", "file", "decoder", "levels", *HEAD[1 : 1 + len(WAYS) * len(KS)], "success TR", "success IR")


@dataclass(frozen=True)
class SavedImages:
    """What is left of an attack in its files, read by one decoder.

    Attributes
    ----------
    attack, kind, decoder
        Which files, read by what; of "clean" what the file format alone does.
    levels
        The largest distance of a pixel from the clean one, of 255.
    recall, success
        {"tr", "ir"} -> {K: share}: R@K among the attack's captions, and of the queries that were right the share that
        is wrong.
    """

    attack: str
    kind: saved.Format
    decoder: saved.Decoder
    levels: int
    recall: Recall
    success: Recall


@dataclass(frozen=True)
class AttackedCaptions:
    """One model under attacks.

    Attributes
    ----------
    adversarial, clean
        R@K and rates by attack, with the other side's items attacked too and as they were.
    images, texts
        What the attacks made, by name, "clean" first: the first SHOWN images (float 0 to 1), and all captions.
    owner
        int64 (M,), the image of each caption.
    changed
        {attack: share of the captions that are other ones now}.
    saved
        What is left of each attack in files, where they were asked for.
    """

    adversarial: PairsUnderAttack
    clean: PairsUnderAttack
    images: dict[str, Tensor] = field(repr=False)
    texts: dict[str, list[str]] = field(repr=False)
    owner: Tensor = field(repr=False)
    changed: dict[str, float]
    saved: list[SavedImages] = field(default_factory=list)


def examine(
    victim: DualEncoder, split: "CaptionedImages", attacks: Sequence[str], *, mlm: WordModel | None = None,
    eps: float = 2 / 255, seed: int = 0, dtype: torch.dtype | None = None, batch: int = 32, save: Path | None = None,
) -> AttackedCaptions:  # fmt: skip
    """Attack the images of a split and all of their captions by each named attack, and rank what comes out.

    Parameters
    ----------
    victim
        A dual encoder.
    split
        Images with their captions: the queries and the galleries.
    attacks
        Names of `attacks.multimodal.registry`.
    mlm
        A masked language model, for attacks that change words.
    eps, seed, dtype
        As of `registry.make`.
    batch
        Images that are read and attacked at a time.
    save
        A folder for the images, NAME/png and NAME/jpeg of each attack and of the clean ones, and captions.csv; they
        are read again and measured, `AttackedCaptions.saved`.

    Raises
    ------
    InputError
        Without an attack, for unknown names, and where a masked language model is missing.
    """
    return examine_read_by(
        [victim], victim, split, attacks, mlm=mlm, eps=eps, seed=seed, dtype=dtype, batch=batch, save=save
    )[0]


def examine_read_by(
    readers: Sequence[DualEncoder], victim: DualEncoder, split: "CaptionedImages", attacks: Sequence[str], *,
    mlm: WordModel | None = None, eps: float = 2 / 255, seed: int = 0, dtype: torch.dtype | None = None,
    batch: int = 32, save: Path | None = None,
) -> list[AttackedCaptions]:  # fmt: skip
    """As `examine`, for models that read the images of attacks that were made against `victim`.

    Parameters
    ----------
    readers
        Dual encoders with the victim's captions: what each makes of the images, clean and attacked, is measured.
    victim, split, attacks, mlm, eps, seed, dtype, batch
        As of `examine`.
    save
        As of `examine`; the files are measured by the first reader.

    Returns
    -------
    list of AttackedCaptions
        One a reader.

    Raises
    ------
    InputError
        As of `examine`.
    """
    names = [name for name in dict.fromkeys(attacks) if name != "clean"]
    if not names:
        raise InputError(f"expected an attack at least, one of {registry.NAMES}")
    texts, owner = split.captions()
    makers = {
        name: registry.make(name, victim, mlm, eps=eps, seed=seed, dtype=dtype, captions=(texts, owner))
        for name in names
    }
    rows = torch.arange(len(split)).split(batch)
    made: dict[str, list[str]] = {"clean": texts} | {name: list(texts) for name in names}
    seen: list[dict[str, list[Tensor]]] = [{name: [] for name in made} for _ in readers]
    shown: dict[str, list[Tensor]] = {name: [] for name in made}
    files: dict[tuple[str, saved.Format], list[Path]] = {}
    with counting(len(rows) * len(names), "attacking images and captions") as advance:
        for part in rows:
            pixels = split.select(part).pixels()
            mine = ((owner >= part[0]) & (owner <= part[-1])).nonzero()[:, 0]
            for name in made:
                images = pixels
                if name != "clean":
                    words = [texts[i] for i in mine.tolist()]
                    images, words = makers[name](pixels, words, owner[mine] - part[0], index=part)
                    for i, word in zip(mine.tolist(), words, strict=True):
                        made[name][i] = word
                    advance(1)
                for reader, parts in zip(readers, seen, strict=True):
                    parts[name].append(_seen(reader, images))
                if part[0] < SHOWN:
                    shown[name].append(images)
                if save is not None:
                    levels = saved.to_uint8(images, pixels, eps)
                    for kind in saved.FORMATS:
                        stems = [_stem(split, int(row)) for row in part]
                        paths = saved.write_images(save / name / kind, levels, stems, kind)
                        files.setdefault((name, kind), []).extend(paths)
    encode = FlatTexts(victim)
    with encode.prepare():
        text = {name: encode(words).cpu() for name, words in made.items()}
    changed = {name: sum(a != b for a, b in zip(made[name], texts, strict=True)) / max(1, len(texts)) for name in names}
    first = {name: torch.cat(parts)[:SHOWN] for name, parts in shown.items()}
    results: list[AttackedCaptions] = []
    for parts in seen:
        image = {name: torch.cat(each) for name, each in parts.items()}
        both = {name: _ranks(image[name], text[name], image[name], text[name], owner) for name in made}
        alone = {name: _ranks(image[name], text[name], image["clean"], text["clean"], owner) for name in made}
        result = AttackedCaptions(
            pairs_under_attack(both, KS), pairs_under_attack(alone, KS), first, made, owner, changed
        )
        if save is not None and not results:
            _write_captions(save / "captions.csv", split, made, owner)
            result.saved.extend(
                _read_again(readers[0], split, name, kind, decoder, paths, text, both["clean"], owner, batch)
                for (name, kind), paths in files.items() for decoder in saved.decoders()
            )  # fmt: skip
        results.append(result)
    return results


def _stem(split: "CaptionedImages", row: int) -> str:
    """The name of an image's file: its number, and its own name where it has one."""
    name = "" if isinstance(split.image, Tensor) else f"-{Path(split.image.name(row)).stem}"
    return f"{row:06d}{name}"


def _write_captions(path: Path, split: "CaptionedImages", texts: Mapping[str, list[str]], owner: Tensor) -> None:
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *texts])
        for row, *words in zip(owner.tolist(), *texts.values(), strict=True):
            writer.writerow([_stem(split, row), *words])


def _read_again(
    victim: DualEncoder, split: "CaptionedImages", name: str, kind: saved.Format, decoder: saved.Decoder,
    paths: Sequence[Path], text: Mapping[str, Tensor], clean: dict[str, np.ndarray], owner: Tensor, batch: int,
) -> SavedImages:  # fmt: skip
    """One attack's files, decoded, among its captions."""
    seen, levels = [], 0
    for part in torch.arange(len(paths)).split(batch):
        images = saved.read_images([paths[int(row)] for row in part], decoder)
        before = (split.select(part).pixels() * 255).round()
        levels = max(levels, int((images - before).abs().max()))
        seen.append(_seen(victim, images.float() / 255))
    image = torch.cat(seen)
    result = pairs_under_attack({"clean": clean, "files": _ranks(image, text[name], image, text[name], owner)}, KS)
    return SavedImages(name, kind, decoder, levels, result.by_attack["files"], result.success["files"])


@torch.no_grad()
def _seen(victim: DualEncoder, images: Tensor) -> Tensor:
    with evaluating(victim):
        return widened(victim.encode_image(images)).cpu()


def _ranks(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, np.ndarray]:
    """Of query images among `texts`, and of query captions among `images`."""
    return {
        "tr": evaluate_captions(image, texts, owner).image_ranks,
        "ir": evaluate_captions(images, text, owner).text_ranks,
    }


def table_of(attacked: AttackedCaptions) -> list[list[str]]:
    """Rows in the order of HEAD, in percent: clean, each attack against both galleries, the worst case of a query."""
    rows = [_row("clean", attacked.adversarial, None)]
    for name in attacked.changed:
        rows.append(_row(name, attacked.adversarial, name))
        rows.append(_row(f"{name}, clean gallery", attacked.clean, name))
    if len(attacked.changed) > 1:
        rows.append(_row("worst case of a query", attacked.adversarial, "worst"))
    return rows


def _row(title: str, result: PairsUnderAttack, name: str | None) -> list[str]:
    recall = result.clean if name is None else result.worst if name == "worst" else result.by_attack[name]
    cells = [f"{100 * recall[way][k]:.1f}" for way in WAYS for k in KS]
    rates = [""] * 4 if name is None else [
        f"{100 * rate[name][way][1]:.1f}" for rate in (result.success, result.drop) for way in WAYS
    ]  # fmt: skip
    return [title, *cells, *rates]


def saved_table_of(attacked: AttackedCaptions) -> list[list[str]]:
    """Rows in the order of SAVED_HEAD, in percent."""
    return [
        [
            row.attack, _file(row), row.decoder, str(row.levels),
            *(f"{100 * row.recall[way][k]:.1f}" for way in WAYS for k in KS),
            *(f"{100 * row.success[way][1]:.1f}" for way in WAYS),
        ]
        for row in attacked.saved
    ]  # fmt: skip


def verdict(attacked: AttackedCaptions) -> list[str]:
    """A line an attack; one that does next to nothing is named, and a model that does not read its captions."""
    lines = []
    for name, share in attacked.changed.items():
        lost = attacked.adversarial.success[name]
        tr, ir = (lost[way][1] for way in WAYS)
        line = f"{name} makes {tr:.0%} of the images and {ir:.0%} of the captions wrong that were right at 1"
        if max(tr, ir) < LITTLE:
            line += ": little. A model trained against it may hold; an undefended one should fall"
        if share and attacked.adversarial.clean["ir"][1] > 0 and _deaf(attacked, name):
            line += f"; it changed {share:.0%} of the captions and no rank: the model does not read them"
        lines.append(line)
    for row in attacked.saved:
        if row.decoder == attacked.saved[0].decoder:
            tr, ir = (row.success[way][1] for way in WAYS)
            lines.append(f"{row.attack} in {_file(row)} files: {tr:.0%} of the images, {ir:.0%} of the captions")
    return lines


def _file(row: SavedImages) -> str:
    return "PNG" if row.kind == "png" else f"JPEG {saved.QUALITY}"


def _deaf(attacked: AttackedCaptions, name: str) -> bool:
    """Whether changed captions are found as the clean ones were, image by image."""
    hits = attacked.clean.hits
    return all(bool((hits[name][way] == hits["clean"][way]).all()) for way in WAYS)


def print_report(attacked: AttackedCaptions, title: str) -> None:
    """The table on standard output, and what it says."""
    show(title, table_of_numbers(("percent", *HEAD[1:]), table_of(attacked)))
    print("success: of the queries right at 1, the share made wrong (SGA); drop: R@1 clean less attacked (Co-Attack)")
    if attacked.saved:
        table = table_of_numbers(("percent", *SAVED_HEAD[1:]), saved_table_of(attacked))
        show("Images written and read again; levels: the largest distance of a pixel from the clean one, of 255", table)
    for line in verdict(attacked):
        print(line)


def write_report(attacked: AttackedCaptions, out: Path, title: str) -> None:
    """README.md, index.html, results.csv, saved.csv, and the figures: R@1, captions and images before and after."""
    out.mkdir(parents=True, exist_ok=True)
    result = attacked.adversarial
    bars = {f"{_TITLES[way]} R@1": {name: recall[way][1] for name, recall in result.rows()} for way in WAYS}
    figures.plot_bars(out / "recall.png", title, bars, "R@1")
    pages = [("recall.png", "R@1 clean and under attack")]
    clean = attacked.images["clean"]
    for name in attacked.changed:
        if not torch.equal(attacked.images[name], clean):
            file = f"images-{name}.png"
            figures.plot_photos(out / file, title, clean, attacked.images[name])
            pages.append((file, f"Images clean, after {name}, and the perturbation times ten"))
    if any(attacked.changed.values()):
        _plot_captions(out / "captions.png", title, attacked)
        pages.append(("captions.png", "A caption of each image, before and after"))
    note = (
        "In percent. TR: an image is found where any of its captions is among the first K; IR: a caption where its "
        "image is. The galleries are the attack's own, of rows that say so clean. Success: of the queries right at 1, "
        "the share made wrong (SGA's rate); drop: R@1 clean less attacked (Co-Attack's)."
    )
    if attacked.saved:
        with write_aside(out / "saved.csv") as aside, aside.open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows([SAVED_HEAD, *saved_table_of(attacked)])
    write_page(out, title, HEAD, table_of(attacked), note, pages, words=verdict(attacked))


def _plot_captions(path: Path, title: str, attacked: AttackedCaptions) -> None:
    clean = attacked.images["clean"]
    first = [int((attacked.owner == row).nonzero()[0]) for row in range(len(clean))]
    shown: Mapping[str, list[str]] = {
        name: words for name, words in attacked.texts.items() if name == "clean" or attacked.changed[name]
    }
    with figures._panels(path, title, len(clean), 1, (9.0, (0.5 + 0.25 * len(shown)) * len(clean))) as (_, axes):
        for row, axis in enumerate(axes):
            axis.imshow(clean[row].permute(1, 2, 0).numpy())
            axis.set_axis_off()
            lines = [f"{name}: {words[first[row]]}" for name, words in shown.items()]
            axis.text(1.1, 0.5, "\n".join(lines), transform=axis.transAxes, va="center", fontsize=8)
