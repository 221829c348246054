"""Paired data sets out of files in the layouts that the field's code publishes, told by the names of their arrays."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmr_fast.data import convert as normalise
from cmr_fast.data.layouts import NATIVE, Family, recognise
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.data.readers import SUFFIXES, Arrays, read_arrays
from cmr_fast.errors import InputError


def load(
    path: str | os.PathLike[str],
    *,
    image: str | None = None,
    text: str | None = None,
    database: str | None = None,
    query: int | None = None,
    train: int | None = None,
    seed: int = 0,
) -> PairedDataset:
    """Read a file, or all the .mat, .h5, .npy, .npz and .pkl files of a folder as one set.

    Arrays are known by their names, those in `families.FAMILIES`; a .npy, and a .pkl of one value, by the file's name,
    so XAll.npy may lie beside DCMH's mirflickr25k-yall.mat and -lall.mat.

    Bring your own features as one .npz (`cmr_fast.data.native` writes it): train_image float (N, Di), train_text float
    (N, Dt), train_labels (N,) class ids from 0 or (N, C) 0/1, the same for query_ and, where they have them, database_
    and valid_; or image, text and labels of the whole set.

    In the other layouts items may lie by rows or by columns, and class ids may begin anywhere; see `normalise`.
    image, text  the name of the array to take where the files hold several, as XAll (features) beside IAll (pixels)
    database     "query" or "train": what queries rank where the files name train and test only. By default what the
                 layout's authors do: "train" for the MATLAB hashing code, else the test items rank each other
    query, train, seed  for sets without splits: a random draw of `query` items, the rest is the database, and `train`
                 of that are for training. Default as the papers: 2000 and 5000, or a tenth and a quarter of less than
                 20000. Where the files name query and database only, `train` are drawn from the database (default: all)
    """
    source = Path(path)
    arrays = _by_id(_gather(source))
    if database not in (None, "query", "train"):
        raise InputError(f"database must be 'query' or 'train', got {database!r}")
    try:
        family, names = recognise(arrays, {"image": image, "text": text})
        values = {
            split: {role: normalise.as_array(arrays[key](), key) for role, key in roles.items()}
            for split, roles in names.items()
        }
        # ids of the own format have their meaning by class_names: they are never shifted
        splits, classes = _pairs(values, names, as_is=family is NATIVE)
        if "class_names" in arrays:
            classes = tuple(str(name) for name in np.asarray(arrays["class_names"]()).ravel())
        if "whole" in splits:
            if database is not None:
                raise InputError("database= is for files with train and test items; these are one set without splits")
            splits = _draw(splits["whole"], query, train, seed)
        else:
            splits = _complete(splits, family, database, query, train, seed)
        return PairedDataset(source.stem if source.is_file() else source.name, class_names=classes, **splits)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(source)) else f"{source}: {message}") from error.__cause__


def _gather(source: Path) -> Arrays:
    if source.is_file():
        return read_arrays(source)
    files = sorted(file for file in source.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        there = sorted(file.name for file in source.iterdir())
        some = ", ".join(there[:8]) + (", …" if len(there) > 8 else "")
        raise InputError(
            f"{source}: no data set found; looked for raw_features.mat (Wikipedia) and files in {' '.join(SUFFIXES)}; "
            f"it holds {some or 'nothing'}"
        )
    gathered: Arrays = {}
    origin: dict[str, Path] = {}
    for file in files:
        for key, call in read_arrays(file).items():
            if key in gathered:
                raise InputError(f"{source}: {key} is in {origin[key].name} and {file.name}; give one file alone")
            gathered[key], origin[key] = call, file
    return gathered


def _in_order(rows: Any, ids: Any) -> list[Any]:
    return [rows[item] for item in ids]


def _by_id(arrays: Arrays) -> Arrays:
    """ACMR's NUS-WIDE pickles, dicts of rows by item id, as arrays in the order of the id lists."""
    found = dict(arrays)
    for split in ("train", "test"):
        single, several = f"{split}_id_label_single", f"{split}_id_label_map"
        keys = {
            "img_feats": f"img_{split}_id_feats",
            "txt_vecs": f"{split}_id_bow",
            "labels": several if several in arrays else single,
        }
        if f"{split}_ids" not in arrays or not all(key in arrays for key in keys.values()):
            continue
        ids = arrays[f"{split}_ids"]()
        for role, key in keys.items():
            rows = arrays[key]()
            missing = [item for item in ids if item not in rows]
            if missing:
                raise InputError(f"{key} lacks {len(missing)} of the {len(ids)} {split}_ids, first {missing[0]!r}")
            found[f"{split}_{role}"] = partial(_in_order, rows, ids)
    return found


def _pairs(
    values: dict[str, dict[str, np.ndarray]], names: dict[str, dict[str, str]], as_is: bool
) -> tuple[dict[str, Pairs], tuple[str, ...]]:
    """Pairs for each split; labels are looked at over all splits at once."""
    if not as_is:
        values = {split: _rows(roles, names[split]) for split, roles in values.items()}
    order = [(split, role) for split in values for role in ("labels", "text_labels") if role in values[split]]
    label_names = ", ".join(names[split][role] for split, role in order)
    parts = [values[split][role] for split, role in order]
    found, classes = (_as_they_are(parts, label_names), ()) if as_is else normalise.labels(parts, label_names)
    by = dict(zip(order, found, strict=True))
    pairs = {}
    for split, roles in values.items():
        key = names[split]
        other = by.get((split, "text_labels"))
        if other is not None and not torch.equal(other, by[split, "labels"]):
            rows = int((other != by[split, "labels"]).reshape(len(other), -1).any(dim=1).sum())
            raise InputError(
                f"{key['labels']} and {key['text_labels']} differ in {rows} of {len(other)} rows; "
                "expected image and text of a row to be a pair"
            )
        pairs[split] = Pairs(
            normalise.image(roles["image"], key["image"]),
            normalise.text(roles["text"], key["text"]),
            by[split, "labels"],
        )
    return pairs, classes


def _rows(roles: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    turned = normalise.rows_first({names[role]: array for role, array in roles.items()})
    return {role: turned[names[role]] for role in roles}


def _as_they_are(parts: list[np.ndarray], name: str) -> list[torch.Tensor]:
    """Labels of the own format: (N,) ids from 0 or (N, C) of 0 and 1, whatever their number type."""
    made = []
    for part in parts:
        kind = np.int64 if part.ndim == 1 else np.uint8
        if part.dtype.kind not in "biuf" or not np.array_equal(part, part.astype(kind)):
            raise InputError(f"{name} must be (N,) class ids or (N, C) of 0 and 1, got {part.dtype} {part.shape}")
        made.append(torch.from_numpy(part.astype(kind)))
    return made


def _draw(whole: Pairs, query: int | None, train: int | None, seed: int) -> dict[str, Pairs]:
    """The random protocol of the hashing papers: queries, the rest is the database, and training items out of that."""
    count = len(whole)
    query = min(2000, max(1, count // 10)) if query is None else query
    train = min(5000, max(1, count // 4)) if train is None else train
    if query < 1 or train < 1 or query + train > count:
        raise InputError(f"cannot draw {query} queries and {train} training items from {count}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    rest = order[query:]
    return {
        "train": whole.select(rest[:train]),
        "query": whole.select(order[:query].sort().values),
        "database": whole.select(rest.sort().values),
    }


def _complete(
    splits: dict[str, Pairs], family: Family, database: str | None, query: int | None, train: int | None, seed: int
) -> dict[str, Any]:
    """Fill in the split that the files do not name."""
    if query is not None:
        raise InputError(f"query= is for one set without splits; these files name {', '.join(splits)}")
    if "database" in splits and database is not None:
        raise InputError("database= is for files with train and test items only; these name their database")
    if "train" not in splits:
        base = splits["database"]
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(base)))[:train].sort().values
        if train is not None and not 1 <= train <= len(base):
            raise InputError(f"train must lie between 1 and the database's {len(base)} items, got {train}")
        return splits | {"train": base if train is None else base.select(rows)}
    if train is not None:
        raise InputError(f"train= is for files without a training split; these name {', '.join(splits)}")
    return {"database": splits[database or family.database]} | splits
