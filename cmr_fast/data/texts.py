"""Captions alone, for what needs no images."""

import os
from pathlib import Path

from cmr_fast.data import shapes
from cmr_fast.data.captions import SPLITS, file_in, is_table, read_items
from cmr_fast.data.catalogue import BUILT_IN, find
from cmr_fast.errors import InputError


def load_texts(path_or_name: str | os.PathLike[str], split: str = "train") -> list[str]:
    """The captions at a path, or by name.

    Parameters
    ----------
    path_or_name : str or path
        A .txt of one caption a line, which is its own training split; a file of images with captions as
        `load_captions` reads them (dataset_flickr8k.json and the like, tables, Flickr's tokens), or a folder with one;
        or a name under $CMR_FAST_DATA; or "shapes" for the built-in set.
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
    if path_or_name == BUILT_IN:
        built_in = shapes.load_captions()
        return [] if split == "val" else getattr(built_in, split).captions()[0]
    path = _file(path_or_name)
    if path.suffix == ".txt" and not is_table(path):
        texts = _lines(path) if split == "train" else []
    else:
        texts = [caption for captions in _of_images(path, split) for caption in captions]
    texts = [stripped for text in texts if (stripped := text.strip())]
    if split == "train" and not texts:
        raise InputError(f"{path}: has no captions of the {split} split")
    return texts


def load_caption_groups(path_or_name: str | os.PathLike[str]) -> list[tuple[str, ...]]:
    """The captions of each image of the training split; no photo is looked for.

    Parameters
    ----------
    path_or_name : str or path
        A file of images with captions as `load_captions` reads them, or a folder with one; or a name under
        $CMR_FAST_DATA.

    Returns
    -------
    list of tuple of str
        As they stand in the file, without the white space around them; empty ones are left out.

    Raises
    ------
    InputError
        Where there are none, and for a file of another form.
    """
    path = _file(path_or_name)
    groups = [tuple(text for caption in row if (text := caption.strip())) for row in _of_images(path, "train")]
    if not any(groups):
        raise InputError(f"{path}: has no captions of the train split")
    return groups


def _file(path_or_name: str | os.PathLike[str]) -> Path:
    path = find(path_or_name)
    if path.is_dir():
        file = file_in(path)
        if file is None:
            raise InputError(f"{path}: no file of captions there, expected one such as dataset_flickr8k.json")
        path = file
    return path


def _of_images(path: Path, split: str) -> list[tuple[str, ...]]:
    wanted = (split, "") if split == "train" else (split,)  # files that name no splits are training data
    return [item.captions for item in read_items(path) if item.split in wanted]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8 ({error})") from error
