"""Pairs that are streamed from files too large to hold: webdataset tars and Parquet, shuffled and resumed exactly.

The order of an epoch is one order for all who read it. Files are put in an order drawn from (seed, epoch); their
samples, one file after the other, are cut into windows of `buffer` samples, and each window is put in an order drawn
from (seed, epoch, window). Global batch t of `world` ranks is the t-th stretch of `world` x `batch` samples of that
order, of which each rank takes its own stretch of `batch`, and the workers of a rank take batches in turn. So neither
the number of ranks nor that of workers changes what a global batch holds, nothing is read twice or left out, and a
position in the order is all that has to be kept: whoever goes on from it reads the names of one window again.

A sample comes near those of its own file and of files beside it in the order: a window should hold several files.
Every reader lists every file, but reads the bytes of a tar for its own samples alone; of Parquet it reads all rows of
the columns, and decodes its own photos.
"""

import glob
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from cmr_fast.data._checks import caption_fault, check_count, check_text
from cmr_fast.data._stream_shards import (
    PARQUET,
    TAR,
    ParquetShard,
    Sample,
    Shard,
    TarShard,
    Value,
    column_of,
    column_values,
    opened_parquet,
    row_blocks,
)
from cmr_fast.data.photos import Photo, decode
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_integer, as_seed

Side = Tensor | tuple[tuple[str, ...], ...]
_VERSION = 1


class StreamBatch(NamedTuple):
    """Pairs of one reader, and where the order goes on behind them.

    Attributes
    ----------
    image, text : Tensor or tuple of tuple of str
        uint8 (b, 3, size, size) of photos, (b, d) of features as their file has them, or the captions of each pair.
    names : tuple of str
        The file of each pair, and its key or row there.
    state : dict
        For `Stream.load_state_dict`: the order behind the whole global batch that this one is a part of.
    skipped : tuple of str
        Names of pairs that were left out of this batch (broken="skip").
    """

    image: Side
    text: Side
    names: tuple[str, ...]
    state: dict[str, int]
    skipped: tuple[str, ...] = ()


class _Window(NamedTuple):
    """Some samples in their final order: the number of the first, where the files are at it, and which they are.

    going_on    the file that the next window begins in the middle of, -1 where there is none
    """

    start: int
    place: int  # of a file in the epoch's order
    row: int  # in that file
    shards: np.ndarray
    rows: np.ndarray
    going_on: int = -1


class Stream(IterableDataset[StreamBatch]):
    """Batches of pairs from files, for a `DataLoader(stream, batch_size=None, num_workers=...)` or a plain loop.

    See `stream`, which makes it. One pass is what is left of the epoch.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch: int,
        *,
        size: int,
        shuffle: bool,
        seed: int,
        buffer: int,
        rank: int,
        world: int,
        drop_last: bool,
        broken: str,
    ) -> None:
        self._shards, self.batch, self._size = tuple(shards), batch, size
        self._shuffle, self._seed, self._buffer = shuffle, seed, buffer
        self._rank, self._world, self._drop_last, self._broken = rank, world, drop_last, broken
        told = "\n".join(f"{shard.path.name} {os.stat(shard.path).st_size}" for shard in shards)
        self._digest = zlib.crc32(f"{seed} {buffer} {shuffle}\n{told}".encode())
        self._begin = self._last = self._state(0, _start(), 0)

    def __repr__(self) -> str:
        return f"Stream({len(self._shards)} files, batch={self.batch}, epoch={self._begin['epoch']})"

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, whose order is drawn anew; where it is the one that was resumed, nothing changes."""
        epoch = as_integer(epoch, "epoch", 0)
        if epoch != self._begin["epoch"]:
            self._begin = self._last = self._state(epoch, _start(), 0)

    def state_dict(self) -> dict[str, int]:
        """Where the order goes on behind the last batch that this object itself gave; workers have copies of it.

        The `state` of a batch is the same for whoever reads through a DataLoader with workers.
        """
        return dict(self._last)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batch whose `state` this is, with any number of ranks and workers and any batch.

        Raises
        ------
        InputError
            Where it is of other files, or of another seed, buffer or shuffle.
        """
        if not isinstance(state, dict) or set(state) != set(self._begin):
            raise InputError(f"state must be that of a batch, with {', '.join(self._begin)}, got {state!r:.100}")
        if state["version"] != _VERSION:
            raise InputError(f"state is of version {state['version']}; this release reads version {_VERSION}")
        if state["digest"] != self._digest:
            raise InputError("state is of other files, or of another seed, buffer or shuffle: the order is another one")
        self._begin = self._last = dict(state)

    def seek(self, epoch: int, position: int) -> None:
        """Begin at a pair of an epoch, by its place in the order; counts the pairs of the files before it."""
        epoch, position = as_integer(epoch, "epoch", 0), as_integer(position, "position", 0)
        start = row = position // self._buffer * self._buffer
        order, place = self._drawn(len(self._shards), epoch), 0
        while place < len(order) and row >= len(self._shards[order[place]]):
            row -= len(self._shards[order[place]])
            place += 1
        self._begin = self._last = self._state(epoch, _Window(start, place, row, *_start()[3:5]), position)

    def samples(self) -> Iterator[tuple[int, int, Sample]]:
        """The rest of the epoch pair by pair, for whoever reads alone: file, row, and the pair, its photo unread."""
        for window in self._windows():
            kept = slice(max(0, self._begin["position"] - window.start), None)
            shards, rows = window.shards[kept], window.rows[kept]
            samples = self._read(shards, rows, window.going_on, photos=False)
            self._let_go(window)
            yield from zip(shards.tolist(), rows.tolist(), samples, strict=True)

    def _let_go(self, window: _Window) -> None:
        for shard in np.setdiff1d(window.shards, window.going_on).tolist():
            self._shards[shard].close()  # one that went on, of which nothing was read now

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        begin, together = self._begin["position"], self.batch * self._world
        waiting: list[tuple[int, list[Sample]]] = []  # global batches, and what this reader has of them
        window, seen = _start(), begin

        def ready(whole: bool) -> Iterator[StreamBatch]:
            """Batches of which all samples, of other readers too, are known to be there; `whole`: or never will be."""
            while waiting and (whole or begin + (waiting[0][0] + 1) * together <= seen):
                turn, samples = waiting.pop(0)
                end = min(begin + (turn + 1) * together, seen)
                if end - begin < (turn + 1) * together and self._drop_last:
                    return
                made = self._batch(samples, self._state(self._begin["epoch"], window, end))
                if len(made.names):
                    self._last = made.state
                    yield made

        for window in self._windows():
            places = np.arange(window.start, window.start + len(window.rows))
            turns = (places - begin) // together
            mine = (places >= begin) & ((places - begin) // self.batch % self._world == self._rank)
            mine &= turns % workers == number
            samples = self._read(window.shards[mine], window.rows[mine], window.going_on)
            self._let_go(window)
            for turn, sample in zip(turns[mine].tolist(), samples, strict=True):
                if not waiting or waiting[-1][0] != turn:
                    waiting.append((turn, []))
                waiting[-1][1].append(sample)
            seen = max(seen, int(window.start + len(window.rows)))
            yield from ready(whole=False)
        yield from ready(whole=True)

    def _windows(self) -> Iterator[_Window]:
        """The rest of the epoch, from the window on that it begins in."""
        epoch, position = self._begin["epoch"], self._begin["start"]
        order = self._drawn(len(self._shards), epoch)
        place, row = self._begin["place"], self._begin["row"]
        first = place, row
        shards: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        held = 0
        while place < len(order):
            shard = int(order[place])
            count = min(len(self._shards[shard]) - row, self._buffer - held)
            shards.append(np.full(count, shard))
            rows.append(np.arange(row, row + count))
            held, row = held + count, row + count
            if row == len(self._shards[shard]):
                place, row = place + 1, 0
            if held == self._buffer or (place == len(order) and held):
                mixed = self._drawn(held, epoch, position)
                going_on = int(order[place]) if row else -1
                yield _Window(position, *first, np.concatenate(shards)[mixed], np.concatenate(rows)[mixed], going_on)
                position, first, held = position + held, (place, row), 0
                shards, rows = [], []
        if position == 0:
            raise InputError(f"{self._shards[0].path.parent}: no pair in any of {len(self._shards)} files")

    def _drawn(self, count: int, *about: int) -> np.ndarray:
        """The order of so many things, one for (seed, *about)."""
        if not self._shuffle:
            return np.arange(count)
        return np.random.default_rng([self._seed, len(about), *about]).permutation(count)

    def _read(self, shards: np.ndarray, rows: np.ndarray, going_on: int, photos: bool = True) -> list[Sample]:
        """Samples in this order, of each file read in the order of its rows; one file stays open."""
        out: list[Sample] = [Sample("", b"", b"")] * len(rows)
        order = np.lexsort((rows, shards))
        bounds = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1))
        for start, end in pairwise(bounds.tolist()):
            places = order[start:end]
            shard = int(shards[places[0]])
            read = self._shards[shard].read(rows[places].tolist(), photos=photos)
            if shard != going_on:
                self._shards[shard].close()
            for place, sample in zip(places.tolist(), read, strict=True):
                out[place] = sample
        return out

    def _batch(self, samples: Sequence[Sample], state: dict[str, int]) -> StreamBatch:
        kept: list[tuple[Any, ...]] = []
        skipped = []
        for sample in samples:
            try:
                sides = (value_of(sample.name, side, self._size) for side in (sample.image, sample.text))
                kept.append((sample.name, *sides))
            except InputError:
                if self._broken == "refuse":
                    raise
                skipped.append(sample.name)
        names, image, text = zip(*kept, strict=True) if kept else ((), (), ())
        return StreamBatch(_joined(image, names), _joined(text, names), names, state, tuple(skipped))

    def _state(self, epoch: int, window: _Window, position: int) -> dict[str, int]:
        where = {"position": position, "start": window.start, "place": window.place, "row": window.row}
        return {"version": _VERSION, "digest": self._digest, "epoch": epoch, **where}


def value_of(name: str, value: Value, size: int) -> np.ndarray | tuple[str, ...]:
    """A side of a pair as it is trained on. InputError for a photo that is none, and a caption without words."""
    if isinstance(value, InputError):
        raise value
    if isinstance(value, bytes | Photo):
        return decode(name, value if isinstance(value, bytes) else value.read(), size)
    if not isinstance(value, np.ndarray):
        fault = next(filter(None, map(caption_fault, value)), None) if value else "no caption"
        if fault is not None:
            raise InputError(f"{name} has {fault}; expected words, or broken='skip'")
    return value


def _start() -> _Window:
    return _Window(0, 0, 0, np.empty(0, np.int64), np.empty(0, np.int64))


def _joined(values: Sequence[Any], names: Sequence[str]) -> Side:
    if not values or isinstance(values[0], tuple):
        return tuple(values)
    kinds = [(value.dtype, value.shape) if isinstance(value, np.ndarray) else (str, ()) for value in values]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise InputError(
            f"{names[other]} has {kinds[other][0]} {kinds[other][1]}, {names[0]} {kinds[0][0]} {kinds[0][1]}; expected "
            "one kind and width in all files"
        )
    return torch.from_numpy(np.stack(values))


def stream(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    batch: int,
    size: int = 128,
    image: str | None = None,
    text: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    buffer: int = 4096,
    rank: int | None = None,
    world: int | None = None,
    drop_last: bool = False,
    broken: Literal["refuse", "skip"] = "refuse",
) -> Stream:
    """Pairs of image and text from webdataset tars or Parquet files, a batch at a time.

    Parameters
    ----------
    path : path, or sequence of paths
        A .tar or .parquet file, several of one kind, a folder of them, or a pattern: "shards/*.tar".
    batch : int
        Pairs of a batch of one rank.
    size : int
        Pixels a side of photos, as in `load_captions`.
    image, text : str, optional
        Columns of Parquet, endings of tars (jpg, image.npy, txt). None: the first there of the usual names. A column of
        bytes is photos, one of text captions (a list of them is all captions of a pair), one of lists of numbers
        features; a .txt has a caption a line, a .json one under caption, an .npy features (d,).
    shuffle, seed, buffer : bool, int, int
        Whether the order is drawn, from which seed, and how many samples are mixed with each other; see the module.
    rank, world : int, optional
        Which reader this is, of how many. None: those of torch.distributed where it is initialised, else 0 of 1.
    drop_last : bool
        Leave out a last global batch that is not whole, so that all ranks have as many batches.
    broken : {"refuse", "skip"}
        What to do with photos that cannot be decoded and captions that are no text or have no words. "skip" leaves
        them out of their batch.

    Returns
    -------
    Stream
        An IterableDataset of `StreamBatch`; `set_epoch` begins the next epoch, `load_state_dict(batch.state)` goes on
        behind a batch.

    Raises
    ------
    InputError
        For no files, files of several kinds, and options out of range; when they are read, for files that are damaged,
        or lack a column or a member, and for features of several widths, named.
    """
    batch, size = check_count("batch", batch), check_count("size", size, least=16)
    buffer, seed = check_count("buffer", buffer), as_seed(seed)
    check_text("image", image)
    check_text("text", text)
    if broken not in ("refuse", "skip"):
        raise InputError(f"broken must be refuse or skip, got {broken!r}")
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = check_count("world", (torch.distributed.get_world_size() if ready else 1) if world is None else world)
    rank = check_count("rank", (torch.distributed.get_rank() if ready else 0) if rank is None else rank, 0)
    if rank >= world:
        raise InputError(f"rank must be below world, got {rank} of {world}")
    files = stream_files(path)
    make = TarShard if files[0].suffix.lower() == TAR else ParquetShard
    return Stream(
        [make(file, image, text) for file in files],
        batch,
        size=size,
        shuffle=shuffle,
        seed=seed,
        buffer=buffer,
        rank=rank,
        world=world,
        drop_last=drop_last,
        broken=broken,
    )


def stream_files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files of a stream in the order of their names, or as they are given. InputError unless of one kind."""
    files: list[Path] = []
    for each in [Path(path)] if isinstance(path, str | os.PathLike) else map(Path, path):
        if is_pattern(each):
            matching = sorted(Path(name) for name in glob.glob(str(each.expanduser())))
            if not matching:
                raise InputError(f"{each}: no file matches, expected .tar or .parquet files")
            files += matching
            continue
        if not each.exists():
            raise InputError(f"{each}: not found")
        inside = sorted(f for f in each.iterdir() if f.suffix.lower() in (TAR, PARQUET)) if each.is_dir() else [each]
        if not inside:
            raise InputError(f"{each}: expected .tar or .parquet files in it, found none")
        files += inside
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= {TAR, PARQUET}:
        raise InputError(f"expected .tar or .parquet files, of one kind, got {', '.join(sorted(kinds)) or 'none'}")
    return files


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pattern of names; one that lies there is none."""
    return glob.has_magic(os.fspath(path)) and not Path(path).exists()


def count_rows(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> int:
    """Rows of Parquet files together, as they say themselves. InputError where one is missing or damaged."""
    return sum(int(opened_parquet(file).metadata.num_rows) for file in stream_files(path))


def stream_column(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], column: str, rows: int = 1 << 16
) -> Iterator[np.ndarray]:
    """A column of numbers of Parquet files in its order, in blocks: such as codes for `HammingIndex.build`.

    Parameters
    ----------
    path : path, or sequence of paths
        As in `stream`.
    column : str
        Its name: lists of numbers of one width, or bytes of one length (fixed_size_binary).
    rows : int
        Of a block, about.

    Yields
    ------
    ndarray
        (n, d) of the column's type; bytes as uint8.

    Raises
    ------
    InputError
        For files that are damaged or lack the column, and lists of several widths, named.
    """
    check_count("rows", rows)
    held: list[np.ndarray] = []
    width: tuple[Path, int] | None = None
    for file in stream_files(path):
        opened = opened_parquet(file)
        name = column_of(opened, file, column, (), "the values")
        for start, block in row_blocks(opened, file, [name]):
            values = column_values(block.column(0), file, name, start)
            if not isinstance(values, np.ndarray):
                raise InputError(f"{file}: column {name} is {block.column(0).type}, expected lists of numbers")
            width = width or (file, values.shape[1])
            if len(values) and values.shape[1] != width[1]:
                raise InputError(f"{file}: column {name} has {values.shape[1]} numbers, that of {width[0]} {width[1]}")
            held.append(values)
            if sum(map(len, held)) >= rows:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)
