"""From arrays as they lie on disk to the rows, types and label bases of `Pairs`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data._values import decoded
from cmr_fast.errors import InputError

_MOST = 10**10
"""Numbers in a list; a pickle of a few bytes can hold a list of lists that would fill any memory."""


def as_array(value: Any, name: str) -> np.ndarray:
    """An array of numbers or text, out of an array, or a list of rows of one length."""
    if isinstance(value, Mapping):
        raise InputError(f"{name} is a dict, expected an array or a list of rows")
    size, part = 1, value
    while isinstance(part, list | tuple) and part:
        size, part = size * len(part), part[0]
    if size > _MOST:
        raise InputError(f"{name} is a list of about {size:.0e} numbers, expected at most {_MOST:.0e}")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is a list of rows of different shapes, expected one shape") from error
    if array.dtype.kind == "S":
        array = np.array([decoded(text) for text in array.ravel().tolist()], dtype=np.str_).reshape(array.shape)
    if array.dtype.kind == "O" and array.size and all(isinstance(text, str) for text in array.flat):
        array = array.astype(np.str_)
    if array.dtype.kind not in "biufU" or array.ndim == 0:
        raise InputError(f"{name} must be an array of numbers, or of text, got {array.dtype} {array.shape}")
    return array


def rows_first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays with one item a row. The number of items N is the size that all of them have on some axis.

    Vectors, (N, 1) and (1, N) are N items. A square matrix lies as the other matrices do, by rows where there is none.
    Raises InputError where no N fits all, or where several do and the arrays do not agree on the first axis either.
    """
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    common = set.intersection(*(_sizes(array) for array in arrays.values()))
    if len(common) > 1:
        common.discard(1)
    first = {len(array) for array in arrays.values()}
    if not common:
        raise InputError(f"the arrays disagree on the number of items: {shapes}; expected one size that all share")
    if len(common) > 1 and not (len(first) == 1 and first < common):
        raise InputError(f"cannot tell rows from columns, {sorted(common)} items would both fit: {shapes}")
    count = (first if len(common) > 1 else common).pop()
    axes = {name: [axis for axis, size in enumerate(a.shape) if size == count] for name, a in arrays.items()}
    matrices = [name for name, array in arrays.items() if array.ndim == 2 and len(axes[name]) == 1]
    # labels as one row or column lie either way whatever the features do
    lying = {axes[n][0] for n in matrices if 1 not in arrays[n].shape} or {axes[n][0] for n in matrices}
    for name, fitting in axes.items():
        if len(fitting) > 1:
            if arrays[name].ndim != 2 or len(lying) > 1:
                raise InputError(f"cannot tell on which axis of {name} the items are: {shapes}")
            axes[name] = list(lying) or [0]
    return {name: np.moveaxis(array, axes[name][0], 0) for name, array in arrays.items()}


def _sizes(array: np.ndarray) -> set[int]:
    return {len(array)} if array.dtype.kind == "U" else set(array.shape)


def image(array: np.ndarray, name: str) -> Tensor:
    """float32 (N, D) features, or uint8 (N, 3, H, W) of images with the channels on any axis but the first."""
    channels = [axis for axis in (1, 3, 2) if array.ndim == 4 and array.shape[axis] == 3]
    if _pooled(array) and not (channels and array.dtype == np.uint8):
        return features(array, name)
    if array.ndim != 4:
        return features(array, name)
    if not channels:
        raise InputError(
            f"{name} must hold images of 3 channels, or features (N, D), got shape {array.shape}; "
            "feature maps are made features by the mean over their last two axes"
        )
    if array.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            small = array.astype(np.uint8)
        if not np.array_equal(small, array):
            raise InputError(f"{name} must hold images of whole numbers from 0 to 255, got {array.dtype} beyond them")
        array = small
    return torch.from_numpy(np.require(np.moveaxis(array, channels[0], 1), requirements=["C", "W"]))


def _pooled(array: np.ndarray) -> bool:
    """Features with axes of size 1, as average pools leave them: (N, D, 1, 1)."""
    return array.ndim > 2 and sum(size > 1 for size in array.shape[1:]) <= 1


def text(array: np.ndarray, name: str) -> Tensor | tuple[tuple[str, ...], ...]:
    """float32 (N, D) features, or captions out of an array of text, (N,) or (N, captions) filled up with ""."""
    if array.dtype.kind != "U":
        return features(array, name)
    return tuple(tuple(c for c in row if c) for row in array.reshape(len(array), -1).tolist())


def features(array: np.ndarray, name: str) -> Tensor:
    """float32 (N, D); axes of size 1 that an average pool leaves are dropped."""
    if _pooled(array):
        array = array.reshape(len(array), -1)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be numbers, (N, features), got {array.dtype} {array.shape}")
    # in float32 such a number is infinite
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32).copy())


def labels(parts: Sequence[np.ndarray], name: str) -> tuple[list[Tensor], tuple[str, ...]]:
    """The labels of all splits, and the names of the classes where the labels were text.

    int64 (N,) class ids from 0, out of vectors of ids from any base, text, or one-hot rows; uint8 (N, C) out of 0/1
    or -1/1 rows of several labels. What the rows are is told from all splits together.
    """
    parts = [part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in parts]
    shapes = ", ".join(str(part.shape) for part in parts)
    if len({part.shape[1:] for part in parts}) > 1 or parts[0].ndim > 2:
        raise InputError(f"{name} must be (N,) class ids or (N, C) columns, the same in all splits, got {shapes}")
    whole = np.concatenate(parts)
    if len(whole) == 0:
        raise InputError(f"{name} are empty, got {shapes}")
    ends = np.cumsum([len(part) for part in parts])[:-1]
    names: tuple[str, ...] = ()
    if whole.dtype.kind == "U":
        if whole.ndim == 2:
            raise InputError(f"{name} given as text must be (N,), got {shapes}")
        classes, whole = np.unique(whole, return_inverse=True)
        names = tuple(classes.tolist())
    elif not np.isfinite(whole).all():
        raise InputError(f"{name} must be finite, got NaN or infinity")
    elif whole.ndim == 1:
        whole = _ids(whole, name)
    else:
        whole = _columns(whole, name)
    kind = np.int64 if whole.ndim == 1 else np.uint8
    return [torch.from_numpy(np.ascontiguousarray(part, dtype=kind).copy()) for part in np.split(whole, ends)], names


def _ids(values: np.ndarray, name: str) -> np.ndarray:
    """From 0, whatever the base: only which ids are equal counts."""
    if not np.array_equal(values, np.rint(values)) or values.min() < 0:
        seen = np.unique(values)[:5].tolist()
        raise InputError(f"{name} must be whole numbers of 0 or more, got {seen}")
    apart = values.max() - values.min()  # before the cast, which has no room for 1e20
    if apart >= max(1000, len(values)) or values.max() > np.iinfo(np.int64).max:
        raise InputError(
            f"{name} must be class ids, got {values.min()} to {values.max()}, {apart} apart in {len(values)} rows"
        )
    return (values - values.min()).astype(np.int64)


def _columns(values: np.ndarray, name: str) -> np.ndarray:
    # before np.unique, which has to sort
    present = values == 1
    if not (present | (values == 0)).all() and not (present | (values == -1)).all():
        seen = np.unique(values[~present])[:5].tolist()
        raise InputError(f"{name} of shape {values.shape} must be 0/1 or -1/1 columns, got {seen}")
    return present.argmax(axis=1) if (present.sum(axis=1) == 1).all() else present
