"""The CUDA backend of triplet_margin, on a GPU, against the CPU.

tests/native/test_emulated_triplet.py runs the same kernels on the host.
"""

import numpy as np
import pytest
import torch

import cmr_fast as cf
from cmr_fast.ops import _dispatch, triplet, triplet_margin

REASON = _dispatch.unavailable("cuda", "cuda")
needs_gpu = pytest.mark.skipif(REASON is not None, reason=f"the CUDA kernels cannot run here: {REASON}")


def points(rng, count):
    half = rng.integers(-2, 3, (count // 2, 4))
    return rng.permutation(np.concatenate([half, -half, np.zeros((count % 2, 4))])).astype(np.float32)


def found(device, x, labels, other, other_labels, **options):
    """Loss and gradients on the CPU."""
    leaves = [None if t is None else t.to(device, copy=True).requires_grad_() for t in (x, other)]
    theirs = None if other is None else other_labels.to(device)
    loss = triplet_margin(leaves[0], labels.to(device), 0.5, other=leaves[1], other_labels=theirs, **options)
    loss.backward()
    return [loss.detach().cpu(), *(t.grad.cpu() for t in leaves if t is not None)]


@needs_gpu
@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", triplet.DISTANCES)
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_equals_the_cpu(mining, distance, cross):
    """Whole coordinates around 0: means and products are exact in any order, so ties are the same."""
    rng = np.random.default_rng(0)
    for n, others, classes in ((1, 1, 2), (70, 300, 3), (400, 4096, 10), (40, 33, None)):
        x, other = (torch.from_numpy(points(rng, m)) for m in (n, others))
        mine, theirs = (
            torch.from_numpy(rng.random((m, 70)) < 0.01 if classes is None else rng.integers(0, classes, m))
            for m in (n, others)
        )
        arguments = (x, mine, other, theirs) if cross else (x, mine, None, None)
        options = {"mining": mining, "distance": distance}
        got, again = (found("cuda", *arguments, backend="cuda", **options) for _ in range(2))
        want = found("cpu", *arguments, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_gpu_chooses_it():
    assert cf.explain("triplet_margin", torch.zeros(2, 2, device="cuda")).backend == "cuda"
