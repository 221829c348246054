import os
from pathlib import Path

import pytest

# programs that tests start import the installed package, as the tests do, not the source tree they are started in
os.environ["PYTHONSAFEPATH"] = "1"

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: $CMR_FAST_DATA, else ../shared/data beside the project."""
    root = Path(os.environ.get("CMR_FAST_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set CMR_FAST_DATA")
    return root
