"""What the losses take: numbers, scalars and labels in the forms in which people have them."""

import numbers
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import check_float, fits_float, from_table, shown


def _seen(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else shown(value)[:80]


def as_number(value: Any, name: str) -> float:
    """A finite number as float."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or not fits_float(value) or not abs(float(value)) < float("inf"):
        raise InputError(f"{name} must be a finite number, got {_seen(value)}")
    return float(value)


def as_count(value: Any, name: str, least: int) -> int:
    """An integer of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} must be an integer of {least} or more, got {_seen(value)}")
    return int(value)


def as_scalar(value: Any, name: str, like: Tensor) -> Tensor | float:
    """A number, or a tensor of one float on the device of `like`."""
    if isinstance(value, Tensor):
        scalar: Tensor = value
        check_float(scalar, name)
        if scalar.numel() != 1 or scalar.dtype == torch.bool or scalar.is_complex():
            raise InputError(f"{name} must be a number or a tensor of one element, got {_seen(scalar)}")
        if scalar.device != like.device and scalar.ndim == 0 and scalar.device.type == "cpu":
            scalar = scalar.to(like.device)  # as torch's own arithmetic takes it
        return scalar if scalar.is_floating_point() else scalar.reshape(()).to(torch.float64)
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits_float(value):
        raise InputError(f"{name} must be a number or a tensor of one element, got {_seen(value)}")
    return float(value)


def check_features(x: Any, name: str) -> None:
    """Refuse what is not a floating-point tensor of rows."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.ndim != 2 or not x.is_floating_point():
        seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor (N, d), got {seen}")
    check_float(x, name)


def as_labels(value: Any, name: str) -> Tensor:
    """Labels as a dense tensor of bool, integers or floats; arrays, lists, columns and sparse matrices are taken."""
    expected = f"{name} must be class ids (N,) or multi-hot (N, C), of numbers"
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(f"{expected}, got a masked array: leave the masked rows out")
    if not isinstance(value, Tensor):
        try:
            array = from_table(value.toarray() if hasattr(value, "toarray") else value)
        except (TypeError, ValueError) as error:  # ValueError: rows of several lengths
            raise InputError(f"{expected}, got {type(value).__name__} ({error})") from error
        if array.dtype.kind not in "biuf":
            raise InputError(f"{expected}, got {type(value).__name__} of {array.dtype}")
        wide = {"b": np.bool_, "f": np.float64}.get(array.dtype.kind, np.int64)
        value = torch.from_numpy(array.astype(wide, order="C"))
    labels = cast(Tensor, value)
    check_float(labels, name)
    if labels.layout != torch.strided:
        labels = labels.to_dense()
    if labels.is_complex() or labels.ndim not in (1, 2):
        raise InputError(f"{expected}, got {_seen(labels)}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        raise InputError(f"{expected}, got one column {tuple(labels.shape)}: class ids are its values, labels[:, 0]")
    return labels.long() if labels.dtype in (torch.uint16, torch.uint32, torch.uint64) else labels


def as_class_ids(labels: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Class ids (N,) of bools or floats as integers that are equal where they are; all else as it is."""
    if labels.ndim != 1 or (others is not None and others.ndim != 1):
        return labels, others
    if not (labels.is_floating_point() or (others is not None and others.is_floating_point())):
        return labels.long(), None if others is None else others.long()
    together = labels.double() if others is None else torch.cat([labels.double(), others.double()])
    if bool(together.isnan().any()):
        raise InputError("class ids must be numbers, got NaN among them")
    ids: Tensor = torch.unique(together, return_inverse=True)[1]
    return ids[: len(labels)], None if others is None else ids[len(labels) :]
