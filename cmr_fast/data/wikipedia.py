"""The UCSD Wikipedia set: 2866 articles with their picture, ten classes, the authors' split into 2173 and 693 pairs."""

import os
from pathlib import Path

import numpy as np
import torch

from cmr_fast.data import formats
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.readers import read_arrays
from cmr_fast.errors import InputError

FILES = {"lda": ("raw_features.mat", "raw_features_with_tfidf.mat"), "tfidf": ("raw_features_with_tfidf.mat",)}
LISTS = {"tr": "trainset_txt_img_cat.list", "te": "testset_txt_img_cat.list"}


def holds(path: Path) -> bool:
    """Whether the set lies in the folder."""
    return any((path / name).is_file() for name in FILES["lda"])


def load(path: str | os.PathLike[str], *, features: str = "lda") -> PairedDataset:
    """Read the folder of Rasiwasia et al. 2010: `raw_features.mat` or `raw_features_with_tfidf.mat`, and the lists.

    Parameters
    ----------
    path : str or path
        The folder.
    features : {"lda", "tfidf"}
        The text features.

    Returns
    -------
    PairedDataset
        image float32 (N, 128): histogram of SIFT words, each row sums to 1; text float32, "lda" (N, 10) topic shares,
        each row sums to 1, "tfidf" (N, 1000) weighted words; labels int64 (N,), 0 to 9 (1 to 10 on disk), named by
        `categories.list` where it is there. The 693 test pairs are queries and database at once, as the papers do it.

    Raises
    ------
    InputError
        For files that are missing, cut short, or of other lengths than the lists.
    """
    if features not in FILES:
        raise InputError(f"features must be one of {', '.join(FILES)} for Wikipedia, got {features!r}")
    folder = Path(path)
    file = next((folder / name for name in FILES[features] if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: features={features!r} needs {' or '.join(FILES[features])}, not found")
    arrays = read_arrays(file)
    text = "T" if features == "lda" else "T_tfidf"
    splits = []
    for split, list_name in LISTS.items():
        keys = f"I_{split}", f"{text}_{split}"
        absent = [key for key in keys if key not in arrays]
        if absent:
            raise InputError(f"{file}: has no {', '.join(absent)}, only {', '.join(arrays) or 'nothing'}")
        labels = _classes(folder / list_name)
        values = []
        for key in keys:
            array = np.asarray(arrays[key]())
            if array.ndim != 2 or len(array) != len(labels):
                raise InputError(
                    f"{file}: {key} has shape {array.shape}, but {list_name} names {len(labels)} pairs; "
                    "expected one row per pair"
                )
            values.append(torch.from_numpy(array.astype(np.float32)))
        splits.append(Pairs(values[0], values[1], torch.from_numpy(labels - 1)))
    names_file = folder / "categories.list"
    names = tuple(names_file.read_text().split()) if names_file.is_file() else ()
    highest = 1 + max(int(pairs.labels.max()) for pairs in splits)
    if names and len(names) < highest:
        raise InputError(f"{names_file}: names {len(names)} classes, but the lists use {highest}")
    train, test = splits
    return PairedDataset("wikipedia", train, test, test, class_names=names)


def _classes(file: Path) -> np.ndarray:
    """int64 (N,): the third column, from 1. Lines are text id, image id and class, with tabs between."""
    if not file.is_file():
        raise InputError(f"{file}: not found; it holds the classes, which the .mat files lack")
    formats.first_bytes(file)
    lines = file.read_text(encoding="latin1").splitlines()
    classes = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != 3 or not fields[2].strip().isdecimal() or int(fields[2]) < 1:
            raise InputError(f"{file}: line {number} is {line!r}, expected text id, image id and class from 1, by tabs")
        classes.append(int(fields[2]))
    return np.array(classes, dtype=np.int64)
