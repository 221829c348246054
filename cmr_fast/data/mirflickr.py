"""MIR-Flickr as CMLA's code has it: a folder (FLICKR-25K) of Img.h5, Tag.h5, Lab.h5 and Mean.h5.

Img.h5     ImgQuery, ImgTrain and ImgDataBase, or IAll of the whole set: images (N, H, W, 3) or (N, 3, H, W), uint8 or
           floats of 0 to 255; or, as the authors' own file, the paths of the photos
Tag.h5     TagQuery ... or TAll (YAll): the bag of words, (N, 1386)
Lab.h5     LabQuery ... or LAll: multi-hot labels, (N, 24)
Mean.h5    Mean, the mean image, which their code subtracts before the network. Here each method subtracts the mean
           pixel that it learns from the training split; the file is read only where it was subtracted in Img.h5

Files without splits are divided as the authors of SSAH and CMLA do: 2,000 random queries, the rest is the database,
10,000 of that are for training.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmr_fast.data import convert, formats
from cmr_fast.data._checks import check_count, check_text
from cmr_fast.data.features import complete, contents, draw, naming
from cmr_fast.data.hdf5 import MAGIC, Entry, list_hdf5, read_pixels
from cmr_fast.data.layouts import recognise
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.photos import decoded
from cmr_fast.data.readers import guarded, read_arrays
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed

FILES = ("img.h5", "tag.h5", "lab.h5")
QUERY, TRAIN = 2000, 10000


def holds(path: Path) -> bool:
    """Whether Img.h5, Tag.h5 and Lab.h5 lie in the folder, and Img.h5 has images (4-D) or paths, and no features."""
    files = _files(path)
    if not set(FILES) <= set(files):
        return False
    try:
        entries = _entries(files["img.h5"]).values()
    except InputError:  # damaged, or of another format: `features.load` says it
        return False
    pictures = [entry for entry in entries if entry.text or len(entry.shape) == 4]
    return bool(pictures) and not any(len(entry.shape) == 2 and not entry.text for entry in entries)


def _files(path: Path) -> dict[str, Path]:
    return {file.name.lower(): file for file in path.iterdir()} if path.is_dir() else {}


def _entries(file: Path) -> dict[str, Entry]:
    """What lies in an HDF5 file; nothing in MATLAB's, whose axes lie in the other order."""
    if not formats.first_bytes(file).startswith(MAGIC):
        return {}
    entries: dict[str, Entry] = guarded(file, "an HDF5 file", lambda f: {"all": lambda: list_hdf5(f)[0]})["all"]()
    return entries


def load(
    path: str | os.PathLike[str],
    *,
    photos: str | None = None,
    size: int = 224,
    query: int | None = None,
    train: int | None = None,
    seed: int = 0,
) -> PairedDataset:
    """Read the folder; the module says what lies in it.

    Images are kept as uint8, 3 GB of 20,015 at 224 x 224; uint8 (N, H, W, 3) need that twice while they are turned.
    The splits that are drawn are copies, the training items lie in two of them: 4.5 GB, while the 3 GB are still held.

    Parameters
    ----------
    path : str or path
        The folder of Img.h5, Tag.h5, Lab.h5 and, where it is needed, Mean.h5.
    photos : str, optional
        Where Img.h5 has paths: the folder of the photos. None: as the paths say, else beside Img.h5 by their names.
    size : int
        Pixels a side of photos that are read from their files (code: 224).
    query, train, seed : int, optional
        Of files without splits: a random draw of `query` items, the rest is the database, `train` of that are for
        training. Default 2000 and 10000 (code), or a tenth and half of less than 20000. Where the files name query
        and database only, `train` are drawn from the database (default: all).

    Returns
    -------
    PairedDataset
        image uint8 (N, 3, H, W), text float32, labels as in the files, under the folder's name.

    Raises
    ------
    InputError
        Where the folder, a file, an array or a photo is missing, damaged or of another shape, or an option does not
        fit.
    """
    for name, number in (("query", query), ("train", train)):
        if number is not None:
            check_count(name, number)
    check_count("size", size, least=16)
    as_seed(seed)
    check_text("photos", photos)
    folder = Path(path)
    if not holds(folder):
        what = f"it holds {contents(folder)}" if folder.is_dir() else "no such folder"
        raise InputError(
            f"{folder}: expected a folder of Img.h5 with images or paths of photos, Tag.h5 and Lab.h5; {what}"
        )
    files = _files(folder)
    images, tags, labels = (files[name] for name in FILES)
    arrays, entries = read_arrays(tags) | read_arrays(labels), _entries(images)
    mean = _mean(files.get("mean.h5"))
    with naming(folder):
        layout, names = recognise([*arrays, *entries], {})
        values: dict[str, dict[str, np.ndarray]] = {}
        pixels: dict[str, np.ndarray] = {}
        for split, roles in names.items():
            pixels[split] = _images(images, roles["image"], entries, mean, photos, size)
            parts = {roles[role]: convert.as_array(arrays[roles[role]](), roles[role]) for role in ("text", "labels")}
            parts = convert.rows_first(parts | {roles["image"]: np.zeros(len(pixels[split]))})
            values[split] = {role: parts[roles[role]] for role in ("text", "labels")}
        made, classes = convert.labels(
            [part["labels"] for part in values.values()], ", ".join(roles["labels"] for roles in names.values())
        )
        if "class_names" in arrays:
            classes = tuple(str(name) for name in np.asarray(arrays["class_names"]()).ravel())
        splits: dict[str, Any] = {
            split: Pairs(torch.from_numpy(pixels[split]), convert.text(part["text"], names[split]["text"]), own)
            for (split, part), own in zip(values.items(), made, strict=True)
        }
        if "whole" in splits:
            count = len(splits["whole"])
            queries = min(QUERY, max(1, count // 10)) if query is None else query
            items = min(TRAIN, max(1, count // 2)) if train is None else train
            splits = draw(splits["whole"], queries, items, seed)
        else:
            splits = complete(splits, layout, None, query, train, seed)
        return PairedDataset(folder.name, class_names=classes, **splits)


def _mean(file: Path | None) -> np.ndarray | None:
    """Mean of Mean.h5, as it lies there."""
    if file is None:
        return None
    arrays = read_arrays(file)
    name = next((name for name in arrays if name.casefold() == "mean"), None)
    if name is None:
        raise InputError(f"{file}: expected the mean image under Mean, it holds {', '.join(arrays) or 'nothing'}")
    return convert.as_array(arrays[name](), name)


def _images(
    file: Path, name: str, entries: dict[str, Entry], mean: np.ndarray | None, photos: str | None, size: int
) -> np.ndarray:
    """uint8 (N, 3, H, W): pixels of the file, or of the photos whose paths it has."""
    if name not in entries:
        raise InputError(f"{name} must be in {file.name}, it is not")
    if not entries[name].text:
        if photos is not None:
            raise InputError(f"{file}: {name} holds images, photos= is for paths of photos; expected none")
        read = partial(read_pixels, file, entries[name].path, mean)
        return np.asarray(guarded(file, "an HDF5 file", lambda f: {name: read})[name]())
    paths = [Path(str(text)) for text in convert.as_array(read_arrays(file)[name](), name).ravel()]
    return decoded(_photos(paths, file.parent, photos), len(paths), size).numpy()


def _photos(paths: Sequence[Path], folder: Path, photos: str | None) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of each photo."""
    for path in paths:
        places = [folder / path, folder / path.name] if photos is None else [Path(photos) / path.name]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise InputError(f"{folder}: no photo {' or '.join(map(str, places))}; expected photos= of their folder")
        yield str(place), place.read_bytes()
