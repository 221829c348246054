import os
from pathlib import Path

# programs that tests start import the installed package, as the tests do, not the source tree they are started in
os.environ["PYTHONSAFEPATH"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores among them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What `make` leaves unset is NaN, or a number that nothing computes: an output that a kernel forgets shows."""

    @functools.wraps(make)
    def poisoned(*args: Any, **options: Any) -> Tensor:
        result = make(*args, **options)
        if torch.compiler.is_compiling() or type(result) is not Tensor or result.device.type == "meta":
            return result
        with torch.no_grad():
            if result.is_floating_point() or result.is_complex():
                return result.fill_(torch.nan)
            return result if result.dtype == torch.bool else result.fill_(torch.iinfo(result.dtype).max - 86)

    return poisoned


torch.empty, torch.empty_like = _poisoned(torch.empty), _poisoned(torch.empty_like)
Tensor.new_empty = _poisoned(Tensor.new_empty)  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: $CMR_FAST_DATA, else ../shared/data beside the project."""
    root = Path(os.environ.get("CMR_FAST_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real data not found at {root}; set CMR_FAST_DATA")
    return root
