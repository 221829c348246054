"""The settings of attacks, checked where they are given: a setting of the wrong kind is an InputError, named."""

import numpy as np
import torch

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_integer, fits_float, shown
from cmr_fast.ops.pgd import Value

MOST = 2**31 - 1  # of a count


def quarter(eps: Value) -> Value:
    """eps / 4, the step of alpha=None; where eps is 0 any step above it.

    Parameters
    ----------
    eps
        A number, or numbers of any shape.
    """
    if isinstance(eps, (int, float)):
        return eps / 4 or 1.0
    part = torch.as_tensor(eps) / 4
    return torch.where(part > 0, part, 1.0)


def flag(name: str, value: object) -> bool:
    """True or False, of Python's or numpy's.

    Parameters
    ----------
    name
        Of the setting.
    value
        What was given.

    Raises
    ------
    InputError
        For anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def whole(name: str, value: object, least: int, most: int = MOST) -> int:
    """An integer from `least` to `most`, of Python's or numpy's.

    Parameters
    ----------
    name
        Of the setting.
    value
        What was given.
    least, most
        Its range.

    Raises
    ------
    InputError
        For anything else.
    """
    return as_integer(value, name, least, most)


def real(name: str, value: object, least: float, most: float, *, above: bool = False) -> float:
    """A real number from `least` to `most`, of Python's or numpy's.

    Parameters
    ----------
    name
        Of the setting.
    value
        What was given.
    least, most, above
        Its range; `least` left out where `above`.

    Raises
    ------
    InputError
        For anything else.
    """
    fits = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    fits = fits and fits_float(value)
    if not fits or not (least < value <= most if above else least <= value <= most):  # type: ignore[operator]
        end = "" if most == float("inf") else f" and at most {most:g}"
        raise InputError(f"{name} must be a number{_limit(least, above)}{end}, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def numbers(name: str, value: Value, least: float | None = None, *, above: bool = False) -> Value:
    """A finite number, or numbers, of `least` or more each.

    Parameters
    ----------
    name
        Of the setting.
    value
        What was given.
    least, above
        The least that each may be, itself left out where `above`.

    Returns
    -------
    float or Value
        A number as a float, numbers as they are.

    Raises
    ------
    InputError
        For anything else.
    """
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be a number or numbers, got {shown(value)}") from error
    fits = (tensor > least if above else tensor >= least) if least is not None else torch.ones_like(tensor).bool()
    if not tensor.numel() or not bool((fits & tensor.isfinite()).all()):
        raise InputError(f"{name} must be finite{_limit(least, above)}, got {value}")
    return float(value) if isinstance(value, (bool, int, float)) else value


def _limit(least: float | None, above: bool) -> str:
    return "" if least is None else f" and {'above' if above else 'at least'} {least:g}"
