"""A run folder's config.json: what a run is, and whether another may go on in its place."""

import json
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.methods.loop import Dataset, Method, RunConfig

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"


def claim(folder: Path, described: dict[str, Any], resume: bool) -> None:
    """Create the run folder and its config.json, or check that a resumed run is the one that was begun there."""
    if not resume:
        refuse_used(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a run folder is needed here, this is a file")
    config = folder / "config.json"
    if folder.exists():
        for aside in folder.glob(".*.*"):  # what write_aside had not yet renamed when the run was killed
            aside.unlink()
        if config.exists():
            same(folder, read_json(config), described)
            return
        if any((folder / name).exists() for name in (CHECKPOINT, MODEL)):
            raise InputError(f"{folder}: config.json is missing, so this run cannot be resumed")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(config, described)


@contextmanager
def forgotten_if_refused(folder: Path, fresh: bool) -> Iterator[None]:
    """A fresh run that is refused before its first checkpoint leaves no folder in the way of the next one."""
    try:
        yield
    except InputError:
        if fresh and not (folder / CHECKPOINT).exists():
            for name in ("config.json", "metrics.csv"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with suppress(OSError):  # something of the user's lies there
                folder.rmdir()
        raise


def refuse_used(folder: Path) -> None:
    """Refuse a file, and a folder that holds anything."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a run folder is needed here, this is a file")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty and would be overwritten; resume this run, or name another folder")


def same(where: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to resume with another method, config, seed or data set; name the first thing that differs."""
    if stored.get("method") != wanted["method"]:
        raise InputError(f"{where}: a run of {stored.get('method')}, it cannot be resumed with {wanted['method']}")
    for part in ("config", "run", "data"):
        before, now = stored.get(part, {}), json.loads(json.dumps(wanted[part]))
        for name in sorted(set(before) | set(now)):
            if name not in _FREE and before.get(name) != now.get(name):
                raise InputError(
                    f"{where}: cannot be resumed, {part} {name} was {before.get(name)!r} and is now {now.get(name)!r}"
                )


_FREE = {"out", "resume", "device", "threads", "quiet", "checkpoint_seconds"}


def describe(kind: "type[Method]", config: Any, dataset: "Dataset", run: "RunConfig") -> dict[str, Any]:
    sizes = {split: len(pairs) for split in _SPLITS if (pairs := getattr(dataset, split, None)) is not None}
    data = {"name": dataset.name, "num_classes": dataset.num_classes, "crc32": _crc(dataset.train)} | sizes
    data |= {name: getattr(dataset, name) for name in kind.sizes}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {"out": str(run.out)} | {f.name: getattr(run, f.name) for f in fields(run) if f.name != "out"}
    return {"method": kind.name, "config": asdict(config), "run": settings, "data": data, "versions": versions}


_SPLITS = ("train", "valid", "query", "database", "test")


def _crc(pairs: Any) -> int:
    """A checksum of the labels and of up to 1000 training rows: tells data sets of one shape apart."""
    few = pairs.select(torch.arange(0, len(pairs), max(1, len(pairs) // 1000)))
    value = zlib.crc32(pairs.labels.numpy().tobytes())
    for part in [getattr(few, f.name) for f in fields(few) if f.name != "labels"]:
        raw = part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        value = zlib.crc32(raw, value)
    return value


def write_json(path: Path, value: Any) -> None:
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, expected an object, got {type(value).__name__}")
    return value
