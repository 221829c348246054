"""Checks of options that every loader takes."""

from typing import Any

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_integer


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; numpy's integers are integers, True and 2.0 are not."""
    return as_integer(value, name, least)


def check_text(name: str, value: Any) -> None:
    """Refuse anything but text and None."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}")
