"""What the training loop asks of a split: rows that can be counted, taken, moved and told apart. It knows no more."""

import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cmr_fast.errors import InputError

ROWS = "rows"


class Split(Protocol):
    """N samples with their labels; a batch is a split too, and knows which rows of the whole it holds.

    Whatever has these can be trained on: images that are read from disk in `select`, texts of any kind.
    """

    @property
    def rows(self) -> Tensor | None:
        """int64 (N,): the rows that `select` took; None of a split that was not selected."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,) class ids, or uint8 (N, C) multi-hot."""

    def __len__(self) -> int:
        """N."""

    def select(self, rows: Tensor) -> Self:
        """The samples at `rows` (int64 indices), in that order; what was checked once is not checked again."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The tensors on `device`, floats in `dtype`."""

    def joined(self, other: Self) -> Self:
        """The samples of both, this split's first."""

    def fingerprint(self) -> int:
        """A checksum of the labels and of up to 1000 samples: tells data sets of one shape apart."""


class Parts:
    """`Split` for frozen dataclasses whose fields, `rows` aside, hold N entries each.

    A field is a tensor, a tuple, or anything with a length that a tensor of rows indexes, such as images on disk.
    """

    labels: Tensor
    rows: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    def _parts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != ROWS}  # type: ignore[arg-type]

    def _unchecked(self, parts: dict[str, Any], rows: Tensor | None = None) -> Self:
        """A split of parts that need no check: they come from one that was checked."""
        result = object.__new__(type(self))
        for name, value in (parts | {ROWS: rows}).items():
            object.__setattr__(result, name, value)
        return result

    def select(self, rows: Tensor) -> Self:
        """The samples at `rows` (int64 indices), in that order; the result's `rows` are these."""
        return self._unchecked({name: _take(values, rows) for name, values in self._parts().items()}, rows)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The tensors on `device`, floats in `dtype`; what is no tensor stays where it is."""

        def move(values: Any) -> Any:
            if not isinstance(values, Tensor):
                return values
            return values.to(device, dtype if values.is_floating_point() else None)

        return self._unchecked({name: move(values) for name, values in self._parts().items()}, self.rows)

    def joined(self, other: Self) -> Self:
        """The samples of both, this split's first.

        Raises
        ------
        InputError
            Where a part is of another kind, or its entries of another shape.
        """
        others = other._parts()
        joined = {name: _join(name, values, others[name]) for name, values in self._parts().items()}
        return replace(self, **joined, rows=None)  # type: ignore[type-var]

    def fingerprint(self) -> int:
        """A checksum of the labels and of up to 1000 samples: tells data sets of one shape apart."""
        sample = self.select(torch.arange(0, len(self), max(1, len(self) // 1000)))
        value = zlib.crc32(_bytes(self.labels))
        for name, part in sample._parts().items():
            if name != "labels":
                value = zlib.crc32(_bytes(part) if isinstance(part, Tensor) else repr(part).encode(), value)
        return value

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name} {_kind(values)}" for name, values in self._parts().items())
        return f"{type(self).__name__}({len(self)}: {kinds})"


def _take(values: Any, rows: Tensor) -> Any:
    return tuple(values[i] for i in rows.tolist()) if isinstance(values, Sequence) else values[rows]


def _join(name: str, a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] == b.shape[1:]:
        return torch.cat([a, b])
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return (*a, *b)
    if type(a) is type(b) and hasattr(a, "joined"):
        return a.joined(b)
    raise InputError(f"{name} of the two splits do not fit together: {_kind(a)} and {_kind(b)}")


def _bytes(values: Tensor) -> bytes:
    values = values.cpu().contiguous()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy().tobytes()


def _kind(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
    if isinstance(values, Sequence):
        return f"{type(values[0]).__name__ if len(values) else 'empty'} x {len(values)}"
    return type(values).__name__
