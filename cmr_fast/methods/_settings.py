"""Settings of the kind that their defaults are of."""

import math
from collections.abc import Sequence
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


def check_least(config: Any, **least: int) -> None:
    """Refuse fields below their least value: name=least."""
    for name, low in least.items():
        if getattr(config, name) < low:
            raise InputError(f"{name} must be at least {low}, got {getattr(config, name)}")


def check_finite(config: Any, *names: str) -> None:
    """Refuse fields that are not finite and 0 or more."""
    for name in names:
        if not (math.isfinite(getattr(config, name)) and getattr(config, name) >= 0):
            raise InputError(f"{name} must be finite and at least 0, got {getattr(config, name)}")


def check_choices(config: Any, **choices: Sequence[str]) -> None:
    """Refuse fields that are none of their values: name=values."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
