"""A run folder's config.json: what a run is, and whether another may go on in its place."""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cmr_fast._files import remove_leavings, write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import SEEDS

if TYPE_CHECKING:
    from cmr_fast.methods.method import Dataset, Method, RunConfig

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
RESULTS = "results.json"
CONFIG = "config.json"
METRICS = "metrics.csv"
LOCK = ".lock"
SOURCE = "data.json"


def record_source(run: Path, data: str, options: Mapping[str, Any]) -> None:
    """Note in a run folder where its data came from, so that later commands find them."""
    held_out = {name: _absolute(options[name]) for name in ("test", "valid") if isinstance(options.get(name), str)}
    with write_aside(run / SOURCE) as aside:
        aside.write_text(json.dumps({"data": _absolute(data), "options": {**options, **held_out}}) + "\n")


def _absolute(data: str) -> str:
    from cmr_fast.data.streams import is_pattern

    if Path(data).exists():
        return str(Path(data).resolve())
    return str(Path(data).expanduser().absolute()) if is_pattern(data) else data


def claim(folder: Path, described: dict[str, Any], resume: bool, kind: "type[Method]") -> None:
    """Create the run folder and its config.json, or check that a resumed run is the one that was begun there."""
    if not resume:
        refuse_used(folder)
    config = folder / CONFIG
    if resume:
        remove_leavings(folder)  # what was not yet renamed when the run was killed
        for path in folder.glob(".*.*"):  # the same, of 0.1.0
            if path.is_file():
                path.unlink()
        if config.exists():
            parts = dict.fromkeys(("config", "run", "data"), dict)
            same(folder, read_json(config, method=str, **parts), described, kind, longer=(folder / RESULTS).exists())
            return
        if any((folder / name).exists() for name in (CHECKPOINT, MODEL)):
            raise InputError(f"{folder}: config.json is missing, so this run cannot be resumed")
    write_json(config, described)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create the run folder and keep other processes from writing it meanwhile.

    Raises InputError, which says who holds it, where another process (or thread) does.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a run folder is needed here, this is a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break  # a file system without locks
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{folder}: in use, {holder} trains in it; wait for its end, or stop it first") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the holder of before has just removed the file
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """An error of the operating system while a run is written names the folder, and what is still there."""
    try:
        yield
    except OSError as error:
        saved = (folder / CHECKPOINT).exists()
        state = "resume goes on from its last checkpoint" if saved else "no checkpoint was written yet"
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"the run could not be written: {reason}; {state}", str(folder)
        ) from error


@contextmanager
def forgotten_if_refused(folder: Path, fresh: bool) -> Iterator[None]:
    """A fresh run that is refused before its first checkpoint leaves no folder in the way of the next one."""
    try:
        yield
    except InputError:
        if fresh and not (folder / CHECKPOINT).exists():
            for name in (CONFIG, METRICS):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with suppress(OSError):  # something of the user's lies there
                folder.rmdir()
        raise


def refuse_used(folder: Path) -> None:
    """Refuse a file, and a folder that holds anything."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a run folder is needed here, this is a file")
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(f"{folder}: not empty and would be overwritten; resume this run, or name another folder")


def same(
    where: Path, stored: dict[str, Any], wanted: dict[str, Any], kind: "type[Method]", longer: bool = False
) -> None:
    """Refuse to resume with another method, config, seed or data set; name the first thing that differs.

    A setting that the stored run knew nothing of had its default. longer: the run may be made longer than it was.
    """
    from cmr_fast.methods.method import RunConfig

    defaults = {"config": _defaults(kind.Config), "run": _defaults(RunConfig)}
    notes = [name for name, value in stored.items() if isinstance(value, dict) and name not in _DESCRIBED]
    if stored.get("method") != wanted["method"]:
        raise InputError(f"{where}: a run of {stored.get('method')}, it cannot be resumed with {wanted['method']}")
    for part in (*notes, "config", "run", "data"):
        before, now = stored.get(part, {}), json.loads(json.dumps(wanted.get(part, {})))
        before = defaults.get(part, {}) | (kind.read_config(before) if part == "config" else before)
        for name in sorted(set(before) | set(now)):
            if name in _FREE or before.get(name) == now.get(name):
                continue
            if not (longer and part == "config" and name in _LENGTH and now[name] > before[name]):
                raise InputError(
                    f"{where}: cannot be resumed, {part} {name} was {before.get(name)!r} and is now {now.get(name)!r}"
                )


def _defaults(kind: type[Any]) -> dict[str, Any]:
    values = {f.name: f.default for f in fields(kind) if f.default is not MISSING and not isinstance(f.default, Path)}
    return dict(json.loads(json.dumps(values)))


_DESCRIBED = {"method", "config", "run", "data", "versions"}
_LENGTH = {"epochs", "max_steps"}
_FREE = {"out", "resume", "device", "devices", "strategy", "threads", "quiet", "checkpoint_seconds"}


def describe(kind: "type[Method]", config: Any, dataset: "Dataset", run: "RunConfig") -> dict[str, Any]:
    data = described_data(dataset) | {name: getattr(dataset, name) for name in kind.init_arguments}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {"out": str(run.out)} | {f.name: getattr(run, f.name) for f in fields(run) if f.name != "out"}
    return {"method": kind.name, "config": asdict(config), "run": settings, "data": data, "versions": versions}


def described_data(dataset: "Dataset") -> dict[str, Any]:
    """The name of a data set, the training split's checksum, and every split's size."""
    sizes = {split: len(pairs) for split in _SPLITS if (pairs := getattr(dataset, split, None)) is not None}
    return {"name": dataset.name, "crc32": dataset.train.fingerprint()} | sizes


_SPLITS = ("train", "valid", "query", "database", "test")


def write_json(path: Path, value: Any) -> None:
    """Write `value`; numbers that JSON has none for, NaN and infinity, as null."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(_in_json(value), indent=2, allow_nan=False) + "\n")


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, **kinds: Any) -> dict[str, Any]:
    """The object that a file of a run folder holds.

    kinds: what the values under some keys must be, as isinstance takes it. Raises InputError, which names the file.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, expected an object, got {type(value).__name__}")
    for key, kind in kinds.items():
        if key not in value:
            raise InputError(f"{path}: damaged or of another program, expected {key}, got {_first(value)}")
        seen = value[key]
        if not isinstance(seen, kind) or (isinstance(seen, bool) and kind is not bool):
            raise InputError(f"{path}: damaged or of another program, {key} is {seen!r:.60}")
    return value


def read_run(folder: Path) -> dict[str, Any] | None:
    """The settings of a run folder's run, its seed and valid_fraction among them; None where it has no config.json."""
    config = folder / CONFIG
    if not config.is_file():
        return None
    run: dict[str, Any] = read_json(config, run=dict)["run"]
    for name, kinds, most in (("seed", (int,), SEEDS), ("valid_fraction", (int, float), 1)):
        value: Any = run.get(name)
        if type(value) not in kinds or not 0 <= value < most:
            raise InputError(f"{config}: damaged or of another program, {name} of its run is {value!r:.60}")
    return run


def _first(value: dict[str, Any]) -> str:
    return ", ".join(list(value)[:8]) or "nothing"
