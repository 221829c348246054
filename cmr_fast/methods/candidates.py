"""MA2T's candidates: augmentations that lie in files, and which of an original's are taken.

    texts.json     {"123.jpg": ["a caption", ...], ...}
    images.json    {"123.jpg": ["123_0.png", ...], ...}, paths beside it; or a folder with it, or with 123_0.png,
                   123_1.png, ... alone

Top (Figures 3, 5, 6, 8): those whose cosine with the other side's original is highest in a reference model, which
also orders them; random: drawn by the image's id; first: as they stand.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmr_fast._terminal import track
from cmr_fast.data._checks import caption_fault
from cmr_fast.data.augmented import IMAGES
from cmr_fast.data.captions import CaptionedImages
from cmr_fast.data.photos import Photo, Photos
from cmr_fast.errors import InputError
from cmr_fast.methods.loop import load_model
from cmr_fast.methods.method import CaptionRetriever
from cmr_fast.models.clip import OPEN_CLIP, TRANSFORMERS, dual_encoder
from cmr_fast.models.dual import DualEncoder

SELECTIONS = ("first", "top", "random")
_IMAGES = 64  # that go through a tower at a time
_NUMBERED = re.compile(r"(.+)_(\d+)\.(?:png|jpe?g|webp|bmp)", re.IGNORECASE)
T = TypeVar("T")


def names_of(split: CaptionedImages) -> list[str]:
    """What images are called in a file: by their photo, or by their id where they have none.

    Parameters
    ----------
    split
        N images.
    """
    if isinstance(split.image, Photos):
        return [str(split.image.name(row)) for row in range(len(split))]
    return [str(label) for label in split.labels.tolist()]


def texts_in(file: Path, split: CaptionedImages, least: int) -> list[list[str]]:
    """The texts that a file has for each image of a split.

    Parameters
    ----------
    file
        JSON {image name: [texts]}.
    split
        N images.
    least
        How many of each are needed.

    Raises
    ------
    InputError
        For a file of another form, with names of images that the data set does not have, or with too few texts.
    """
    stored = _named(file, _lists(file, "texts that have words"), split)
    names = names_of(split)
    _refuse_few(file, "texts", {name: len(stored.get(name, ())) for name in names}, least)
    return [stored[name] for name in names]


def images_in(place: Path, split: CaptionedImages, least: int) -> list[list[Photo]]:
    """The image files that a JSON file or a folder has for each image of a split.

    Parameters
    ----------
    place
        JSON {image name: [paths]}, absolute or beside it; or a folder: by the images.json in it, and without one by
        NAME_NUMBER.png of NAME.jpg, in the order of the numbers.
    split
        N images.
    least
        How many of each are needed.

    Raises
    ------
    InputError
        For neither, with names of images that the data set does not have, too few images, or files that are not there.
    """
    names = names_of(split)
    if (place / IMAGES).is_file():
        place = place / IMAGES
    if place.is_dir():
        found = _named(place, _numbered(place), split, suffixes=False)
        by_name = {name: found.get(_stem(name), []) for name in names}
    elif place.suffix == ".json":
        stored = _named(place, _lists(place, "paths of images"), split)
        by_name = {name: [place.parent / path for path in stored.get(name, ())] for name in names}
    else:
        raise InputError(
            f"augment_image must be none, randaug, or a folder or .json file of images, got {str(place)!r}, which is "
            "no folder"
        )
    _refuse_few(place, "images", {name: len(paths) for name, paths in by_name.items()}, least)
    every = [path for paths in by_name.values() for path in paths]
    if missing := [path for path in every if not path.is_file()]:
        raise InputError(f"{place}: {len(missing)} of its {len(every)} images are not there, {missing[0]} first")
    return [[Photo(str(path), path) for path in by_name[name]] for name in names]


def photos_like(files: Sequence[Photo], split: CaptionedImages) -> Photos:
    """Photos of the size that a split's images have.

    Parameters
    ----------
    files
        M of them.
    split
        Images of H x H.

    Raises
    ------
    InputError
        Where the split's are not square.
    """
    height, width = split.image.shape[2:]
    if height != width:
        raise InputError(f"images from files are cut to squares, got a data set of {height} x {width}")
    return Photos(files, height)


def _lists(file: Path, of: str) -> dict[str, list[str]]:
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(stored, dict) or not all(
        isinstance(values, list) and all(isinstance(value, str) and caption_fault(value) is None for value in values)
        for values in stored.values()
    ):
        raise InputError(f"{file}: expected an object of image names, each with a list of {of}")
    return stored


def _numbered(folder: Path) -> dict[str, list[Path]]:
    """Stem -> its files, by number."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.rglob("*"):
        if match := _NUMBERED.fullmatch(path.relative_to(folder).as_posix()):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {stem: [path for _, path in sorted(paths)] for stem, paths in found.items()}


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _named(place: Path, given: dict[str, T], split: CaptionedImages, suffixes: bool = True) -> dict[str, T]:
    """What is given by image, under the images' whole names; a name may lack the folder where no other has it.

    InputError for names that no image of the data set has; those of the other splits are known too.
    """
    if not isinstance(split.image, Photos):
        unknown, found = [name for name in given if not name.isdecimal()], given
    else:
        known = {str(photo.name) if suffixes else _stem(str(photo.name)) for photo in split.image.files}
        count = Counter(Path(name).name for name in known)
        whole = {Path(name).name: name for name in known if count[Path(name).name] == 1} | {
            name: name for name in known
        }
        unknown = [name for name in given if name not in whole]
        found = {whole[name]: values for name, values in given.items() if name in whole}
    if unknown:
        expected = names_of(split)[0] if suffixes else f"{_stem(names_of(split)[0])}_0.png"
        raise InputError(
            f"{place}: names {len(unknown)} of {len(given)} images that are not in the data set, {unknown[0]!r} first; "
            f"expected names like {expected!r}"
        )
    return found


def _refuse_few(place: Path, what: str, counts: dict[str, int], least: int) -> None:
    if few := [name for name, count in counts.items() if count < least]:
        raise InputError(
            f"{place}: expected {least} {what} for each training image (augment_count): {len(few)} of {len(counts)} "
            f"have fewer, {few[0]} has {counts[few[0]]}"
        )


# ---- which are taken


def reference_model(name: str) -> DualEncoder:
    """The dual encoder that alignment is measured in.

    Parameters
    ----------
    name
        A run on captions, or a pretrained model by name (open_clip/NAME@WEIGHTS, transformers/FOLDER).

    Raises
    ------
    InputError
        Where there is none.
    """
    if Path(name).exists():
        model: Any = load_model(name)
        if not isinstance(model, CaptionRetriever):
            raise InputError(f"{name}: a run of {model.name}, expected one on captions (clip) as the reference")
        dual = model.dual
    elif name.startswith((OPEN_CLIP, TRANSFORMERS)):
        dual = dual_encoder(name)
    else:
        raise InputError(
            f"there is no reference model at {name}: expected a run on captions (`cmr-fast train clip`), or a name "
            f"such as {OPEN_CLIP}ViT-B-16-quickgelu@openai"
        )
    return dual.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def seen_images(dual: DualEncoder, images: Photos | Tensor) -> Tensor:
    """Embeddings of images, float (N, d) on the CPU.

    Parameters
    ----------
    dual
        In evaluation mode.
    images
        Photos, or uint8 (N, 3, H, W).
    """
    where = dual.log_scale
    parts = []
    for rows in track(list(torch.arange(len(images)).split(_IMAGES)), "images through the reference"):
        part = images[rows]
        pixels = part.pixels() if isinstance(part, Photos) else part
        parts.append(dual.encode_image(pixels.to(where.device, where.dtype) / 255).cpu())
    return torch.cat(parts)


def text_scores(dual: DualEncoder, split: CaptionedImages, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """cos(f(I), g(T_aug)) of each image's texts: N arrays.

    Parameters
    ----------
    dual
        The reference.
    split
        N images.
    texts
        Of each of them some, or none.
    """
    counts = [len(row) for row in texts]
    owner = torch.repeat_interleave(torch.tensor(counts))
    text = dual.embedded_texts([text for row in texts for text in row]).cpu()
    return _apart((seen_images(dual, split.image)[owner] * text).sum(dim=1), counts)


def image_scores(dual: DualEncoder, split: CaptionedImages, files: Sequence[Sequence[Photo]]) -> list[np.ndarray]:
    """cos(f(I_aug), g(T)) of each image's augmented images with its first caption: N arrays.

    Parameters
    ----------
    dual
        The reference.
    split
        N images.
    files
        Of each of them some, or none.
    """
    counts = [len(row) for row in files]
    owner = torch.repeat_interleave(torch.tensor(counts))
    image = seen_images(dual, photos_like([file for row in files for file in row], split))
    text = dual.embedded_texts([row[0] for row in split.text]).cpu()
    return _apart((image * text[owner]).sum(dim=1), counts)


def _apart(values: Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    return [part.numpy() for part in values.split(list(counts))]


def taken(
    candidates: Sequence[Sequence[T]], count: int, select: str, labels: Sequence[int],
    scores: Sequence[np.ndarray] | None = None,
) -> list[list[T]]:  # fmt: skip
    """`count` of each original's candidates.

    Parameters
    ----------
    candidates
        Of each original, at least `count`.
    count
        How many are taken.
    select
        Of SELECTIONS.
    labels
        The originals' ids, which random draws depend on.
    scores
        Of all candidates, for "top": the highest first, of equals the first.
    """
    if select == "first":
        return [list(row[:count]) for row in candidates]
    if select == "random":
        orders = [
            np.random.default_rng(label).permutation(len(row)) for row, label in zip(candidates, labels, strict=True)
        ]
    else:
        assert scores is not None
        orders = [np.argsort(-score, kind="stable") for score in scores]
    return [[row[i] for i in order[:count]] for row, order in zip(candidates, orders, strict=True)]
