"""What frozen pretrained towers see in images with captions, and pairs of features made of it.

An image's features are what its tower gives before any head (or projection, of CLIP's the embedding itself); a text's
are the mean of its captions' sentence vectors, each of length 1. Captions carry no labels, so these are

nouns    of Flickr8k-24's 24 nouns those that captions 3 and on name; captions 1 and 2 are the text, images without any
         of the nouns are left out
a file   image names and labels, a table; images with the same label are relevant to each other
images   each image a class of its own: of a query its own partner alone is relevant
"""

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmr_fast._files import cache_folder, check_regular, write_aside
from cmr_fast._terminal import counting
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.flickr8k import NOUNS, noun_labels
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.photos import Photos
from cmr_fast.errors import InputError
from cmr_fast.models.clip import TwoTowers
from cmr_fast.models.dual import DualEncoder, by_length

SHARD = 512
"""Images whose features are kept in one file: what a stopped run makes again at most."""
_IMAGES = 64  # that go through a tower at a time
NOUN_RULE, IMAGE_RULE = "nouns", "images"


@torch.no_grad()
def tower_features(dual: DualEncoder, split: CaptionedImages) -> tuple[Tensor, Tensor]:
    """What the towers see, in eval mode; from the user's cache what the same towers saw of the same before.

    Parameters
    ----------
    dual : DualEncoder
        Of two towers: what their heads see; of others the embeddings, of length 1.
    split : CaptionedImages
        N images with M captions.

    Returns
    -------
    image, text : Tensor
        (N, width) and (M, width), the captions image by image, on the CPU, in the towers' type.
    """
    towers = hashlib.blake2b(digest_size=8)
    parts: list[nn.Module] = [dual.image_tower, dual.text_tower] if isinstance(dual, TwoTowers) else [dual]
    for tower in parts:
        for value in tower.state_dict().values():
            _update(towers, value)
    training = dual.training
    dual.eval()
    try:
        with counting(len(split) + sum(map(len, split.text)), "images and captions through the towers") as advance:
            shards = torch.arange(len(split)).split(SHARD)
            seen = [_shard(dual, split.select(rows), towers.copy(), advance) for rows in shards]
    finally:
        dual.train(training)
    return torch.cat([image for image, _ in seen]), torch.cat([text for _, text in seen])


def _shard(
    dual: DualEncoder, split: CaptionedImages, digest: "hashlib.blake2b", advance: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    captions = split.captions()[0]
    digest.update(f"{split.image.key() if isinstance(split.image, Photos) else ''}{captions}".encode())
    if isinstance(split.image, Tensor):
        _update(digest, split.image)
    file = cache_folder() / f"towers-{digest.hexdigest()}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        stored = load_file(file)
        advance(len(split) + len(captions))
        return stored["image"], stored["text"]
    see_image: Callable[[Tensor], Tensor] = dual.encode_image
    see_text: Callable[[Tensor, Tensor], Tensor] = dual.encode_text
    if isinstance(dual, TwoTowers):
        see_image, see_text = dual.image_features, dual.text_features
    where = dual.log_scale

    def seen(ids: Tensor, mask: Tensor) -> Tensor:
        advance(len(ids))
        return see_text(ids, mask)

    images = []
    for rows in torch.arange(len(split)).split(_IMAGES):
        images.append(see_image(split.select(rows).pixels().to(where.device, where.dtype)).cpu())
        advance(len(rows))
    image, text = torch.cat(images), by_length(dual, captions, seen).cpu()
    with suppress(OSError, SafetensorError), write_aside(file) as aside:  # a full disk costs time, not the data
        save_file({"image": image.contiguous(), "text": text.contiguous()}, aside)
    return image, text


def _update(digest: "hashlib.blake2b", values: Tensor) -> None:
    digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def deep_pairs(dataset: CaptionedDataset, dual: DualEncoder, labels: str | None = None) -> PairedDataset:
    """Pairs of features: of each image, and of its captions the mean.

    Parameters
    ----------
    dataset : CaptionedDataset
        Its test split becomes the queries. By nouns or a file the database is train and validation together, as in
        DCMH's protocol; by images the queries rank each other.
    dual : DualEncoder
        Whose towers see them.
    labels : str, optional
        "nouns", "images" or a table's file, see the module. None: nouns where every image has three captions or more
        and half of the training images bear one, else images.

    Returns
    -------
    PairedDataset
        float32 (N, width) of image and text; labels uint8 (N, C) of nouns and where a file gives an image several, else
        int64 (N,).

    Raises
    ------
    InputError
        Where an image has too few captions, or no label; before anything goes through a tower.
    """
    found = _labelled(dataset, labels)
    pairs = {}
    for name, (split, own) in found.splits.items():
        image, text = tower_features(dual, split)
        pairs[name] = Pairs(image.float(), _means(text, split.captions()[1], len(split)), own)
    train, valid, query = (pairs.get(name) for name in _SPLITS)
    assert train is not None and query is not None
    database = query if found.rule == IMAGE_RULE else train if valid is None else train.joined(valid)
    return PairedDataset(dataset.name, train, query, database, valid=valid, class_names=found.classes)


def label_rule(dataset: CaptionedDataset, labels: str | None = None) -> str:
    """What `deep_pairs` takes the labels from: "nouns", "images" or a file."""
    if labels is not None:
        return labels
    splits = [split for split in (dataset.train, dataset.valid, dataset.test) if split is not None]
    if min(len(row) for split in splits for row in split.text) < 3:
        return IMAGE_RULE
    named = [noun_labels(row).any() for row in dataset.train.text]
    return NOUN_RULE if 2 * sum(named) >= len(named) else IMAGE_RULE


def _means(text: Tensor, owner: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, text.shape[1]).index_add_(0, owner, F.normalize(text.float(), dim=1))
    return total / torch.bincount(owner, minlength=count)[:, None]


_SPLITS = ("train", "valid", "query")


class _Labelled(NamedTuple):
    rule: str
    splits: dict[str, tuple[CaptionedImages, Tensor]]
    classes: tuple[str, ...] = ()


def _labelled(dataset: CaptionedDataset, labels: str | None) -> _Labelled:
    rule = label_rule(dataset, labels)
    splits = dict(zip(_SPLITS, (dataset.train, dataset.valid, dataset.test), strict=True))
    present = {name: split for name, split in splits.items() if split is not None}
    if rule == NOUN_RULE:
        return _Labelled(rule, {name: _by_nouns(name, split) for name, split in present.items()}, tuple(NOUNS))
    if rule == IMAGE_RULE:
        ends = np.cumsum([0, *map(len, present.values())])
        ids = {
            name: torch.arange(int(end), int(end) + len(s))
            for (name, s), end in zip(present.items(), ends[:-1], strict=True)
        }
        return _Labelled(rule, {name: (split, ids[name]) for name, split in present.items()})
    return _by_file(Path(rule), present)


def _by_nouns(name: str, split: CaptionedImages) -> tuple[CaptionedImages, Tensor]:
    if few := next((row for row in split.text if len(row) < 3), None):
        raise InputError(
            f"labels by nouns are of captions 3 and on, and an image has {len(few)} ({few[0]!r}); expected --labels "
            f"{IMAGE_RULE} or a file"
        )
    found = torch.from_numpy(np.array([noun_labels(row) for row in split.text]))
    rows = found.any(dim=1).nonzero()[:, 0]
    if not len(rows):
        raise InputError(
            f"the {name} split has no image whose captions 3 and on name one of the {len(NOUNS)} nouns; expected "
            f"--labels {IMAGE_RULE} or a file"
        )
    kept = split.select(rows)
    return replace(kept, text=tuple(row[:2] for row in kept.text), rows=None), found[rows]


def _by_file(file: Path, present: dict[str, CaptionedImages]) -> _Labelled:
    table = read_labels(file)
    classes = sorted({label for row in table.values() for label in row})
    place = {label: number for number, label in enumerate(classes)}
    by_name: dict[str, Sequence[str]] = {}
    for name, labels in table.items():  # of two files of one name in two folders, neither stands for a third
        base = Path(name).name
        by_name[base] = labels if base not in by_name or set(by_name[base]) == set(labels) else ()
    whole: dict[str, list[Sequence[str]]] = {}
    for name, split in present.items():
        if not isinstance(split.image, Photos):
            raise InputError(f"{file}: labels go by the names of image files, and these images have none")
        photos = [split.image.name(row) for row in range(len(split))]
        whole[name] = [table.get(photo) or by_name.get(Path(photo).name, ()) for photo in photos]
        if lacking := [photo for photo, row in zip(photos, whole[name], strict=True) if not row]:
            raise InputError(f"{file}: has no label of {len(lacking)} images of the {name} split, {lacking[0]} first")
    several = any(len(row) > 1 for rows in whole.values() for row in rows)
    splits = {}
    for name, rows in whole.items():
        own = torch.zeros(len(rows), len(classes), dtype=torch.uint8)
        for number, row in enumerate(rows):
            own[number, [place[label] for label in row]] = 1
        splits[name] = present[name], own if several else own.argmax(dim=1)
    return _Labelled(str(file), splits, tuple(classes))


def read_labels(file: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The labels of images by file name: a .csv or .tsv whose first line names the columns image and label.

    Several labels of an image are rows of their own, or separated by | in one.

    Raises
    ------
    InputError
        Where the file is missing, damaged or of other columns.
    """
    path = Path(file)
    check_regular(path, f"table of labels; labels are {NOUN_RULE}, {IMAGE_RULE} or a file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        delimiter = "\t" if lines and "\t" in lines[0] else ","
        head = [name.strip().lower() for name in next(csv.reader(lines[:1], delimiter=delimiter), [])]
        if "image" not in head or "label" not in head:
            raise InputError(f"{path}: expected a first line that names the columns image and label, got {head}")
        found: dict[str, dict[str, None]] = {}
        for number, row in enumerate(csv.reader(lines[1:], delimiter=delimiter), 2):
            if not row:
                continue
            labels = [label.strip() for label in row[head.index("label")].split("|")] if len(row) == len(head) else []
            if not labels or not all(labels):
                raise InputError(f"{path}: row {number} has no label or other columns than the first line: {row}")
            found.setdefault(row[head.index("image")].strip(), {}).update(dict.fromkeys(labels))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: damaged, not a table of text ({error})") from error
    return {name: tuple(labels) for name, labels in found.items()}
