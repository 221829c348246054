"""The data sets that can be loaded, and by what they are known; one list for pairs and for labelled images."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cmr_fast.data import captions, cifar_svhn, features, flickr8k, mirflickr, shapes, wikipedia
from cmr_fast.data._checks import check_count
from cmr_fast.data.captions import CaptionedDataset
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed

BUILT_IN = "shapes"


class Loader(NamedTuple):
    """A kind of data set: `sniff` says whether it lies at a path, `load` reads it."""

    sniff: Callable[[Path], bool]
    load: Callable[..., Any]
    makes: Literal["pairs", "images"]
    title: str
    looked_for: str


LOADERS = [
    Loader(wikipedia.holds, wikipedia.load, "pairs", "Wikipedia", "raw_features.mat (Wikipedia)"),
    Loader(
        cifar_svhn.holds_cifar10, cifar_svhn.load_cifar10, "images", "CIFAR-10",
        "data_batch_1 (CIFAR-10, python or MATLAB version)",
    ),
    Loader(
        cifar_svhn.holds_cifar100, cifar_svhn.load_cifar100, "images", "CIFAR-100",
        "train, test and meta (CIFAR-100, python or MATLAB version)",
    ),
    Loader(cifar_svhn.holds_svhn, cifar_svhn.load_svhn, "images", "SVHN", "train_32x32.mat (SVHN)"),
    Loader(flickr8k.holds, flickr8k.load, "pairs", "Flickr8k-24", f"{flickr8k.CAPTIONS} (Flickr8k)"),
    Loader(mirflickr.holds, mirflickr.load, "pairs", "MIR-Flickr of CMLA", "Img.h5, Tag.h5 and Lab.h5 (CMLA)"),
    Loader(lambda path: True, features.load, "pairs", "such files", "files of features"),
]  # fmt: skip
"""In the order in which they are tried; the first whose `sniff` is true is taken."""


def load(path_or_name: str | os.PathLike[str], **options: str | int | None) -> PairedDataset:
    """The paired data set at a path, or by name.

    What lies there is found by looking:

    - a folder with raw_features*.mat: the UCSD Wikipedia set, `cmr_fast.data.wikipedia.load`
    - a folder with dataset_flickr8k.json: Flickr8k as a multi-label set, `cmr_fast.data.flickr8k.load`
    - a folder with Tag.h5, Lab.h5 and an Img.h5 of images or paths of photos: MIR-Flickr as CMLA has it,
      `cmr_fast.data.mirflickr.load`
    - other folders, and files: arrays by their names in .mat, .h5, .npy, .npz, .pkl, `cmr_fast.data.features.load`

    Your own features: one .npz with train_image, train_text, train_labels, query_image, …, see
    `cmr_fast.data.features`; `save_pairs` writes it.

    Parameters
    ----------
    path_or_name : str or path
        A file or folder; "shapes" for the built-in set; or a name under $CMR_FAST_DATA.
    **options : str or int
        Options of the function that reads; `help` on it lists them.

    Returns
    -------
    PairedDataset
        Train, query and database splits.

    Raises
    ------
    InputError
        Where nothing is found, the files are damaged or do not belong together, or an option is not one of theirs.
    """
    if path_or_name == BUILT_IN:
        return shapes.load(**_checked(shapes.load, "the built-in shapes", options))
    path = find(path_or_name)
    if path.name.startswith("raw_features") and path.is_file():
        path = path.parent
    loader = next(loader for loader in LOADERS if loader.sniff(path))
    if loader.makes == "images":
        raise InputError(f"{path}: labelled images without texts; a classifier reads them, with load_images")
    dataset: PairedDataset = loader.load(path, **_checked(loader.load, loader.title, options))
    return dataset


def load_images(
    path_or_name: str | os.PathLike[str], *, train: int | None = None, test: int | None = None, seed: int = 0
) -> ImageDataset:
    """The labelled images at a path, or by name.

    What lies there is found by looking:

    - data_batch_1 … data_batch_5, test_batch: CIFAR-10, python or MATLAB version, also in its own folder
    - train, test, meta: CIFAR-100 with its fine labels, python or MATLAB version, also in its own folder
    - train_32x32.mat, test_32x32.mat: SVHN, the cropped digits; its label 10 is the digit 0

    Parameters
    ----------
    path_or_name : str or path
        A folder; "shapes" for the built-in set; or a name under $CMR_FAST_DATA.
    train, test : int, optional
        Keep this many images of a split, drawn with `seed`, each class its share; None keeps all.
    seed : int
        Of the draw.

    Returns
    -------
    ImageDataset
        uint8 images with class ids. Pickles are read by a reader that runs nothing.

    Raises
    ------
    InputError
        For files that are missing, cut short or of other shapes than their authors' ones, and for other options.
    """
    counts = {name: check_count(name, n) for name, n in (("train", train), ("test", test)) if n is not None}
    as_seed(seed)
    if path_or_name == BUILT_IN:
        return shapes.load_images(seed=seed, **counts)
    path = find(path_or_name)
    loaders = [loader for loader in LOADERS if loader.makes == "images"]
    loader = next((loader for loader in loaders if loader.sniff(path)), None)
    if loader is None:
        raise InputError(
            f"{path}: no labelled images found; looked for {' and '.join(loader.looked_for for loader in loaders)}; "
            f"it holds {features.contents(path)}"
        )
    dataset = loader.load(path)
    return replace(dataset, **{name: _sample(getattr(dataset, name), n, seed, name) for name, n in counts.items()})


def load_captions(path_or_name: str | os.PathLike[str], **options: str | int | None) -> CaptionedDataset:
    """The images with captions at a path, or by name.

    What lies there is found by looking, see `cmr_fast.data.captions.load`: Karpathy's dataset_*.json with its photos
    (Flickr8k, Flickr30k, COCO), a table of paths and captions, Flickr's .token file, tars of webdataset.

    Parameters
    ----------
    path_or_name : str or path
        A file or folder; "shapes" for the built-in set; or a name under $CMR_FAST_DATA.
    **options : str or int
        Options of `cmr_fast.data.captions.load`.

    Returns
    -------
    CaptionedDataset
        Train and test splits, and a validation split where the files have one.

    Raises
    ------
    InputError
        Where nothing is found, captions or photos are missing or damaged, or an option is not one of theirs.
    """
    if path_or_name == BUILT_IN:
        return shapes.load_captions(**_checked(shapes.load_captions, "the built-in shapes", options))
    path = find(path_or_name)
    if not captions.holds(path):
        raise InputError(
            f"{path}: no images with captions found; looked for Karpathy's dataset_*.json, captions.csv or .txt, "
            f"Flickr's .token file and tars of webdataset; it holds {features.contents(path)}"
        )
    return captions.load(path, **_checked(captions.load, "images with captions", options))


def _sample(images: Images, count: int, seed: int, split: str) -> Images:
    if count > len(images):
        raise InputError(f"{split} must be from 1 to the {len(images)} images there are, got {count}")
    return images.sample(count, seed)


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """The file or folder of this name, here or under $CMR_FAST_DATA. InputError where there is none."""
    if not isinstance(path_or_name, str | os.PathLike):
        raise InputError(f"expected a path, or a name as text, got {type(path_or_name).__name__}")
    if not os.fspath(path_or_name):
        raise InputError("no data set named: expected a path, a name under $CMR_FAST_DATA or 'shapes', got ''")
    try:
        path = Path(path_or_name).expanduser()
        looked = [path]
        root = os.environ.get("CMR_FAST_DATA")
        if root and not path.is_absolute():
            looked.append(Path(root).expanduser() / path)
        for place in looked:
            if place.exists():
                return _readable(place)
    except (OSError, RuntimeError, TypeError) as error:  # a name too long, a loop of links, no such user, bytes
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"no data at {path_or_name!r}: {reason}") from error
    hint = "" if root else "; set CMR_FAST_DATA to a folder of data sets to use bare names"
    raise InputError(f"no data at {' or '.join(map(str, looked))}; the built-in set is named {BUILT_IN!r}{hint}")


def _readable(path: Path) -> Path:
    """`path` where it is a folder that can be listed or a regular file; opening a FIFO would wait for ever."""
    if path.is_dir():
        next(path.iterdir(), None)
    elif not path.is_file():
        kinds = {"FIFO": path.is_fifo(), "socket": path.is_socket(), "device": path.is_char_device()}
        kind = next((kind for kind, is_one in kinds.items() if is_one), "device")
        raise InputError(f"{path}: is a {kind}, expected a file or a folder")
    return path


def _checked(loader: Callable[..., Any], what: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    valid = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise InputError(f"{what} take no option {', '.join(unknown)}; they take {', '.join(valid)}")
    return options
