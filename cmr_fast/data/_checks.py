"""Checks of options that every loader takes."""

import operator
from typing import Any

from cmr_fast.errors import InputError


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; numpy's integers are integers, True and 2.0 are not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}")
    return number


def check_text(name: str, value: Any) -> None:
    """Refuse anything but text and None."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}")
