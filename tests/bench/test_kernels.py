"""What ptxas says of the GPU kernels: each kernel is found, and its numbers are those that ptxas wrote."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from benchmarks import kernels

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3cmr10all_kernelEi' for 'sm_90a'
ptxas info    : Function properties for _ZN3cmr10all_kernelEi
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 24.137 ms
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""


def test_spills_of_what_a_kernel_calls_are_its_own():
    assert kernels.parsed(LOG) == [
        ("_ZN3cmr10all_kernelEi", {"registers": 128, "spilled": 24 + 32 + 4 + 8, "shared": 512}),
        ("other", {"registers": 18, "spilled": 0, "shared": 0}),
    ]


def test_a_log_without_counts_is_an_error_and_not_zero():
    with pytest.raises(ValueError, match="no registers or no spills of other"):
        kernels.parsed(LOG.replace("Used 18", "Uses 18"))


def test_every_kernel_of_the_sources_is_declared():
    text = "".join(path.read_text() for path in kernels.SOURCES.iterdir())
    assert text.count("__global__ ") == len(kernels.declared()) == len(set(kernels.declared())) > 9


def track(suite, found, kernel):
    one = suite()
    one.setup(found, kernel)
    return one.track_registers(found, kernel), one.track_spilled(found, kernel), one.track_shared(found, kernel)


def test_costs_are_the_mean_the_sum_and_the_most_of_the_instances():
    instances = [
        {"registers": 128, "spilled": 56, "shared": 0},
        {"registers": 96, "spilled": 8, "shared": 1024},
    ]
    assert track(kernels.Cuda, {"scan_kernel": instances}, "scan_kernel") == (112, 64, 1024)


def test_skipped_without_a_compiler(monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    with pytest.raises(kernels.SkipNotImplemented, match="no nvcc"):
        track(kernels.Cuda, kernels.Cuda().setup_cache(), "linf_kernel")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
def test_nvcc_compiles_each_declared_kernel(monkeypatch, tmp_path):
    """One source with its kernels: all of them take a quarter of a minute."""
    for name in ("pgd.cu", "launch.cuh", "kernels.h"):
        shutil.copy(kernels.SOURCES / name, tmp_path)
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    found = kernels.Cuda().setup_cache()
    assert (
        found.keys() == set(kernels.declared()) == {"linf_kernel", "l2_sums_kernel", "l2_move_kernel", "noise_kernel"}
    )
    for kernel in found:
        registers, spilled, shared = track(kernels.Cuda, found, kernel)
        assert 8 <= registers <= 255 and spilled >= 0 and shared >= 0


def test_triton_compiles_each_kernel_of_the_suite():
    pytest.importorskip("triton")
    found = kernels.Triton().setup_cache()
    assert found.keys() == set(kernels.KERNELS)
    for kernel in found:
        registers, spilled, _ = track(kernels.Triton, found, kernel)
        assert 8 <= registers <= 255 and spilled >= 0
    assert track(kernels.Triton, found, "onepass _side bfloat16")[2] >= 64 * 64 * 2  # a tile of the other side
