"""Files of augmentations, made batch by batch: what was killed goes on, and ends as if it had not been.

    texts     OUT.partial holds the settings and a line for each batch; OUT is written at the end
    images    FOLDER holds settings.json and NAME_0.png, NAME_1.png, ...; images.json is written at the end

A batch is made of its own seed, so it does not matter which were made before.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmr_fast._files import write_aside
from cmr_fast._terminal import counting
from cmr_fast.errors import InputError

IMAGES, SETTINGS = "images.json", "settings.json"


def make_texts(
    out: Path, names: Sequence[str], make: Callable[[range], Sequence[Sequence[str]]], *,
    settings: Mapping[str, Any], batch: int, force: bool = False,
) -> dict[str, list[str]]:  # fmt: skip
    """Write {image name: [texts]}.

    Parameters
    ----------
    out
        The file; OUT.partial beside it holds what is there of it until it is whole.
    names
        N of them.
    make
        rows -> the texts of each.
    settings
        What the texts depend on, as JSON has it: a file that was begun with others is refused.
    batch
        Rows that are made at a time.
    force
        Begin anew, whatever OUT.partial holds.

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    InputError
        Where OUT.partial was begun with other settings, or another process writes it.
    """
    partial = partial_of(out)
    described = {**settings, "batch": batch, "count of images": len(names)}
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as file, counting(len(names), "texts of images") as advance:
        _hold(file, partial)
        if force:
            file.truncate(0)
        try:
            made = _begun(partial, described)
            advance(len(made))
            for start in range(len(made), len(names), batch):
                rows = range(start, min(start + batch, len(names)))
                texts = [list(row) for row in make(rows)]
                if not partial.stat().st_size:
                    _line(file, described)
                _line(file, texts)
                made += texts
                advance(len(rows))
        finally:
            if not partial.stat().st_size:  # nothing came of it
                partial.unlink()
    stored = dict(zip(names, made, strict=True))
    with write_aside(out) as aside:
        aside.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.unlink()
    return stored


def _hold(file: Any, partial: Path) -> None:
    """Keep other processes from writing until the file is closed. InputError where one does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{partial}: in use, another process writes it; wait for its end, or stop it first") from error
    except OSError:  # a file system without locks
        pass


def partial_of(out: Path) -> Path:
    """Where the texts are kept that are there already.

    Parameters
    ----------
    out
        The file that is to be.
    """
    return out.with_name(f"{out.name}.partial")


def _line(file: Any, value: Any) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _begun(partial: Path, described: Mapping[str, Any]) -> list[list[str]]:
    """The texts of a file that was begun; a line that a kill has cut is taken off."""
    if not partial.exists():
        return []
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(partial, len(whole))
    if not whole:
        return []
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise InputError(f"{partial}: damaged, not lines of JSON ({error}); remove it to begin anew") from error
    _refuse_other(partial, first, described)
    return [texts for line in lines for texts in line]


def _refuse_other(where: Path, before: Any, now: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(now))
    if before == wanted:
        return
    if not isinstance(before, dict):
        raise InputError(f"{where}: damaged, expected the settings that it was begun with; remove it to begin anew")
    name = next(name for name in {**before, **wanted} if before.get(name) != wanted.get(name))
    raise InputError(
        f"{where}: was begun with {name} {before.get(name)!r}, which is now {wanted.get(name)!r}; --force begins anew"
    )


def make_images(
    folder: Path, names: Sequence[str], make: Callable[[range], Sequence[Sequence[Any]]], *, count: int,
    settings: Mapping[str, Any], batch: int, force: bool = False,
) -> dict[str, list[str]]:  # fmt: skip
    """Write NAME_0.png, ... of each name without its suffix, and images.json {image name: [files]}.

    Parameters
    ----------
    folder
        Made where it is missing.
    names
        N of them.
    make
        rows -> the pictures (of Pillow) of each.
    count
        Pictures of each name.
    settings
        What the pictures depend on, as JSON has it: a folder that was begun with others is refused.
    batch
        Names whose pictures are made at a time.
    force
        Begin anew, whatever of these files is there.

    Returns
    -------
    dict
        What images.json holds.

    Raises
    ------
    InputError
        Where the folder was begun with other settings or holds something else, or two names differ in nothing but
        their suffix.
    """
    stems = [Path(name).with_suffix("").as_posix() for name in names]
    if len(set(stems)) < len(stems):
        twice = next(stem for i, stem in enumerate(stems) if stem in stems[:i])
        raise InputError(f"two images are called {twice}, expected names that differ without their suffix")
    described = {**settings, "batch": batch, "count of images": len(names)}
    files = [[f"{stem}_{number}.png" for number in range(count)] for stem in stems]
    head = folder / SETTINGS
    if head.exists() and force:
        (folder / IMAGES).unlink(missing_ok=True)
        known = set(stems)
        for path in list(folder.rglob("*.png")):  # of an earlier count too
            stem, _, number = path.relative_to(folder).with_suffix("").as_posix().rpartition("_")
            if stem in known and number.isdecimal():
                path.unlink()
        head.unlink()
    if head.exists():
        try:
            before = json.loads(head.read_bytes())
        except ValueError:
            before = None
        _refuse_other(head, before, described)
    else:
        if not force and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: holds something already; name another folder, or pass --force")
        with write_aside(head) as aside:
            aside.write_text(json.dumps(described, indent=1) + "\n")
    with counting(len(names), "images of captions") as advance:
        for start in range(0, len(names), batch):
            rows = range(start, min(start + batch, len(names)))
            if not all((folder / file).exists() for row in rows for file in files[row]):
                for row, pictures in zip(rows, make(rows), strict=True):
                    for file, picture in zip(files[row], pictures, strict=True):
                        with write_aside(folder / file) as aside:
                            picture.save(aside, format="PNG")
            advance(len(rows))
    stored = dict(zip(names, files, strict=True))
    with write_aside(folder / IMAGES) as aside:
        aside.write_text(json.dumps(stored, indent=1) + "\n")
    return stored
