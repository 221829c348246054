"""Photo files as pixels, all of one size; a set of them that is decoded when it is asked for, and then kept."""

import hashlib
import importlib.util
import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import cache_folder
from cmr_fast._terminal import counting, track
from cmr_fast.data._checks import check_count
from cmr_fast.errors import InputError

WORKERS = min(8, os.cpu_count() or 1)
FOLDERS = ("Images", "Flicker8k_Dataset", "flickr30k-images", "flickr30k_images", "images", "")
"""Where data sets keep their photos, below the folder of their captions."""


class Photo(NamedTuple):
    """A photo's file: all of `path`, or `length` bytes from `offset` of a tar."""

    name: str
    path: Path
    offset: int = 0
    length: int = -1

    def read(self) -> bytes:
        """The file's bytes. InputError where it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.length)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error


def find_photos(folder: Path, names: Sequence[str], places: Sequence[Path] = ()) -> list[Photo | None]:
    """The photos of a data set by name, in order; None for those that are not there.

    Parameters
    ----------
    folder : Path
        Of the data set.
    names : sequence of str
        File names, or paths below a folder.
    places : sequence of Path
        Folders or tars to look in. None: the first of FOLDERS below `folder` that has any of them, else the tars in
        `folder`.

    Raises
    ------
    InputError
        Where there is no folder and no tar of photos at all, or a tar is damaged.
    """
    if places:
        folders, tars = ([place for place in places if place.is_dir() == wanted] for wanted in (True, False))
    else:
        folders = [folder / name for name in FOLDERS if name == "" or (folder / name).is_dir()]
        tars = sorted(folder.glob("*.tar"))
    for place in folders:
        found = [_file(place, name) for name in names]
        if any(photo is not None for photo in found):
            return found
    if not tars and folders == [folder] and not places:
        raise InputError(f"{folder}: no photos; expected a folder Images or Flicker8k_Dataset, or a .tar of them")
    members: dict[str, Photo] = {}
    for tar in tars:
        members |= tar_members(tar)
    by_name = {Path(name).name: photo for name, photo in members.items()}
    return [members.get(name) or by_name.get(Path(name).name) for name in names]


def _file(place: Path, name: str) -> Photo | None:
    for path in dict.fromkeys((place / name, place / Path(name).name)):
        if path.is_file():
            return Photo(name, path)
    return None


def tar_members(tar: Path) -> dict[str, Photo]:
    """Where each file of a tar lies in it, by its name there. InputError where it is damaged."""
    members: dict[str, Photo] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if member.isreg():
                    members[member.name] = Photo(member.name, tar, member.offset_data, member.size)
            end = opened.offset
        with open(tar, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # there tarfile ends, without a word
                raise tarfile.ReadError(f"no member's header at byte {end}")
    except (tarfile.TarError, OSError) as error:
        last = next(reversed(members), None)
        after = "" if last is None else f" after {last}"
        raise InputError(f"{tar}: damaged{after}, or no tar file ({error})") from error
    return members


def tar_samples(tar: Path) -> dict[str, dict[str, Photo]]:
    """The members of a tar by webdataset's rule: their name up to its first dot, then the ending in lower case."""
    samples: dict[str, dict[str, Photo]] = {}
    for name, member in tar_members(tar).items():
        below, slash, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        samples.setdefault(below + slash + key, {})["." + ending.lower()] = member
    return samples


def decode(name: str, data: bytes, size: int) -> np.ndarray:
    """One photo as uint8 (3, size, size): scaled to `size` on the shorter side, the middle cut out.

    Grey, palette, transparent and CMYK photos become RGB; 16 bits a channel become the 8 higher ones.

    Raises
    ------
    InputError
        Where Pillow is missing, or the file is no photo.
    """
    _check_pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            photo: Image.Image = opened
            if opened.format == "EPS":
                raise ValueError("EPS is a program, which Ghostscript would run")
            if opened.mode.startswith("I"):  # 16 bits: converting clips them to white
                photo = Image.fromarray((np.asarray(opened).clip(0, 65535) >> 8).astype(np.uint8))
            fitted = ImageOps.fit(photo.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = "of no kind that it knows" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{name}: not a photo that Pillow can read ({reason})") from error
    return np.asarray(fitted).transpose(2, 0, 1)


def decoded(photos: Iterable[tuple[str, bytes]], count: int, size: int) -> Tensor:
    """Photos as uint8 (N, 3, size, size), see `decode`.

    Parameters
    ----------
    photos : iterable of (str, bytes)
        Name and file of each of the `count` photos, in order; JPEG or whatever Pillow reads.
    count, size : int
        How many there are; pixels a side.

    Raises
    ------
    InputError
        Where Pillow is missing, or a file is no photo.
    """
    _check_pillow()
    images = np.zeros((count, 3, size, size), dtype=np.uint8)
    for row, (_, (name, data)) in enumerate(zip(track(range(count), "reading photos"), photos, strict=True)):
        images[row] = decode(name, data, size)
    return torch.from_numpy(images)


class Store(Protocol):
    """What gives a set of photos by row."""

    def digest(self, rows: Iterable[int], places: bool = False) -> str:
        """Of the size in pixels and the photos' names and lengths; with `places` of where and when as well."""

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """uint8 (n, 3, size, size), the first error raised."""

    def fill(self, rows: Sequence[int]) -> list[InputError | None]:
        """Decode what is not decoded yet: what is wrong with each row."""


class Photos:
    """N photos of one size, decoded by threads when their pixels are first asked for, and then kept in a file.

    Indexing by rows gives the photos of these rows, undecoded. The file of pixels is shared by all runs on the same
    photos at the same size; where it cannot be written, photos are decoded each time.

    Parameters
    ----------
    files : sequence of Photo
        N of them.
    size : int
        Pixels a side, see `decode`.
    cache : str, optional
        The folder of the file. None: cmr_fast in $XDG_CACHE_HOME or ~/.cache. It takes 3 size^2 bytes a photo.
    """

    def __init__(self, files: Sequence[Photo], size: int, cache: str | None = None) -> None:
        self.files, self.size = tuple(files), check_count("size", size, least=16)
        self._rows = torch.arange(len(self.files))
        self._store: Store = _Store(self.files, self.size, cache)

    @classmethod
    def held_by(cls, store: "Store", files: Sequence[Photo], size: int) -> "Photos":
        """Photos whose pixels something else gives than a file in the user's cache."""
        photos = object.__new__(cls)
        photos.files, photos.size, photos._rows, photos._store = tuple(files), size, torch.arange(len(files)), store
        return photos

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor | slice) -> "Photos":
        part = object.__new__(Photos)
        part.__dict__ |= self.__dict__
        part._rows = self._rows[rows]
        return part

    def __repr__(self) -> str:
        """With a checksum of names and lengths: whether two sets are the same photos, wherever they lie."""
        return f"Photos({len(self)}, {self.size} x {self.size}, {self._store.digest(self._rows.tolist())})"

    def key(self) -> str:
        """A checksum of where the files lie and when they changed as well, for what is kept of them."""
        return self._store.digest(self._rows.tolist(), places=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the pixels, (N, 3, size, size)."""
        return len(self), 3, self.size, self.size

    def name(self, row: int) -> str:
        """The file name of a photo."""
        return self.files[int(self._rows[row])].name

    def joined(self, other: "Photos") -> "Photos":
        """These photos and those of another part of the same set."""
        if self._store is not other._store:
            raise InputError("photos of two sets do not fit together, expected parts of one")
        part = self[:]
        part._rows = torch.cat([self._rows, other._rows])
        return part

    def pixels(self) -> Tensor:
        """uint8 (N, 3, size, size). InputError, which names the file, where one is no photo."""
        return torch.from_numpy(self._store.read(self._rows.tolist()))

    def broken(self) -> dict[int, InputError]:
        """The rows of what is no photo, and what is wrong; decodes all that is not decoded yet."""
        return {row: error for row, error in enumerate(self._store.fill(self._rows.tolist())) if error is not None}


class _Store:
    """The pixels of a set of photos in one file, `photos-….u8`; which of them are there, a byte each, beside it."""

    def __init__(self, files: Sequence[Photo], size: int, cache: str | None) -> None:
        self.files, self.size, self.bytes = files, size, 3 * size * size
        about: dict[Path, tuple[int, str]] = {}
        for path in {photo.path for photo in files}:
            with suppress(OSError):
                stat = path.stat()
                about[path] = stat.st_size, f"{path.resolve()} {stat.st_mtime_ns}"
        self._about = [about.get(photo.path, (0, "")) for photo in files]
        self._path = cache_folder(cache) / f"photos-{self.digest(range(len(files)), places=True)}.u8"
        self._done = np.zeros(len(files), dtype=bool)
        with suppress(OSError):
            seen = np.frombuffer(self._path.with_suffix(".done").read_bytes(), dtype=np.uint8)[: len(files)]
            self._done[: len(seen)] = seen == 1

    def digest(self, rows: Iterable[int], places: bool = False) -> str:
        """Of the size in pixels and the photos' names and lengths; with `places` of where and when as well."""
        total = hashlib.blake2b(f"{self.size}".encode(), digest_size=8)
        for row in rows:
            photo, (length, place) = self.files[row], self._about[row]
            total.update(f"{photo.name} {length if photo.length < 0 else photo.length}\n".encode())
            if places:
                total.update(f"{place} {photo.offset}\n".encode())
        return total.hexdigest()

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """uint8 (n, 3, size, size), the first error raised."""
        out = np.empty((len(rows), 3, self.size, self.size), dtype=np.uint8)
        for error in self.fill(rows, out):
            if error is not None:
                raise error
        return out

    def fill(self, rows: Sequence[int], out: np.ndarray | None = None) -> list[InputError | None]:
        """Decode what is not in the file yet and keep it there; into `out` the pixels of all rows."""
        file, flags = self._open()

        def one(place: int) -> InputError | None:
            row = rows[place]
            if self._done[row] and (out is None or self._stored(file, row, out[place])):
                return None
            try:
                photo = decode(str(self.files[row].name), self.files[row].read(), self.size)
            except InputError as error:
                return error
            self._keep(file, flags, row, photo)
            if out is not None:
                out[place] = photo
            return None

        try:
            missing = sum(not self._done[row] for row in rows)
            with (
                ThreadPoolExecutor(WORKERS if missing else 1) as pool,
                counting(len(rows), "reading photos") as advance,
            ):
                errors = []
                for error in pool.map(one, range(len(rows))):
                    errors.append(error)
                    advance(1)
        finally:
            for opened in (file, flags):
                if opened is not None:
                    os.close(opened)
        return errors

    def _open(self) -> tuple[int | None, int | None]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT
            return os.open(self._path, flags, 0o644), os.open(self._path.with_suffix(".done"), flags, 0o644)
        except OSError:  # a cache that cannot be written costs time, not the data
            return None, None

    def _stored(self, file: int | None, row: int, out: np.ndarray) -> bool:
        if file is None:
            return False
        data = os.pread(file, self.bytes, row * self.bytes)
        if len(data) != self.bytes:
            return False
        out[:] = np.frombuffer(data, dtype=np.uint8).reshape(out.shape)
        return True

    def _keep(self, file: int | None, flags: int | None, row: int, photo: np.ndarray) -> None:
        if file is None or flags is None:
            return
        with suppress(OSError):  # a full disk
            if os.pwrite(file, np.ascontiguousarray(photo).tobytes(), row * self.bytes) == self.bytes:
                os.pwrite(flags, b"\1", row)
                self._done[row] = True


def _check_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise InputError("photos are JPEG files: reading them needs Pillow, pip install pillow")
