"""Transport problems and their tolerances, for tests/ops/test_sinkhorn*.py."""

import numpy as np

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 4), (7, 17), (16, 16), (33, 31), (60, 60), (64, 100)]


def costs(seed, problems, m, n, high=2.0):
    return (high * np.random.default_rng(seed).random((problems, m, n))).astype(np.float32)


def masses(seed, problems, size, zeros=0):
    x = np.random.default_rng(seed).random((problems, size)) + 0.1
    x[:, :zeros] = 0
    return (x / x.sum(axis=1, keepdims=True)).astype(np.float32)


def assert_plans(got, want, cost, reg, run):
    """In units of a mean entry. torch in float32 rounds all of cost / reg, the native kernel differences only."""
    scale = want.sum() / want.size or 1.0
    rounding = np.abs(cost).max() / reg * (1e-6 if run == "torch" else 1e-7)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got / scale, want / scale, rtol=3e-5 + rounding, atol=1e-4 * (1 + 10 * rounding))
