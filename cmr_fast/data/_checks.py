"""Checks of options that every loader takes."""

from typing import Any

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_integer


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; numpy's integers are integers, True and 2.0 are not."""
    return as_integer(value, name, least)


def caption_fault(caption: str) -> str | None:
    """What keeps a text from being a caption, or None; halves of a character (JSON has them) are in no tokenizer."""
    if not caption.strip():
        return "an empty caption"
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "a caption with half a character"
    return None if any(map(str.isalnum, caption)) else "a caption without words"


def check_text(name: str, value: Any) -> None:
    """Refuse anything but text and None."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}")
