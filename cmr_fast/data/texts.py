"""Captions alone, for what needs no images."""

import json
import os
from pathlib import Path

from cmr_fast.data.catalogue import find
from cmr_fast.errors import InputError

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def load_texts(path_or_name: str | os.PathLike[str], split: str = "train") -> list[str]:
    """The captions at a path, or by name.

    Parameters
    ----------
    path_or_name : str or path
        A text file of one caption a line, which is its own training split; a JSON file in Karpathy's form
        (dataset_flickr8k.json and the like), or a folder with one; or a name under $CMR_FAST_DATA.
    split : {"train", "val", "test"}
        COCO's restval counts to train.

    Returns
    -------
    list of str
        As they stand in the file, without the white space around them; empty ones are left out.

    Raises
    ------
    InputError
        Where there are none, and for a file of another form.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = find(path_or_name)
    if path.is_dir():
        files = sorted(path.glob("dataset*.json"))
        if len(files) != 1:
            raise InputError(f"{path}: expected one dataset*.json in Karpathy's form, found {len(files)}")
        path = files[0]
    try:
        texts = _karpathy(path, split) if path.suffix == ".json" else _lines(path, split)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8 ({error})") from error
    texts = [stripped for text in texts if (stripped := text.strip())]
    if split == "train" and not texts:
        raise InputError(f"{path}: has no captions of the {split} split")
    return texts


def _lines(path: Path, split: str) -> list[str]:
    return path.read_text("utf-8").splitlines() if split == "train" else []


def _karpathy(path: Path, split: str) -> list[str]:
    try:
        images = json.loads(path.read_text("utf-8"))["images"]
        return [str(s["raw"]) for image in images if image["split"] in SPLITS[split] for s in image["sentences"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged or another file; expected images with split and sentences, each with raw "
            f"({type(error).__name__}: {error})"
        ) from error
