"""The CUDA kernels compiled as plain C++ (cuda_shim.h) and driven by the code that drives them on a GPU.

What this cannot see: what the compiler and the device do, real races between warps, speed. The tensor-core forms run
with the instructions' documented register layout written out in the shim.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from cmr_fast.ops import _dispatch
from cmr_fast.ops.cuda import hamming as hamming_cuda

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
WARPS, WORKSPACE = 64, 1 << 30


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The module built with g++."""
    pybind11 = pytest.importorskip("pybind11")
    if not shutil.which("g++"):
        pytest.skip("g++ not found")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first worker builds it, the others wait
        root = root.parent
    out = root / f"cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = "-std=c++17 -O1 -g1 -fPIC -shared -fvisibility=hidden -fsanitize=undefined -fno-sanitize-recover=all -x c++"
    sources = [*map(str, sorted(CSRC.glob("*.cu"))), str(CSRC / "module.cpp")]
    defines = ["-DCMR_CUDA_MODULE=cuda_emulated", *(f"-I{path}" for path in include)]
    command = ["g++", *flags.split(), *defines, *sources, "-o", str(out)]
    with FileLock(f"{out}.lock"):
        if not out.exists():
            done = subprocess.run(command, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("cuda_emulated", out)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(built):
    """It in place of cmr_fast._cuda, and a pretended device of 64 warps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "native_cuda", lambda: built)
        patch.setattr(_dispatch, "queue", lambda tensor: built.Queue(0, 0))
        patch.setattr(hamming_cuda, "device_of", lambda tensor: hamming_cuda.Device(WARPS, WORKSPACE))
        yield built


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch):
    """Threads between two barriers run in either order: the results must not depend on it."""
    monkeypatch.setenv("CMR_SHIM_ORDER", request.param)
