"""The Triton backend of pgd_step_, on a GPU where there is one and under the interpreter, and there the CUDA one too.

Triton reads TRITON_INTERPRET when it is imported, so `test_under_the_interpreter` starts this file again with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pgd_cases import SHAPES, eager_linf, problem

import cmr_fast as cf
from cmr_fast.ops import _dispatch, _reference, pgd_noise, pgd_step_

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NO_CUDA = _dispatch.unavailable("cuda", "cuda")
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
LARGE = [(1, 3, 96, 97), (3, 5000)]  # several programs a sample


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.timeout(600)
def test_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=500", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CMR_FAST_BACKEND": ""}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


COMPILE = """
import itertools, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Target:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Target())
jit.JITFunction.__getitem__ = lambda self, grid: lambda *a, **o: self.warmup(*a, grid=grid, **o)
from cmr_fast.ops.triton import pgd
for shape, broken, step, l2 in itertools.product([(1, 1), (1, 3, 64, 64), (5, 3, 7)], [False, True], [0, 1], [0, 1]):
    x, flags = torch.empty(shape), torch.empty(shape[0], dtype=torch.int32) if broken else None
    for kind in ((1, 1), (shape[0], shape[1])):
        pgd.step(x, x, x, [torch.ones(kind[0], 1)] * 2 + [torch.ones(kind)] * 2, flags, step, bool(l2))
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_compiles_for_a_gpu_that_is_not_here():
    """What the interpreter does not see: arguments of 1 are constants to the compiler, and all have a type."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch):
    """Of Triton so few parts that a part is several blocks."""
    from cmr_fast.ops.triton import pgd as kernels

    if request.param == "cuda" and (INTERPRETED or NO_CUDA):
        pytest.skip(f"the CUDA kernels cannot run here: {NO_CUDA or 'this is the interpreter'}")
    if INTERPRETED:
        monkeypatch.setattr(kernels, "MOST_PARTS", 3)
    return request.param


def moved(backend, x, *rest, **options):
    """What `backend` makes of a copy of x."""
    device = "cpu" if backend in ("torch", "cpp") else DEVICE
    at = x.to(device, copy=True)
    broken = options.pop("broken", None)
    flags = None if broken is None else broken.to(device)
    pgd_step_(at, *(t.to(device) for t in rest), broken=flags, backend=backend, **options)
    if broken is not None:
        broken.copy_(flags)
    return at.cpu()


def values(shape, norm):
    """alpha, eps and bounds for all, of every sample, of every channel and of both."""
    rng = np.random.default_rng(0)
    channels = shape[1] if len(shape) > 1 else 1
    for kind in ((1, 1), (shape[0], 1), (1, channels), (shape[0], channels)):
        size = (kind[0], 1) if norm == "l2" else kind
        alpha, eps = (torch.from_numpy(rng.uniform(0.05, 0.3, size).astype(np.float32)) for _ in range(2))
        low, high = (torch.from_numpy(rng.uniform(a, a + 0.1, kind).astype(np.float32)) for a in (0, 0.9))
        yield {"alpha": alpha, "eps": eps, "bounds": (low, high)}


@runs
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_sign_steps_have_the_bits_of_torch(backend, shape):
    x, gradient, origin = problem(shape)
    for _ in range(2):
        expected = eager_linf(x, gradient, origin, 2 / 255, 8 / 255)
        x = moved(backend, x, gradient, origin, alpha=2 / 255, eps=8 / 255)
        assert torch.equal(x, expected)
        gradient = gradient.roll(1)
    for each in values(shape, "linf"):
        got, want = (moved(name, x, gradient, origin, **each) for name in (backend, "torch"))
        assert torch.equal(got, want)


@runs
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_l2_steps_against_float64(backend, shape):
    tensors = problem(shape, 1)
    for each in values(shape, "l2"):
        got = moved(backend, *tensors, norm="l2", **each)
        alpha, eps, low, high = (v.numpy() for v in (each["alpha"], each["eps"], *each["bounds"]))
        want = _reference.pgd_step(*(t.numpy() for t in tensors), alpha, eps, low, high, "l2")
        # operands below 2, at most six roundings
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=6 * 2**-24)


@runs
def test_gradients_of_any_size_give_a_step_of_the_same(backend):
    x, gradient, origin = problem((4, 2, 3), 5, scale=0.0)
    gradient[0] = 0
    gradient[1] *= 1e-41  # 0.05 over their norm is no float32
    gradient[2] *= 1e37
    at = moved(backend, x, gradient, origin, alpha=0.05, eps=1.0, bounds=(-5.0, 5.0), norm="l2")
    assert torch.equal(at[0], x[0])
    torch.testing.assert_close((at - x)[1:].flatten(1).norm(dim=1), torch.full((3,), 0.05), rtol=1e-4, atol=0)


@runs
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 2500)])
def test_gradients_that_are_not_finite(backend, norm, shape):
    x, gradient, origin = problem(shape, 4)
    flat = gradient.view(6, -1)
    flat[1, -1] = torch.nan
    flat[2, 3], flat[2, 40] = torch.inf, -torch.inf
    flat[4, 50] = -torch.inf
    flat[5] = torch.nan
    for step in (0, 1, 7, -2):
        results = []
        for name in (backend, "torch"):
            broken = torch.tensor([-1, -1, -5, -1, 2, -1], dtype=torch.int32)
            at = moved(name, x, gradient, origin, alpha=0.1, eps=0.2, norm=norm, broken=broken, step=step)
            results.append((at, broken))
        assert results[0][1].tolist() == results[1][1].tolist() == [-1, step, step, -1, 2, step]
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)
        assert torch.equal(moved(backend, x, gradient, origin, alpha=0.1, eps=0.2, norm=norm), results[0][0])
    if norm == "l2":
        assert torch.equal(results[0][0][[1, 2, 4, 5]], x[[1, 2, 4, 5]])


@runs
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_empty_and_not_contiguous(backend, norm):
    for shape in ((0, 3, 4), (0,), (2, 0), (2, 3, 0)):
        x = torch.empty(shape)
        assert moved(backend, x, x, x, alpha=0.1, eps=0.1, norm=norm).shape == shape
    x, gradient, origin = problem((2, 3, 4, 5), 6)
    strided = gradient.contiguous(memory_format=torch.channels_last), origin.mT.contiguous().mT
    got, want = (moved(backend, x, *t, alpha=0.1, eps=0.05, norm=norm) for t in (strided, (gradient, origin)))
    assert torch.equal(got, want)


@runs
def test_a_sample_has_the_same_bits_in_every_batch(backend):
    tensors = problem((5, 3, 40, 41), 7)
    whole = moved(backend, *tensors, alpha=0.5, eps=0.6, norm="l2")
    for i in range(5):
        alone = moved(backend, *(t[i : i + 1] for t in tensors), alpha=0.5, eps=0.6, norm="l2")
        assert torch.equal(alone[0], whole[i])


@on_gpu
def test_a_gpu_chooses_cuda_where_it_is_built():
    want = "triton" if NO_CUDA else "cuda"
    assert cf.explain("pgd_step_", torch.zeros(2, 2, device="cuda")).backend == want
    if want == "cuda":
        x = torch.zeros(2, 2, device="cuda")
        for norm in ("linf", "l2"):
            pgd_step_(x, x + 1, x.clone(), alpha=0.1, eps=0.1, norm=norm)
            assert _dispatch.native_cuda().last_kernel() == norm


@on_gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(128, 3, 224, 224), (1, 3, 224, 224), (70_000, 17), (1, 5_000_001)])
def test_large_shapes(backend, norm, shape):
    torch.manual_seed(0)
    origin, gradient = torch.rand(shape, device="cuda"), torch.randn(shape, device="cuda")
    x = (origin + 0.01 * torch.randn_like(origin)).clamp(0, 1)
    options = {"alpha": 2 / 255, "eps": 8 / 255} if norm == "linf" else {"alpha": 2.0, "eps": 3.0}
    got, again, want = (
        pgd_step_(x.clone(), gradient, origin, norm=norm, backend=name, **options)
        for name in (backend, backend, "torch")
    )
    assert torch.equal(got, again)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)


@on_gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cuda_graph(backend, norm):
    """Numbers are not copied to the device, and nothing waits for it."""
    x, gradient, origin = (t.cuda() for t in problem((4, 3, 33, 32), 8))
    at, broken = x.clone(), torch.full((4,), -1, dtype=torch.int32, device="cuda")

    def step():
        at.copy_(x)
        pgd_step_(at, gradient, origin, alpha=0.1, eps=0.2, norm=norm, broken=broken, step=3, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gradient.copy_(gradient.roll(1, 0))
    gradient[2, 0, 0, 0] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    found = at.clone()
    assert broken.tolist() == [-1, -1, 3, -1]
    step()
    assert torch.equal(at, found) and not torch.equal(found[0], x[0])


@on_gpu
@pytest.mark.skipif(NO_CUDA is not None, reason=f"the CUDA kernels cannot run here: {NO_CUDA}")
@pytest.mark.parametrize("count", [0, 1, 3, 1000, 150_528])
@pytest.mark.parametrize("seed", [0, 5, 2**32, 2**64 - 1])
def test_noise_has_the_bits_of_the_cpu(count, seed):
    index = torch.tensor([0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63)])
    got = pgd_noise(index.cuda(), count, seed=seed)
    assert got.is_cuda and _dispatch.native_cuda().last_kernel() == "noise"
    assert torch.equal(got.cpu(), pgd_noise(index, count, seed=seed))
    assert torch.equal(pgd_noise(index.cuda(), count, seed=seed, backend="torch"), got)
