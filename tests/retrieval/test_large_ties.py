"""Ties of many items: closed forms of their expected precision must not cancel."""

from fractions import Fraction

import numpy as np
import pytest

import cmr_fast as cf


@pytest.mark.parametrize("n", [1_000, 200_000, 4_000_000])
def test_hits_behind_a_large_group(n):
    """2 n codes at one distance, every other one relevant. The pessimist's hits are at the ranks n + 1 and n + 2."""
    db, labels = np.zeros((2 * n, 1), np.uint8), np.zeros(2 * n, np.int64)
    labels[::2] = 1
    result = cf.evaluate_codes(
        db[:1], db, np.array([1]), labels, k=2, convention="first_k_hits", ties="pessimistic", threads=1
    )
    want = (Fraction(1, n + 1) + Fraction(2, n + 2)) / 2
    assert result.map == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("n", [1_000, 1_000_000])
def test_the_mean_over_a_large_group(n):
    """With half of 2 n items relevant, the mean AP over all orders, rank by rank."""
    db, labels = np.zeros((2 * n, 1), np.uint8), np.zeros(2 * n, np.int64)
    labels[::2] = 1
    result = cf.evaluate_codes(db[:1], db, np.array([1]), labels, ties="tie_aware", threads=1)
    # a hit at rank i has (i - 1) (n - 1) / (2 n - 1) + 1 hits up to it, on the average
    rank = np.arange(1, 2 * n + 1, dtype=np.longdouble)
    want = (((rank - 1) * (n - 1) / (2 * n - 1) + 1) / rank).sum() / (2 * n)
    assert result.map == pytest.approx(float(want), rel=1e-12)
