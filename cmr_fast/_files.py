"""Writing files so that a crash, a full disk or a kill leaves the previous one as it was; names for files of others."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cmr_fast.errors import InputError

try:
    import fcntl
except ImportError:  # no advisory locks on this platform: what a killed save left stays
    fcntl = None  # type: ignore[assignment]

StrPath = str | os.PathLike[str]
_ASIDE = ".aside"
_LONGEST = 200  # bytes of a name that leave room for what mkdtemp adds
_LFS = b"version https://git-lfs.github.com/spec/"


def as_path(path: object, name: str = "path") -> Path:
    """`path` as a Path.

    Raises
    ------
    InputError
        Where it is no str, bytes or os.PathLike, or holds a null character.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise InputError(f"{name} must be the path of a file, str or os.PathLike, got {type(path).__name__}")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise InputError(f"{name} must be the path of a file, got {text!r}")
    return Path(text)


def cache_folder(folder: StrPath | None = None) -> Path:
    """Where what was computed or unpacked once is kept: `folder`, else cmr_fast in $XDG_CACHE_HOME or ~/.cache."""
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmr_fast"


@contextmanager
def write_aside(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    If the body raises, the temporary file is removed and `path` is untouched. A symbolic link stays one: the file that
    it names is replaced. What killed saves of the same path left is removed, what others are writing is not.

    Parameters
    ----------
    path
        The file to write; its folder is made where it is missing.

    Yields
    ------
    Path
        An empty file of the same name in a hidden folder beside `path`, which is this call's own.

    Raises
    ------
    InputError
        Where `path` is a folder, device, FIFO or socket: these are not replaced.
    OSError
        Where the system refuses; it names `path`.
    """
    path = as_path(path)
    with named(path):
        check_replaceable(path)
        target = Path(os.path.realpath(path))
        _make_folder(target.parent)
        remove_leavings(target.parent, target)
        folder, lock = _own_folder(target)
    aside = folder / target.name
    try:
        with named(path, aside):
            aside.touch()
            yield aside
            _sync(aside)
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
            os.chmod(aside, mode)
            os.replace(aside, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _release(lock)


def check_replaceable(path: Path) -> None:
    """InputError where `path` is there and is no regular file; OSError where the system cannot say."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: {_kind(mode)}, expected the name of a file to write")


def check_regular(path: Path, expected: str) -> None:
    """InputError where `path` is no file that can be read; `expected` says which kind is wanted."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no {expected} at {path}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: {_kind(mode)}, expected the path of a file")


def pointer(head: bytes) -> str | None:
    """What a file of these first bytes stands for, where it is a pointer that a repository keeps in its place."""
    if head.startswith(_LFS):
        size = next((line[5:].decode("ascii", "replace") for line in head.splitlines() if line[:5] == b"size "), "")
        of = f" of {size} bytes" if size.isdecimal() else ""
        return f"is a Git LFS pointer, not the file{of} that it stands for; fetch that with `git lfs pull`"
    if b"/annex/objects/" in head[:64]:
        return "is a git-annex pointer, not the file that it stands for; fetch that with `git annex get`"
    return None


@contextmanager
def named(path: Path, *standing_in: Path) -> Iterator[None]:
    """An OSError from inside that names no file, or one of `standing_in`, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or error.filename in {str(p) for p in standing_in}):
            error.filename = str(path)
        raise


def remove_leavings(place: Path, target: Path | None = None) -> None:
    """Remove what killed calls of write_aside left in the folder `place`, of `target` or of any file.

    These are folders that nobody holds the lock of.
    """
    if fcntl is None:
        return
    prefix = r"\..+\." if target is None else re.escape(_prefix(target))
    pattern = re.compile(prefix + r"[a-z0-9_]{8}" + re.escape(_ASIDE))
    try:
        left = [name for name in os.listdir(place) if name[:1] == "." and pattern.fullmatch(name)]
    except OSError:  # a folder that can be written but not read
        return
    for folder in (place / name for name in left):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _own_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside `target`, and its lock, held until it is released or the process ends."""
    while True:
        try:
            folder = tempfile.mkdtemp(prefix=_prefix(target), suffix=_ASIDE, dir=target.parent)
        except OSError as error:
            error.filename = None  # of the folder that nobody asked for
            raise
        if fcntl is None:
            return Path(folder), None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another save took it for something left, before it was locked
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                return Path(folder), lock
        os.close(lock)


def _release(lock: int | None) -> None:
    if lock is not None:
        with suppress(OSError):  # said, not left to close: a forked child may have the lock open too
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)[:_LONGEST].decode(errors="ignore")
    return f".{name}."


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        above = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
        raise InputError(f"{folder}: cannot be made, since {above} is not a folder") from None


def _kind(mode: int) -> str:
    return "is a folder" if stat.S_ISDIR(mode) else "is a device, FIFO or socket"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
