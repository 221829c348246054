"""Training methods, one file per paper, and the loop that trains them all."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.methods.method import Method

_CLASSES = {
    "acmr": ("acmr", "ACMR"),
    "cmimh": ("cmimh", "CMIMH"),
    "dcmh": ("dcmh", "DCMH"),
    "ssah": ("ssah", "SSAH"),
    "djsrh": ("djsrh", "DJSRH"),
    "clip": ("clip", "Clip"),
    "finetune": ("mat", "Finetune"),
    "tecoa": ("mat", "Tecoa"),
    "mat-img": ("mat", "MatImg"),
    "mat": ("mat", "Mat"),
    "mmcoa": ("mmcoa", "Mmcoa"),
    "fare": ("fare", "Fare"),
    "leaf": ("fare", "Leaf"),
    "scatter": ("scatter", "Scatter"),
    "madry": ("scatter", "Madry"),
    "plain": ("scatter", "Plain"),
    "random-targeted": ("scatter", "RandomTargeted"),
}


class _Methods(Mapping[str, "type[Method]"]):
    """Method classes by name; a method's module is imported when it is first asked for."""

    def __getitem__(self, name: str) -> "type[Method]":
        if name not in _CLASSES:
            raise InputError(f"unknown method {name!r}, expected one of {', '.join(_CLASSES)}")
        module, kind = _CLASSES[name]
        return getattr(import_module(f"cmr_fast.methods.{module}"), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES


METHODS = _Methods()
