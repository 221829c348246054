"""Where a data set lies: a path, or a name under $CMR_FAST_DATA."""

import os
from pathlib import Path

from cmr_fast.errors import InputError


def find(path: Path) -> Path:
    """The file or folder that is meant. Raises InputError where there is none, with where it was looked for."""
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
