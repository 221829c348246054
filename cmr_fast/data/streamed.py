"""Images with captions whose training split is a stream of shards, read while it is trained on and never held.

The order is that of `cmr_fast.data.streams`, by seed and pass; a batch of a training is a stretch of it, whoever reads
it. Over ranks every rank lists the shards and reads the captions of a whole batch, as its loss needs them, and reads
and decodes the photos of its own rows. Broken pairs are found by the rank that decodes them and left out by all.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cmr_fast._terminal import track
from cmr_fast.data import captions, catalogue
from cmr_fast.data._checks import check_count, check_text
from cmr_fast.data._stream_shards import PARQUET, TAR, ParquetShard, Sample, TarShard
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.photos import WORKERS, Photo, Photos
from cmr_fast.data.streams import Stream, is_pattern, stream_files, value_of
from cmr_fast.errors import InputError

_AHEAD = 2  # batches whose photos are decoded while one is trained on


class Share(NamedTuple):
    """Which rows of a batch this rank decodes, and lists of all ranks one after the other."""

    own: Callable[[int], slice] = slice
    joined: Callable[[list[Any]], list[Any]] = list


class StreamedImages:
    """Pairs of photo and captions in shards: a training split that gives batches in the order of a stream.

    Parameters
    ----------
    files : sequence of Path
        Tars or Parquet files, see `cmr_fast.data.stream`.
    size, image, text, buffer, broken
        As of `stream_captions`.
    """

    def __init__(
        self, files: Sequence[Path], *, size: int, image: str | None, text: str | None, buffer: int, broken: str
    ) -> None:
        make = TarShard if files[0].suffix.lower() == TAR else ParquetShard
        self.files, self.size, self.broken = tuple(files), size, broken
        self._shards = tuple(make(file, image, text) for file in files)
        self._buffer, self._asked = buffer, (image, text)
        self._captions: int | None = None
        for _, _, sample in self._reader(None, buffer=1).samples():
            if not isinstance(sample.image, bytes | Photo) or isinstance(sample.text, np.ndarray | bytes | Photo):
                seen = [_kind(side) for side in (sample.image, sample.text)]
                raise InputError(f"{sample.name} is {seen[0]} and {seen[1]}; expected a photo and captions")
            break
        for shard in self._shards:
            shard.close()

    @cached_property
    def _begin(self) -> np.ndarray:
        """The number of each file's first pair; counted once, by the headers of tars and the footers of Parquet."""
        counts = [0]
        for shard in track(self._shards, "counting the pairs of the stream"):
            counts.append(len(shard))
            shard.close()
        return np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._begin[-1])

    def __repr__(self) -> str:
        return f"StreamedImages({len(self)} in {len(self.files)} files, {self.size} x {self.size})"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StreamedImages":
        """Itself: nothing of it is held."""
        return self

    def first(self, count: int) -> "StreamedImages":
        """With the first so many captions of each image; 0: all."""
        part = copy(self)
        part._captions = count or None
        return part

    def fingerprint(self) -> int:
        """A checksum of the files' names and lengths, and of all that the order and the pairs depend on."""
        told = [(file.name, file.stat().st_size) for file in self.files]
        return zlib.crc32(f"{told} {self.size} {self._asked} {self._buffer} {self.broken}".encode())

    def batches(
        self,
        steps: range,
        per_pass: int,
        batch_size: int,
        seed: int | None,
        left_out: list[str],
        share: Share | None = None,
    ) -> Iterator[tuple[int, CaptionedImages]]:
        """The batches of some steps of a training, photos decoded ahead by threads.

        Parameters
        ----------
        steps : range
            From 0 over the whole training.
        per_pass, batch_size : int
            Steps of a pass, which begins anew after so many, and pairs of a step. A last batch may be smaller.
        seed : int, optional
            Of the order. None: that of the files.
        left_out : list of str
            Gets the names of broken pairs, of all ranks.
        share : Share, optional
            What of a batch is this rank's. None: all of it.

        Yields
        ------
        step, batch : int, CaptionedImages
            `labels` number the pairs of all files, `rows` those of the pass. Batches of which less than two pairs are
            whole are left out.

        Raises
        ------
        InputError
            For damaged files, and broken pairs unless they are to be skipped; on all ranks.
        """
        share = share or Share()
        pool = ThreadPoolExecutor(WORKERS)
        waiting: deque[_Batch] = deque()
        try:
            for batch in self._drawn(steps, per_pass, batch_size, seed, pool):
                batch.start(range(len(batch.samples))[share.own(len(batch.samples))])
                waiting.append(batch)
                if len(waiting) > _AHEAD:
                    yield from self._whole(waiting.popleft(), share, left_out)
            while waiting:
                yield from self._whole(waiting.popleft(), share, left_out)
        finally:
            pool.shutdown(cancel_futures=True)

    def _reader(self, seed: int | None, buffer: int | None = None) -> Stream:
        return Stream(
            self._shards, 1, size=self.size, shuffle=seed is not None, seed=seed or 0,
            buffer=buffer or self._buffer, rank=0, world=1, drop_last=False, broken=self.broken,
        )  # fmt: skip

    def _drawn(
        self, steps: range, per_pass: int, batch_size: int, seed: int | None, pool: ThreadPoolExecutor
    ) -> Iterator["_Batch"]:
        """Whole batches, nothing of them decoded."""
        reader = self._reader(seed)
        pairs: Iterator[tuple[int, int, Sample]] = iter(())
        for step in steps:
            number, place = divmod(step, per_pass)
            first = place * batch_size
            if step == steps.start or place == 0:
                reader.seek(number, first)
                pairs = reader.samples()
            count = min(batch_size, len(self) - first)
            taken = [next(pairs) for _ in range(count)]
            labels = [int(self._begin[shard]) + row for shard, row, _ in taken]
            yield _Batch(step, first, labels, [sample for _, _, sample in taken], self.size, pool)

    def _whole(self, batch: "_Batch", share: Share, left_out: list[str]) -> Iterator[tuple[int, CaptionedImages]]:
        """The batch without its broken pairs, where there is anything left to train on."""
        own = range(len(batch.samples))[share.own(len(batch.samples))]
        faults = dict(share.joined(batch.faults(own)))
        if faults and self.broken == "refuse":
            raise InputError(faults[min(faults)])
        left_out += [batch.samples[row].name for row in sorted(faults)]
        kept = [row for row in range(len(batch.samples)) if row not in faults]
        if len(kept) > 1:
            yield batch.step, batch.images(kept, self._captions)


class _Batch:
    """The pairs of a step, and their photos in the making: a `Store` of photos."""

    def __init__(
        self, step: int, first: int, labels: list[int], samples: list[Sample], size: int, pool: ThreadPoolExecutor
    ) -> None:
        self.step, self.first, self.labels, self.samples, self.size = step, first, labels, samples, size
        self._pool = pool
        self._photos: dict[int, Future[np.ndarray | InputError]] = {}

    def start(self, rows: Iterable[int]) -> None:
        """Have photos decoded."""
        for row in rows:
            if row not in self._photos:
                self._photos[row] = self._pool.submit(_decoded, self.size, self.samples[row])

    def faults(self, rows: Iterable[int]) -> list[tuple[int, str]]:
        """Of these rows those that are broken, and what is wrong."""
        found = []
        for row in rows:
            sample, photo = self.samples[row], self._photos[row].result()
            try:
                value_of(sample.name, sample.text, self.size)
                if isinstance(photo, InputError):
                    raise photo
            except InputError as error:
                found.append((row, str(error)))
        return found

    def images(self, rows: Sequence[int], captions: int | None) -> CaptionedImages:
        """The pairs of some rows, with so many captions each."""
        photos = Photos.held_by(self, [Photo(sample.name, Path()) for sample in self.samples], self.size)
        text: list[Any] = [self.samples[row].text for row in rows]
        labels = torch.tensor([self.labels[row] for row in rows])
        places = torch.tensor(rows)
        return CaptionedImages(photos[places], [row[:captions] for row in text], labels, places + self.first)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """uint8 (n, 3, size, size), the first error raised."""
        wrong = next((error for error in self.fill(rows) if error is not None), None)
        if wrong is not None:
            raise wrong
        return np.stack([np.asarray(self._photos[row].result()) for row in rows])

    def fill(self, rows: Sequence[int]) -> list[InputError | None]:
        """Decode what is not decoded yet: what is wrong with each row."""
        self.start(rows)
        photos = [self._photos[row].result() for row in rows]
        return [photo if isinstance(photo, InputError) else None for photo in photos]

    def digest(self, rows: Iterable[int], places: bool = False) -> str:
        """Of the names of the pairs."""
        return f"{zlib.crc32(repr([self.samples[row].name for row in rows]).encode()):08x}"


def _decoded(size: int, sample: Sample) -> np.ndarray | InputError:
    photo = sample.image.read() if isinstance(sample.image, Photo) else sample.image  # a disk that fails is no pair
    try:
        return np.asarray(value_of(sample.name, photo, size))
    except InputError as error:
        return error


def _kind(side: Any) -> str:
    if isinstance(side, np.ndarray):
        return f"{side.dtype} {side.shape}"
    return "a file" if isinstance(side, bytes | Photo) else "captions"


@dataclass(frozen=True, repr=False)
class StreamedDataset(CaptionedDataset):
    """A training split that is streamed, with test and validation splits of images that are held.

    Parameters
    ----------
    name : str
        What results are reported under.
    train : StreamedImages
        The stream.
    test : CaptionedImages
        Images of its size.
    valid : CaptionedImages, optional
        To choose by during training.

    Raises
    ------
    InputError
        Where a split is empty or has images of another size.
    """

    train: Any

    def __post_init__(self) -> None:
        if not isinstance(self.train, StreamedImages):
            raise InputError(f"{self.name}: train must be StreamedImages, got {type(self.train).__name__}")
        size = (3, self.train.size, self.train.size)
        for name, split in {"test": self.test, "valid": self.valid}.items():
            if split is None and name == "valid":
                continue
            if not isinstance(split, CaptionedImages) or not len(split):
                raise InputError(f"{self.name}: the {name} split must be CaptionedImages, one at least")
            if tuple(split.image.shape[1:]) != size:
                raise InputError(
                    f"{self.name}: images of the {name} split must be {size} as those of the stream, got "
                    f"{tuple(split.image.shape[1:])}"
                )

    def __repr__(self) -> str:
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return "\n".join([f"{type(self).__name__} {self.name}", *(f"  {n:<6}{s!r}" for n, s in splits.items() if s)])

    def hold_out(self, fraction: float, seed: int) -> "StreamedDataset":
        """InputError: what of a stream is for validation is said beforehand."""
        raise InputError(
            f"{self.name}: nothing is held out of a stream for validation; expected valid=PATH (--valid), a test data "
            "set that has a validation split, or valid_fraction 0 to train without"
        )


def stream_captions(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    test: str | os.PathLike[str],
    valid: str | os.PathLike[str] | None = None,
    size: int = 128,
    image: str | None = None,
    text: str | None = None,
    buffer: int = 4096,
    broken: Literal["refuse", "skip"] = "refuse",
) -> StreamedDataset:
    """Images with captions to train on from shards that memory does not hold.

    Parameters
    ----------
    path : path, or sequence of paths
        Shards of the training pairs: .tar or .parquet files, a folder of them, or a pattern such as "shards/*.tar".
    test : path
        What results are measured on: a data set that `load_captions` reads, of which its test split is taken, or other
        shards, all pairs of them. It is held.
    valid : path, optional
        What is chosen by during training, likewise: a data set's validation split, or other shards. None: the
        validation split of the `test` data set, where it has one.
    size : int
        Pixels a side of photos, as in `load_captions`.
    image, text, buffer
        As of `cmr_fast.data.stream`.
    broken : {"refuse", "skip"}
        As of `cmr_fast.data.stream`: "skip" leaves broken pairs out and counts them in the log.

    Returns
    -------
    StreamedDataset
        For `cmr_fast.methods.loop.train`, which seeds the order. Its training pairs are counted when their number is
        first asked for, without reading them.

    Raises
    ------
    InputError
        Where no shards are there, a side of the pairs is missing or no photos and captions, held-out shards are among
        those to train on, and where the held-out data have no such split.
    """
    size, buffer = check_count("size", size, least=16), check_count("buffer", buffer)
    check_text("image", image)
    check_text("text", text)
    if broken not in ("refuse", "skip"):
        raise InputError(f"broken must be refuse or skip, got {broken!r}")
    files = stream_files(path)
    options: dict[str, Any] = {"size": size, "image": image, "text": text, "broken": broken}
    train = StreamedImages(files, buffer=buffer, **options)
    test_split, test_valid = _held(test, "test", files, options)
    assert test_split is not None
    valid_split = test_valid if valid is None else _held(valid, "valid", files, options)[0]
    name = files[0].stem if len(files) == 1 else files[0].resolve().parent.name
    return StreamedDataset(name, train, test_split, valid_split)


def _held(
    path: str | os.PathLike[str], split: Literal["test", "valid"], train: Sequence[Path], options: dict[str, Any]
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """A split that is held, and the validation split of the data set that it is the test split of."""
    if is_shards(path):
        files = stream_files(path)
        both = {file.resolve() for file in train} & {file.resolve() for file in files}
        if both:
            raise InputError(f"{min(both)}: is trained on and among the {split} shards; expected others there")
        return _all_of(StreamedImages(files, buffer=4096, **options)), None
    dataset = catalogue.load_captions(path, size=options["size"])
    found = getattr(dataset, split)
    if found is None:
        raise InputError(f"{path}: has no validation split; expected a data set that has one, or shards of pairs")
    return found, dataset.valid


def _all_of(shards: StreamedImages) -> CaptionedImages:
    """All pairs of shards, held: undecoded files, that is."""
    left_out: list[str] = []
    batches = [batch for _, batch in shards.batches(range(1), 1, max(1, len(shards)), None, left_out)]
    if not batches:
        raise InputError(f"{shards.files[0]}: expected two pairs or more that are whole, to measure by")
    photos: Any = batches[0].image
    return replace(batches[0], image=photos.pixels(), rows=None)


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path names shards of pairs: tars, Parquet files, a folder of them or a pattern."""
    place = Path(path)
    if place.is_dir():
        return captions.file_in(place) is None and any(f.suffix.lower() in (TAR, PARQUET) for f in place.iterdir())
    return is_pattern(place) or (place.is_file() and place.suffix.lower() in (TAR, PARQUET))
