"""Retrieval between images and their captions, as the field reports it: R@K both ways, median ranks, rsum.

    TR  image -> text    an image is found at K where any of its captions is among the first K of all captions
    IR  text -> image    a caption is found at K where its image is among the first K of all images
    rsum                 the sum of R@1, R@5 and R@10 of both ways, in percent (0 to 600)

A rank is 1 more than the number of items that are more similar, and of equally similar ones (to the rounding of float64
sums) those of lower index come first, as in `evaluate_embeddings`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_integer
from cmr_fast.retrieval._checks import Array, check_embeddings, to_numpy
from cmr_fast.retrieval._scores import Scores

KS = (1, 5, 10)
_BLOCK = 1 << 21  # (caption, item) cells held at once


@dataclass(frozen=True, eq=False)
class CaptionRetrieval:
    """Ranks both ways, and what is reported of them. Arrays are int64, ranks count from 1.

    Attributes
    ----------
    caption_ranks : ndarray
        (M,): each caption's rank among all captions, its own image the query.
    image_ranks : ndarray
        (N,): of each image the best of its captions' ranks (text retrieval).
    text_ranks : ndarray
        (M,): the rank of each caption's image among all images (image retrieval).
    """

    caption_ranks: np.ndarray = field(repr=False)
    image_ranks: np.ndarray = field(repr=False)
    text_ranks: np.ndarray = field(repr=False)

    def recall(self, ks: int | Sequence[int] = KS) -> dict[str, dict[int, float]]:
        """R@K from 0 to 1.

        Parameters
        ----------
        ks : int or sequence of int
            1 or more each.

        Returns
        -------
        dict
            {"tr": {K: R@K}, "ir": {K: R@K}}.
        """
        cuts = [as_integer(k, "K", 1) for k in ((ks,) if isinstance(ks, int) else ks)]
        ways = {"tr": self.image_ranks, "ir": self.text_ranks}
        return {way: {k: float((ranks <= k).mean()) for k in cuts} for way, ranks in ways.items()}

    @property
    def median_rank(self) -> dict[str, float]:
        """{"tr", "ir"}: the median of the ranks; of two middle ones their mean, rounded down as the field does."""
        return {
            "tr": float(np.floor(np.median(self.image_ranks))),
            "ir": float(np.floor(np.median(self.text_ranks))),
        }

    @property
    def mean_rank(self) -> dict[str, float]:
        """{"tr", "ir"}: the mean of the ranks."""
        return {"tr": float(self.image_ranks.mean()), "ir": float(self.text_ranks.mean())}

    @property
    def rsum(self) -> float:
        """The sum of R@1, R@5, R@10 of both ways, in percent."""
        return 100 * sum(share for way in self.recall().values() for share in way.values())


def evaluate_captions(image: Array, text: Array, owner: Array, *, folds: int = 1) -> CaptionRetrieval:
    """Rank all captions for each image and all images for each caption, by cosine in float64.

    Parameters
    ----------
    image : ndarray or Tensor
        (N, d) embeddings.
    text : ndarray or Tensor
        (M, d) embeddings of the captions, any number an image.
    owner : ndarray or Tensor
        int (M,): the row of each caption's image. Every image has a caption.
    folds : int
        Parts of as many images, in their order, each ranked within itself; it divides N. Of COCO's 5,000 test images 5
        is what the field calls "1K".

    Returns
    -------
    CaptionRetrieval
        Ranks, R@K, median rank and rsum; R@K over folds is the mean of theirs.

    Raises
    ------
    InputError
        For arrays that are not finite embeddings of one width, or an owner that is no image, or an image without one.

    Examples
    --------
    >>> import torch
    >>> from cmr_fast.retrieval import evaluate_captions
    >>> image, text = torch.eye(2), torch.tensor([[1.0, 0.1], [0.2, 1.0], [1.0, 0.0]])
    >>> result = evaluate_captions(image, text, torch.tensor([0, 1, 1]))
    >>> result.image_ranks, result.text_ranks
    (array([2, 1]), array([1, 1, 2]))
    """
    x, y = check_embeddings(image, text)
    rows = to_numpy(owner, "owner")
    if rows.dtype.kind not in "iu" or rows.shape != (len(y),):
        raise InputError(f"owner must be integers ({len(y)},), the image of each text, got {rows.dtype} {rows.shape}")
    rows = rows.astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(x):
        raise InputError(f"owner must lie from 0 to {len(x) - 1}, the images, got {rows.min()} to {rows.max()}")
    alone = np.setdiff1d(np.arange(len(x)), rows)
    if len(alone):
        raise InputError(f"every image needs a text: {len(alone)} have none, image {alone[0]} first")
    folds = as_integer(folds, "folds", 1)
    if len(x) % folds:
        raise InputError(f"folds must divide the {len(x)} images, got {folds}")
    caption_ranks, text_ranks = np.empty((2, len(y)), dtype=np.int64)
    image_ranks = np.empty(len(x), dtype=np.int64)
    size = len(x) // folds
    for first in range(0, len(x), size):
        mine = np.flatnonzero((rows >= first) & (rows < first + size))
        fold = slice(first, first + size)
        caption_ranks[mine], image_ranks[fold], text_ranks[mine] = _both_ways(
            x[fold], y[torch.from_numpy(mine)], rows[mine] - first
        )
    return CaptionRetrieval(caption_ranks, image_ranks, text_ranks)


def _both_ways(x: Tensor, y: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of captions, of images and of texts, as CaptionRetrieval has them."""
    order = np.argsort(rows, kind="stable")  # captions image by image
    caption_ranks = np.empty(len(y), dtype=np.int64)
    caption_ranks[order] = _ranks(Scores(x, y, "cosine"), rows[order], order, len(y))
    text_ranks = _ranks(Scores(y, x, "cosine"), np.arange(len(y)), rows, len(x))
    image_ranks = np.full(len(x), len(y), dtype=np.int64)
    np.minimum.at(image_ranks, rows, caption_ranks)
    return caption_ranks, image_ranks, text_ranks


def _ranks(scores: Scores, queries: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """int64 (P,): the rank of item p for query p among `count` items; `queries` ascend."""
    ranks = np.empty(len(queries), dtype=np.int64)
    step = max(1, _BLOCK // count)
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        each, wanted = np.unique(queries[part], return_inverse=True)
        keys, apart = scores.coarse(slice(int(each[0]), int(each[-1]) + 1), 60)
        place = each - each[0]
        near = _count(keys[place[wanted]], items[part], apart[place[wanted]])
        ranks[part] = near[0]
        doubtful = np.flatnonzero(near[1] > 1)
        if len(doubtful):  # another item is nearly as similar
            again, row = np.unique(queries[part][doubtful], return_inverse=True)
            exact = scores.exact(again)[row]
            ranks[start + doubtful] = _count(exact, items[part][doubtful], np.zeros(len(doubtful), dtype=np.int64))[0]
    return ranks


def _count(keys: np.ndarray, items: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (P, N) keys: each item's rank, and how many keys lie within `apart` of its own, itself among them."""
    own = keys[np.arange(len(items)), items][:, None]
    earlier = (keys == own) & (np.arange(keys.shape[1]) < items[:, None])
    ranks = 1 + np.count_nonzero(keys < own, axis=1) + np.count_nonzero(earlier, axis=1)
    away = np.minimum(apart, 1 << 61)[:, None]
    return ranks, np.count_nonzero(np.abs(keys - own) <= away, axis=1)
