"""Settings of the kind that their defaults are of."""

from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any

from cmr_fast.errors import InputError


def check_kinds(config: Any) -> None:
    """Refuse a field of a frozen dataclass whose value is of another kind than its default; numpy numbers are taken.

    Raises InputError: what the field expects and what it was given.
    """
    for field in fields(config):
        default, value = field.default, getattr(config, field.name)
        if default is MISSING:
            continue
        if isinstance(default, bool):
            good, expected = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            good, expected = isinstance(value, Integral) and not isinstance(value, bool), "a whole number"
        elif isinstance(default, float):
            good, expected = isinstance(value, Real) and not isinstance(value, bool), "a number"
        elif isinstance(default, str):
            good, expected = isinstance(value, str), "a text"
        else:
            continue
        if not good:
            raise InputError(f"{field.name} must be {expected}, got {value!r} ({type(value).__name__})")
        if isinstance(default, int | float) and type(value) not in (bool, int, float):
            object.__setattr__(config, field.name, int(value) if isinstance(default, int) else float(value))
