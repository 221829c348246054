"""Losses over triplets by the CUDA kernels, emulated on the host (conftest.py)."""

import numpy as np
import pytest
import torch

from cmr_fast.ops import _dispatch, triplet


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", triplet.DISTANCES)
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_triplets_are_those_of_the_cpu(emulated, order, mining, distance, cross, monkeypatch):
    """Losses, gradients, ties: the same weights, so the same bits but for the order of float64 sums."""
    rng = np.random.default_rng(0)
    for n, others, classes in ((1, 1, 2), (7, 5, 2), (70, 300, 3), (40, 33, None)):
        x = torch.from_numpy(rng.integers(-2, 3, (n, 4)).astype(np.float32))
        other = torch.from_numpy(rng.integers(-2, 3, (others, 4)).astype(np.float32)) if cross else None
        mine, theirs = (
            torch.from_numpy(rng.random((count, 70)) < 0.01 if classes is None else rng.integers(0, classes, count))
            for count in (n, others)
        )
        results = []
        for backend in ("cuda", "cpp"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dispatch, "choose_backend", lambda *_, chosen=backend: chosen)
                a, b = x.clone().requires_grad_(), None if other is None else other.clone().requires_grad_()
                loss = triplet.triplet_margin(
                    a, mine, 0.5, mining=mining, distance=distance, other=b, other_labels=theirs if cross else None
                )
                loss.backward()
                results.append((loss.detach(), a.grad, *([b.grad] if cross else [])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_triplets_of_as_many_candidates_as_a_row_may_have(emulated):
    rng = np.random.default_rng(1)
    x, other = (torch.from_numpy(rng.standard_normal((n, 8)).astype(np.float32)) for n in (3, 4096))
    mine, theirs = torch.zeros(3, dtype=torch.int64), torch.from_numpy((rng.random(4096) < 0.4).astype(np.int64))
    for mining in triplet.MINING:
        losses = []
        for backend in ("cuda", "cpp"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dispatch, "choose_backend", lambda *_, chosen=backend: chosen)
                losses.append(triplet.triplet_margin(x, mine, 0.1, mining=mining, other=other, other_labels=theirs))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
