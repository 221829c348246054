"""The package's own file for a paired data set: one .npz, `data.load` reads it.

train_image, query_image …   float32 (N, Di) features, or uint8 (N, 3, H, W) images
train_text, query_text …     float32 (N, Dt) features, or text (N, captions), filled up with ""
train_labels, query_labels … int64 (N,) class ids from 0, or uint8 (N, C) 0/1
class_names                  text (C,), optional

Splits are train, query, and where they have them database (else queries rank each other) and valid.
"""

import os
from typing import Any

import numpy as np
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.data.pairs import PairedDataset


def save_pairs(path: str | os.PathLike[str], dataset: PairedDataset) -> None:
    """Write a data set that `data.load` gives back equal, under the file's name; `path` ends in .npz."""
    arrays: dict[str, Any] = {}
    splits = {"train": dataset.train, "query": dataset.query, "valid": dataset.valid}
    if dataset.database is not dataset.query:
        splits["database"] = dataset.database
    for split, pairs in splits.items():
        if pairs is None:
            continue
        arrays[f"{split}_image"] = pairs.image.numpy()
        arrays[f"{split}_labels"] = pairs.labels.numpy()
        if isinstance(pairs.text, Tensor):
            arrays[f"{split}_text"] = pairs.text.numpy()
        else:
            most = max(map(len, pairs.text))
            arrays[f"{split}_text"] = np.array([[*row, *[""] * (most - len(row))] for row in pairs.text])
    if dataset.class_names:
        arrays["class_names"] = np.array(dataset.class_names)
    with write_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, **arrays)
