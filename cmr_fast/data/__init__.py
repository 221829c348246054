"""Data sets: pairs of image and text (`Pairs`, `PairedDataset`, `load`), and labelled images for classifiers (`Images`,
`ImageDataset`, `load_images`).
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmr_fast.data.images import ImageDataset, Images, holds_images, load_images
from cmr_fast.data.native import save_pairs
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError

__all__ = ["ImageDataset", "Images", "PairedDataset", "Pairs", "load", "load_images", "save_pairs"]


def load(path_or_name: str | os.PathLike[str], **options: Any) -> PairedDataset:
    """The data set at a path, or by name: "shapes" is built in, other names are folders or files under $CMR_FAST_DATA.

    What lies there is found by looking:
    a folder with raw_features*.mat   the UCSD Wikipedia set, `cmr_fast.data.wikipedia.load`
    other folders, and files          arrays by their names in .mat, .h5, .npy, .npz, .pkl, `data.features.load`
    Your own features: one .npz with train_image, train_text, train_labels, query_image, …, see `cmr_fast.data.native`;
    `save_pairs` writes it.

    Options go to the function that reads; `help` on it lists them. Raises InputError where nothing is found, the files
    are damaged or do not belong together, or an option is not one of theirs.
    """
    from cmr_fast.data import shapes, wikipedia

    if not os.fspath(path_or_name):
        raise InputError("no data set named: expected a path, a name under $CMR_FAST_DATA or 'shapes', got ''")
    if path_or_name == "shapes":
        return shapes.load(**_checked(shapes.load, "the built-in shapes", options))
    path = _find(Path(path_or_name).expanduser())
    if path.name.startswith("raw_features") and path.is_file():
        path = path.parent
    if path.is_dir() and any((path / name).is_file() for name in wikipedia.FILES["lda"]):
        return wikipedia.load(path, **_checked(wikipedia.load, "Wikipedia", options))
    if path.is_dir() and holds_images(path):
        raise InputError(f"{path}: labelled images without texts; a classifier reads them, with load_images")
    from cmr_fast.data import features as files

    return files.load(path, **_checked(files.load, "such files", options))


def _find(path: Path) -> Path:
    if path.exists():
        return path
    looked = [str(path)]
    root = os.environ.get("CMR_FAST_DATA")
    if root and not path.is_absolute():
        below = Path(root).expanduser() / path
        if below.exists():
            return below
        looked.append(str(below))
    hint = "" if root else "; set CMR_FAST_DATA to a folder of data sets to use bare names"
    raise InputError(f"no data at {' or '.join(looked)}; the built-in set is named 'shapes'{hint}")


def _checked(loader: Callable[..., PairedDataset], what: str, options: dict[str, Any]) -> dict[str, Any]:
    valid = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise InputError(f"{what} take no option {', '.join(unknown)}; they take {', '.join(valid)}")
    return options
