"""Paired data sets out of files in the layouts that the field's code publishes, and the package's own file for one.

The own file is one .npz; `load` reads it and `save_pairs` writes it:

train_image, query_image …   float (N, Di) features, or uint8 (N, 3, H, W) images
train_text, query_text …     float (N, Dt) features, or text (N, captions), filled up with ""
train_labels, query_labels … int64 (N,) class ids from 0, or uint8 (N, C) 0/1
class_names                  text (C,), optional
text_kind                    "tokens" where text is int64 (N, L) token ids, "strings" where it is one string a pair

Splits are train, query, and where they have them database (else queries rank each other) and valid.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.data import convert
from cmr_fast.data._checks import check_count, check_text
from cmr_fast.data.formats import folder_advice
from cmr_fast.data.layouts import NATIVE, Layout, recognise
from cmr_fast.data.pairs import MAX_CLASSES, PairedDataset, Pairs
from cmr_fast.data.readers import SUFFIXES, Arrays, read_arrays
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed


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

    Arrays are known by their names, those in `layouts.LAYOUTS`; a .npy, and a .pkl of one value, by the file's name,
    so XAll.npy may lie beside DCMH's mirflickr25k-yall.mat and -lall.mat.

    Bring your own features as one .npz (`save_pairs` writes it): train_image float (N, Di), train_text float
    (N, Dt), train_labels (N,) class ids from 0 or (N, C) 0/1, the same for query_ and, where they have them, database_
    and valid_; or image, text and labels of the whole set. In the other layouts items may lie by rows or by columns,
    and class ids may begin anywhere; see `convert`.

    Parameters
    ----------
    path : str or path
        A file, or a folder of them.
    image, text : str, optional
        The name of the array to take where the files hold several, as XAll (features) beside IAll (pixels).
    database : {"query", "train"}, optional
        What queries rank where the files name train and test only. By default what the layout's authors do: "train"
        for the MATLAB hashing code, else the test items rank each other.
    query, train, seed : int, optional
        For sets without splits: a random draw of `query` items, the rest is the database, and `train` of that are for
        training. Default as the papers: 2000 and 5000, or a tenth and a quarter of less than 20000. Where the files
        name query and database only, `train` are drawn from the database (default: all).

    Returns
    -------
    PairedDataset
        float32 features, uint8 (N, 3, H, W) images or tuples of captions, under the name of the file or folder.

    Raises
    ------
    InputError
        Where files are missing, damaged or of another kind, arrays do not belong together, or an option does not fit.
    """
    for name, value in (("image", image), ("text", text)):
        check_text(name, value)
    for name, number in (("query", query), ("train", train)):
        if number is not None:
            check_count(name, number)
    as_seed(seed)
    source = Path(path)
    arrays = _by_id(_gather(source))
    if database not in (None, "query", "train"):
        raise InputError(f"database must be 'query' or 'train', got {database!r}")
    with naming(source):
        layout, names = recognise(arrays, {"image": image, "text": text})
        values = {
            split: {role: convert.as_array(arrays[key](), key) for role, key in roles.items()}
            for split, roles in names.items()
        }
        for split, roles in values.items():
            if all(array.size == 0 for array in roles.values()):
                raise InputError(
                    f"the {split} split is empty, it needs at least one pair: "
                    + ", ".join(f"{names[split][role]} is {array.shape}" for role, array in roles.items())
                )
        # ids of the own format have their meaning by class_names: they are never shifted
        kind = str(np.asarray(arrays["text_kind"]())) if layout is NATIVE and "text_kind" in arrays else ""
        splits, classes = _pairs(values, names, as_is=layout is NATIVE and _is_own(values), text_kind=kind)
        if "class_names" in arrays:
            classes = tuple(str(name) for name in np.asarray(arrays["class_names"]()).ravel())
        if "whole" in splits:
            if database is not None:
                raise InputError("database= is for files with train and test items; these are one set without splits")
            count = len(splits["whole"])
            queries = min(2000, max(1, count // 10)) if query is None else query
            splits = draw(splits["whole"], queries, min(5000, max(1, count // 4)) if train is None else train, seed)
        else:
            splits = complete(splits, layout, database, query, train, seed)
        return PairedDataset(source.stem if source.is_file() else source.name, class_names=classes, **splits)


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Begin the message of an InputError with the file or folder that it is about."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(source)) else f"{source}: {message}") from error.__cause__


def save_pairs(path: str | os.PathLike[str], dataset: PairedDataset) -> None:
    """Write a data set that `load` gives back equal, under the file's name.

    Parameters
    ----------
    path : str or path
        Ends in .npz. A file that is there is replaced when the new one is whole.
    dataset : PairedDataset
        Features in float32, images, token ids or captions.

    Raises
    ------
    InputError
        Where `path` does not end in .npz or is a folder, or `dataset` is something else.
    OSError
        Where the file cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or Path(path).suffix != ".npz":
        raise InputError(f"path must be a file that ends in .npz, got {str(path)!r}")
    if Path(path).is_dir():
        raise InputError(f"{os.fspath(path)}: is a folder, expected the name of a file to write")
    if not isinstance(dataset, PairedDataset):
        raise InputError(f"dataset must be a PairedDataset, got {type(dataset).__name__}")
    arrays: dict[str, Any] = {}
    splits = {"train": dataset.train, "query": dataset.query, "valid": dataset.valid}
    if dataset.database is not dataset.query:
        splits["database"] = dataset.database
    for split, pairs in splits.items():
        if pairs is None:
            continue
        arrays[f"{split}_image"] = pairs.image.cpu().numpy()
        arrays[f"{split}_labels"] = pairs.labels.cpu().numpy()
        arrays[f"{split}_text"], kind = _stored_text(pairs.text)
        if kind:
            arrays["text_kind"] = np.array(kind)
    if dataset.class_names:
        arrays["class_names"] = np.array(dataset.class_names)
    with write_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, **arrays)


def _stored_text(text: Any) -> tuple[np.ndarray, str]:
    """The array to store, and what it is where its dtype does not say."""
    if isinstance(text, Tensor):
        return text.cpu().numpy(), "" if text.is_floating_point() else "tokens"
    if text and isinstance(text[0], str):
        return np.array(text), "strings"
    most = max(map(len, text))
    return np.array([[*row, *[""] * (most - len(row))] for row in text]), ""


def _gather(source: Path) -> Arrays:
    if source.is_file():
        return read_arrays(source)
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InputError(
            f"{source}: no data set found; looked for raw_features.mat (Wikipedia) and files in {' '.join(SUFFIXES)}; "
            f"it holds {contents(source)}{folder_advice(source)}"
        )
    gathered: Arrays = {}
    origin: dict[str, Path] = {}
    for file in files:
        for key, call in read_arrays(file).items():
            if key in gathered:
                raise InputError(f"{source}: {key} is in {origin[key].name} and {file.name}; give one file alone")
            gathered[key], origin[key] = call, file
    return gathered


def contents(path: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else [path.name]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"


def _in_order(rows: Any, ids: Any) -> list[Any]:
    return [rows[item] for item in ids]


def _by_id(arrays: Arrays) -> Arrays:
    """ACMR's NUS-WIDE pickles, dicts of rows by item id, as arrays in the order of the id lists."""
    result = dict(arrays)
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
            result[f"{split}_{role}"] = partial(_in_order, rows, ids)
    return result


def _pairs(
    values: dict[str, dict[str, np.ndarray]], names: dict[str, dict[str, str]], as_is: bool, text_kind: str = ""
) -> tuple[dict[str, Pairs], tuple[str, ...]]:
    """Pairs for each split; labels are looked at over all splits at once."""
    _one_kind_of_text(values, names)
    if not as_is:
        values = {split: _rows(roles, names[split]) for split, roles in values.items()}
    order = [(split, role) for split in values for role in ("labels", "text_labels") if role in values[split]]
    label_names = ", ".join(names[split][role] for split, role in order)
    parts = [values[split][role] for split, role in order]
    labels, classes = (_as_they_are(parts, label_names), ()) if as_is else convert.labels(parts, label_names)
    by = dict(zip(order, labels, strict=True))
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
            convert.image(roles["image"], key["image"]),
            _own_text(roles["text"], key["text"], text_kind),
            by[split, "labels"],
        )
    return pairs, classes


def _one_kind_of_text(values: dict[str, dict[str, np.ndarray]], names: dict[str, dict[str, str]]) -> None:
    """Refuse features in one split and captions in another."""
    captions = {split: roles["text"].dtype.kind == "U" for split, roles in values.items()}
    if len(set(captions.values())) > 1:
        odd, even = (next(split for split, is_text in captions.items() if is_text is kind) for kind in (True, False))
        raise InputError(f"{names[odd]['text']} must be an array of numbers, as {names[even]['text']} is, got text")


def _is_own(values: dict[str, dict[str, np.ndarray]]) -> bool:
    """Whether labels are as `save_pairs` writes them: MATLAB keeps vectors as (N, 1) or (1, N), others write names."""
    return all(
        roles["labels"].dtype.kind != "U"
        and (
            roles["labels"].ndim == 1 or (roles["labels"].shape[1] > 1 and len(roles["labels"]) == len(roles["image"]))
        )
        for roles in values.values()
    )


def _own_text(array: np.ndarray, name: str, kind: str) -> Tensor | tuple[str, ...] | tuple[tuple[str, ...], ...]:
    """Text as `save_pairs` was given it; float32 features and tuples of captions where the file does not say."""
    if kind == "tokens" and array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if kind == "strings" and array.dtype.kind == "U" and array.ndim == 1:
        return tuple(array.tolist())
    return convert.text(array, name)


def _rows(roles: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    turned = convert.rows_first({names[role]: array for role, array in roles.items()})
    return {role: turned[names[role]] for role in roles}


def _as_they_are(parts: list[np.ndarray], name: str) -> list[Tensor]:
    """Labels of the own format: (N,) ids from 0 or (N, C) of 0 and 1, whatever their number type."""
    made = []
    for part in parts:
        kind = np.int64 if part.ndim == 1 else np.uint8
        numbers = part.dtype.kind in "biuf"
        if numbers and part.ndim == 1 and part.size and part.max() >= MAX_CLASSES:  # the cast may have no room for it
            raise InputError(f"{name} must be class ids from 0 below {MAX_CLASSES}, got {part.min()} to {part.max()}")
        if not numbers or not np.isfinite(part).all() or not np.array_equal(part, part.astype(kind)):
            raise InputError(f"{name} must be (N,) class ids or (N, C) of 0 and 1, got {part.dtype} {part.shape}")
        made.append(torch.from_numpy(part.astype(kind)))
    return made


def draw(whole: Pairs, query: int, train: int, seed: int) -> dict[str, Pairs]:
    """The random protocol of the hashing papers: queries, the rest is the database, and training items out of that."""
    count = len(whole)
    if query < 1 or train < 1 or query + train > count:
        raise InputError(f"cannot draw {query} queries and {train} training items from {count}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    rest = order[query:]
    return {
        "train": whole.select(rest[:train]),
        "query": whole.select(order[:query].sort().values),
        "database": whole.select(rest.sort().values),
    }


def complete(
    splits: dict[str, Pairs], layout: Layout, database: str | None, query: int | None, train: int | None, seed: int
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
    return {"database": splits[database or layout.database]} | splits
