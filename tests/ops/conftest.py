import pytest
from ways import ISAS


@pytest.fixture(params=[*ISAS, "torch"])
def run(request, monkeypatch):
    """Every way to run an op on this machine: each native instruction set, and the portable torch path."""
    if request.param == "torch":
        monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    else:
        monkeypatch.setenv("CMR_FAST_BACKEND", "cpp")
        monkeypatch.setenv("CMR_FAST_ISA", request.param)
    return request.param
