"""Images with their captions: Karpathy's JSON, tables of paths and captions, webdataset tars.

An image has one caption or several, of any number. All of them are known to whoever trains on the images (each is a
positive of its image) and to whoever measures retrieval. Photos are read when they are asked for.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmr_fast.data._checks import caption_fault, check_count, check_text
from cmr_fast.data.pairs import as_tensor, held_out, shape_seen
from cmr_fast.data.photos import Photo, Photos, find_photos, tar_members, tar_samples
from cmr_fast.data.split import Parts
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed

SPLITS = ("train", "val", "test")
TABLES = (".csv", ".tsv", ".txt", ".token")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_TOKENS = re.compile(r"[^\t]+#\d+\t")
"""How a line of Flickr's .token files begins."""
_COLUMNS = {
    "image": ("image", "path", "filepath", "file", "filename", "image_name", "file_name", "image_path"),
    "caption": ("caption", "title", "text", "sentence", "raw", "comment", "description"),
    "split": ("split",),
}
"""Names of a table's columns, in lower case."""
CAPTION_NAMES = _COLUMNS["caption"]


@dataclass(frozen=True, repr=False)
class CaptionedImages(Parts):
    """N images with one or more captions each. A `cmr_fast.data.split.Split`.

    Parameters
    ----------
    image : Photos or Tensor
        Photos on disk, or uint8 (N, 3, H, W).
    text : sequence of tuple of str
        N tuples, the captions of each image.
    labels : Tensor
        int64 (N,), which image each is: what tells a caption's own image from all others.
    rows : Tensor, optional
        int64 (N,), which rows of a split a batch holds; None of a split.

    Raises
    ------
    InputError
        Where a part has another type, dtype or number of rows, or a caption is missing or empty.
    """

    image: Photos | Tensor
    text: Sequence[tuple[str, ...]]
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image, Photos):
            image = as_tensor(self.image, "image", "Photos, a tensor")
            if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
                raise InputError(f"images must be uint8 (N, 3, H, W), got {image.dtype} {shape_seen(image)}")
            object.__setattr__(self, "image", image)
        labels = as_tensor(self.labels, "labels")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise InputError(f"labels must be int64 (N,), one id an image, got {labels.dtype} {tuple(labels.shape)}")
        object.__setattr__(self, "labels", labels)
        text = self.text
        if not isinstance(text, list | tuple) or not all(
            isinstance(row, list | tuple) and all(isinstance(caption, str) for caption in row) for row in text
        ):
            raise InputError("text must be N tuples of captions, one tuple an image")
        object.__setattr__(self, "text", tuple(tuple(row) for row in text))
        sizes = {"image": len(self.image), "text": len(text), "labels": len(labels)}
        if len(set(sizes.values())) != 1:
            raise InputError(f"image, text and labels must have the same number of rows, got {sizes}")
        for row, captions in enumerate(text):
            fault = next(filter(None, map(caption_fault, captions)), None) if captions else "none"
            if fault is not None:
                raise InputError(f"every image needs captions with words, image {row} has {fault}")

    def pixels(self) -> Tensor:
        """float32 (N, 3, H, W) from 0 to 1; photos are read now."""
        image = self.image.pixels() if isinstance(self.image, Photos) else self.image
        return image.float() / 255

    def captions(self) -> tuple[list[str], Tensor]:
        """All captions, M of them image by image, and int64 (M,): the row of each one's image."""
        owner = torch.repeat_interleave(torch.tensor([len(row) for row in self.text], dtype=torch.int64))
        return [caption for row in self.text for caption in row], owner


@dataclass(frozen=True, repr=False)
class CaptionedDataset:
    """Train and test splits of images with captions, and what `hold_out` takes from train.

    Parameters
    ----------
    name : str
        What results are reported under.
    train, test : CaptionedImages
        The splits, images of one size.
    valid : CaptionedImages, optional
        To choose by during training.

    Raises
    ------
    InputError
        Where a split is empty or has images of another size.
    """

    name: str
    train: CaptionedImages
    test: CaptionedImages
    valid: CaptionedImages | None = None

    def __post_init__(self) -> None:
        splits = {"train": self.train, "test": self.test, "valid": self.valid}
        for name, split in splits.items():
            if split is None and name == "valid":
                continue
            if not isinstance(split, CaptionedImages):
                raise InputError(f"{self.name}: the {name} split must be CaptionedImages, got {type(split).__name__}")
            if not len(split):
                raise InputError(f"{self.name}: the {name} split is empty, it needs at least one image")
        shapes = {tuple(split.image.shape[1:]) for split in splits.values() if split is not None}
        if len(shapes) != 1:
            raise InputError(f"{self.name}: images must have one size over all splits, got {sorted(shapes)}")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} {self.name}"]
        for name in ("train", "valid", "test"):
            if (split := getattr(self, name)) is not None:
                lines.append(f"  {name:<6}{split!r}, {sum(map(len, split.text))} captions")
        return "\n".join(lines)

    @property
    def query(self) -> CaptionedImages:
        """The test split: its images are the queries of text retrieval, its captions those of image retrieval."""
        return self.test

    @property
    def database(self) -> CaptionedImages:
        """The test split, which is ranked within itself."""
        return self.test

    def hold_out(self, fraction: float, seed: int) -> "CaptionedDataset":
        """Move about `fraction` of the training images to `valid`: the same for one seed."""
        held = held_out(self.train.labels[:, None], fraction, seed)
        valid, train = (self.train.select(rows.nonzero()[:, 0]) for rows in (held, ~held))
        return replace(self, train=replace(train, rows=None), valid=replace(valid, rows=None))


class Item(NamedTuple):
    """An image as a file of captions has it: its name, its split ("" where none is said), its captions, its photo."""

    image: str
    split: str
    captions: tuple[str, ...]
    photo: Photo | None = None


def holds(path: Path) -> bool:
    """Whether captions lie there: a file of them, a folder with one, or a tar of webdataset."""
    if path.is_dir():
        return file_in(path) is not None or bool(_shards(path))
    return _kind(path) is not None


def load(
    path: str | os.PathLike[str],
    *,
    size: int = 128,
    captions: int | None = None,
    photos: str | None = None,
    broken: Literal["refuse", "skip"] = "refuse",
    cache: str | None = None,
    seed: int = 0,
) -> CaptionedDataset:
    """Read images with captions.

    - dataset_*.json, Karpathy's (Flickr8k, Flickr30k, COCO); its split restval is training data
    - a table .csv, .tsv or .txt with a line of column names: image (path, filepath, …) and caption (title, text, …),
      one caption a row, separated by comma, tab, bar or semicolon; perhaps split
    - Flickr's .token files: name#number, tab, caption
    - .tar files of webdataset: a photo and a .txt or .json of the same name

    Where splits are not named, a tenth of the images, drawn with `seed`, is test.

    Parameters
    ----------
    path : str or path
        The file, or a folder with one such file.
    size : int
        Pixels a side: photos are scaled to it on the shorter side, the middle is cut out.
    captions : int, optional
        Keep the first so many captions of an image; 1 is the protocol of one caption an image. None keeps all.
    photos : str, optional
        The folder, or the tar, of the photos. None: Images, Flicker8k_Dataset, flickr30k-images or images beside the
        file, or the file's own folder, or the tars there.
    broken : {"refuse", "skip"}
        What to do with photos that are missing or damaged, and with captions without words. "skip" leaves them out and
        says how many; it decodes every photo at once.
    cache : str, optional
        The folder that keeps decoded photos, 3 size^2 bytes each. None: cmr_fast in $XDG_CACHE_HOME or ~/.cache.
    seed : int
        Of the draw of a test split.

    Returns
    -------
    CaptionedDataset
        train, test, and valid where the file has a split val.

    Raises
    ------
    InputError
        Where captions or photos are missing or damaged, named.
    """
    check_count("size", size, least=16)
    if captions is not None:
        check_count("captions", captions)
    check_text("photos", photos)
    check_text("cache", cache)
    if broken not in ("refuse", "skip"):
        raise InputError(f"broken must be refuse or skip, got {broken!r}")
    seed = as_seed(seed)
    file = Path(path)
    if file.is_dir():
        found = file_in(file)
        file = file if found is None else found
    if shards := _shards(file):
        items = _webdataset(shards)
    else:
        items = read_items(file)
        places = [] if photos is None else [_place(photos)]
        found_photos = find_photos(file.parent, [item.image for item in items], places)
        items = [item._replace(photo=photo) for item, photo in zip(items, found_photos, strict=True)]
    skipped: list[str] = []
    items = _usable(file, items, captions, skipped if broken == "skip" else None)
    dataset = _dataset(file, items, size, cache, seed, skipped if broken == "skip" else None)
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        print(f"{file}: left out {', '.join(skipped[:3])}{more}", file=sys.stderr)
    return dataset


def read_items(file: Path) -> list[Item]:
    """What a file of captions says, each image once, in the order of the file.

    Raises
    ------
    InputError
        Where it is damaged or another file.
    """
    try:
        if _kind(file) == "json":
            return karpathy(file)
        if _kind(file) == "table":
            return _table(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise InputError(f"{file}: damaged, not a table of one caption a row ({error})") from error
    raise InputError(
        f"{file}: no captions found; expected Karpathy's dataset_*.json, a table ({', '.join(TABLES)}) with columns "
        "image and caption, or .tar files of webdataset"
    )


def karpathy(file: Path) -> list[Item]:
    """The images of a JSON in Karpathy's format. InputError where it is damaged or another file."""
    try:
        images = json.loads(file.read_bytes())["images"]
        items = [
            Item(
                "/".join(str(part) for part in (i.get("filepath"), i["filename"]) if part),
                str(i["split"]),
                tuple(_raw(sentence["raw"]) for sentence in i["sentences"]),
            )
            for i in images
        ]
    except FileNotFoundError as error:
        raise InputError(f"{file}: not found; it holds captions and splits") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: damaged or another file; expected images with filename, split and sentences, each with raw "
            f"({type(error).__name__}: {error})"
        ) from error
    for name, split, *_ in items:
        if split not in (*SPLITS, "restval"):
            raise InputError(f"{file}: {name} is of split {split!r}; expected train, restval, val or test")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{file}: expected file names without folders above or paths from the root, got {name!r}")
    return _once(file, (item._replace(split="train" if item.split == "restval" else item.split) for item in items))


def _raw(caption: object) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"raw is {caption!r:.60}, not a text")
    return caption


def _table(file: Path) -> list[Item]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not text in UTF-8 ({error})") from error
    lines = text.splitlines()
    if lines and _TOKENS.match(lines[0]):
        pairs = [line.split("\t", 1) for line in lines if line.strip()]
        if wrong := next((number for number, pair in enumerate(pairs, 1) if len(pair) != 2), None):
            raise InputError(f"{file}: line {wrong} is not name#number, tab, caption")
        return _once(file, (Item(name.rpartition("#")[0], "", (caption,)) for name, caption in pairs))
    columns = _columns(lines[0]) if lines else None
    if columns is None:
        raise InputError(
            f"{file}: expected a first line that names the columns image (or path, filepath, …) and caption (or title, "
            f"text, …), got {lines[0][:80] if lines else 'an empty file'!r}"
        )
    delimiter, head, places = columns
    items = []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for number, row in enumerate(rows, 1):
        if not row or number == 1:
            continue
        if len(row) != len(head):
            raise InputError(f"{file}: row {number} has {len(row)} columns, the first line names {len(head)}")
        split = row[places["split"]].strip() if "split" in places else ""
        split = {"valid": "val", "validation": "val", "restval": "train"}.get(split, split)
        if "split" in places and split not in SPLITS:
            raise InputError(f"{file}: row {number} is of split {split!r}; expected train, val or test")
        items.append(Item(row[places["image"]].strip(), split, (row[places["caption"]],)))
    return _once(file, items)


def _columns(line: str) -> tuple[str, list[str], dict[str, int]] | None:
    """What separates a table's columns, their names, and where image, caption and split are; None of another line."""
    for delimiter in ",\t|;":
        head = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
        found = {what: [head.index(name) for name in names if name in head] for what, names in _COLUMNS.items()}
        places = {what: where[0] for what, where in found.items() if where}
        if "image" in places and "caption" in places:
            return delimiter, head, places
    return None


def is_table(file: Path) -> bool:
    """Whether a text file begins as a table of images and captions does, or as Flickr's tokens."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = next(lines, "").rstrip("\n")
        return _TOKENS.match(first) is not None or _columns(first) is not None
    except (UnicodeDecodeError, csv.Error):
        return False


def _webdataset(shards: Sequence[Path]) -> list[Item]:
    items = []
    for shard in shards:
        for parts in tar_samples(shard).values():
            photo = next((parts[ending] for ending in PHOTO_SUFFIXES if ending in parts), None)
            texts = [parts[ending] for ending in (".txt", ".json") if ending in parts]
            if photo is None or not texts:
                continue
            items.append(Item(f"{shard.name}/{photo.name}", "", captions_of(texts[0]), photo))
    if not items:
        raise InputError(f"{shards[0]}: no photo with a .txt or .json of the same name in it")
    return items


def captions_of(member: Photo) -> tuple[str, ...]:
    """The captions in a .txt (one a line) or .json of a tar. InputError where there is none."""
    return captions_in(member, member.read())


def captions_in(member: Photo, data: bytes) -> tuple[str, ...]:
    """As `captions_of`, of a member that was read."""
    try:
        if not member.name.endswith(".json"):
            return tuple(line for line in data.decode("utf-8").splitlines() if line.strip())
        value = json.loads(data)
        found = next((value[name] for name in (*CAPTION_NAMES, "captions") if name in value), None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{member.path}: {member.name} is no caption ({error})") from error
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{member.path}: {member.name} has no caption, expected a text under the key caption")
    return tuple(captions)


def _once(file: Path, items: Iterable[Item]) -> list[Item]:
    """Each image once, with all its captions. InputError where it is in two splits."""
    whole: dict[str, Item] = {}
    for item in items:
        before = whole.setdefault(item.image, item._replace(captions=()))
        if before.split != item.split:
            raise InputError(f"{file}: {item.image} is in two splits, {before.split} and {item.split}")
        whole[item.image] = before._replace(captions=(*before.captions, *item.captions))
    return list(whole.values())


def _usable(file: Path, items: Sequence[Item], count: int | None, skipped: list[str] | None) -> list[Item]:
    """Images that are there, with captions that say something; `skipped` names the others, or they are refused."""
    kept = []
    missing = [item.image for item in items if item.photo is None]
    if missing and skipped is None:
        raise InputError(
            f"{file}: names {len(missing)} of {len(items)} photos that are not there, {missing[0]} first; expected "
            "photos=FOLDER, or broken=skip to leave them out"
        )
    for item in items:
        captions = tuple(caption for caption in item.captions if caption_fault(caption) is None)
        if len(captions) != len(item.captions) or not captions:
            what = next(filter(None, map(caption_fault, item.captions)), "no caption")
            if skipped is None:
                raise InputError(f"{file}: {item.image} has {what}; expected words, or broken=skip")
            if captions:
                skipped.append(f"{what} of {item.image}")
        if item.photo is None or not captions:
            assert skipped is not None
            skipped.append(item.image)
        else:
            kept.append(item._replace(captions=captions[:count]))
    if not kept:
        raise InputError(f"{file}: no image with a caption, expected at least two")
    return kept


def _dataset(
    file: Path, items: list[Item], size: int, cache: str | None, seed: int, skipped: list[str] | None
) -> CaptionedDataset:
    photos = Photos([item.photo for item in items if item.photo is not None], size, cache)
    whole = CaptionedImages(photos, tuple(item.captions for item in items), torch.arange(len(items)))
    kept = torch.ones(len(items), dtype=torch.bool)
    if skipped is not None:
        for row in photos.broken():
            kept[row] = False
            skipped.append(items[row].image)
    splits = [item.split for item in items]
    if not any(splits):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
        test = torch.zeros(len(items), dtype=torch.bool)
        test[order[: max(1, len(items) // 10)]] = True
        splits = ["test" if chosen else "train" for chosen in test.tolist()]
    rows = {s: torch.tensor([i for i, split in enumerate(splits) if split == s and kept[i]]).long() for s in SPLITS}
    for split in ("train", "test"):
        if not len(rows[split]):
            raise InputError(f"{file}: the {split} split has no image, it needs at least one")
    parts = {split: replace(whole.select(chosen), rows=None) for split, chosen in rows.items() if len(chosen)}
    return CaptionedDataset(_name(file), parts["train"], parts["test"], valid=parts.get("val"))


def _name(file: Path) -> str:
    stem = file.stem.removeprefix("dataset_")
    return stem if stem not in ("captions", "results") else file.resolve().parent.name


def _kind(file: Path) -> str | None:
    if not file.is_file():
        return None
    if file.suffix == ".json":
        return "json"
    return "table" if file.suffix in TABLES else "shard" if file.suffix == ".tar" else None


def file_in(folder: Path) -> Path | None:
    """The one file of captions in a folder: dataset_*.json, captions.*, results.csv, or Flickr's tokens."""
    patterns = ("dataset_*.json", "captions.*", "results.csv", "*.token.txt", "*.token")
    for pattern in patterns:
        files = [file for file in sorted(folder.glob(pattern)) if _kind(file) in ("json", "table")]
        if len(files) > 1:
            raise InputError(f"{folder}: several files of captions, {', '.join(f.name for f in files)}; name one")
        if files:
            return files[0]
    return None


def _shards(path: Path) -> list[Path]:
    """Tars of webdataset: the file itself, or all of a folder where the first has captions in it."""
    tars = [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar")) if path.is_dir() else []
    if not tars:
        return []
    names = tar_members(tars[0])
    return tars if any(name.endswith((".txt", ".json")) for name in names) else []


def _place(photos: str) -> Path:
    place = Path(photos).expanduser()
    if not place.exists():
        raise InputError(f"photos={photos!r}: no such folder or tar")
    return place
