"""Which loader takes what lies at a path."""

import os
from dataclasses import replace
from pathlib import Path

from cmr_fast.data import shapes
from cmr_fast.data._where import find
from cmr_fast.data.images import SVHN_FILES, ImageDataset, reader, sample_of
from cmr_fast.errors import InputError


def load_images(
    path_or_name: str | os.PathLike[str], *, train: int | None = None, test: int | None = None, seed: int = 0
) -> ImageDataset:
    """The labelled images at a path, or by name: "shapes" is built in, others lie under $CMR_FAST_DATA.

    What lies there is found by looking:
    data_batch_1 … data_batch_5, test_batch   CIFAR-10, the python version (also in a folder cifar-10-batches-py in it)
    train_32x32.mat, test_32x32.mat           SVHN, the cropped digits; its label 10 is the digit 0

    train, test    keep this many images of a split, drawn with `seed`, each class its share; None keeps all
    Pickles are read by a reader that runs nothing. Raises InputError for files that are missing, cut short or of other
    shapes than their authors' ones.
    """
    if path_or_name == "shapes":
        wanted = {"train": train, "test": test}
        return shapes.load_images(seed=seed, **{split: n for split, n in wanted.items() if n is not None})
    path = find(Path(path_or_name).expanduser())
    read = reader(path)
    if read is None:
        there = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
        raise InputError(
            f"{path}: no labelled images found; looked for data_batch_1 (CIFAR-10, python version) and "
            f"{SVHN_FILES[0]} (SVHN); it holds {', '.join(there[:8]) or 'nothing'}"
        )
    found = read()
    return replace(
        found, train=sample_of(found.train, train, seed, "train"), test=sample_of(found.test, test, seed, "test")
    )
