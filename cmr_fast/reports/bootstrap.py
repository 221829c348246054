"""Intervals by drawing images anew."""

from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def interval(parts: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The sum of the means of independent samples, and its 95 % bootstrap interval.

    Parameters
    ----------
    parts
        Float (N,) each, a value an image.
    """
    random = np.random.default_rng(0)
    drawn = sum(part[random.integers(len(part), size=(DRAWS, len(part)))].mean(axis=1) for part in parts)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(sum(part.mean() for part in parts)), float(low), float(high)
