"""What the training loop asks of a split: rows that can be counted, taken, moved and told apart. It knows no more."""

import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

ROWS = "rows"


class Split(Protocol):
    """N samples with their labels; a batch is a split too, and knows which rows of the whole it holds."""

    @property
    def rows(self) -> Tensor | None:
        """int64 (N,): the rows that `select` took; None of a split that was not selected."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> Self:
        """The samples at `rows` (int64 indices), in that order; what was checked once is not checked again."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The tensors on `device`, floats in `dtype`."""

    def joined(self, other: Self) -> Self:
        """This split's samples, then the other's."""

    def fingerprint(self) -> int:
        """A checksum of the labels and of up to 1000 samples: tells data sets of one shape apart."""


class Parts:
    """`Split` for frozen dataclasses whose fields, `rows` aside, are tensors or sequences of N entries."""

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
        """The tensors on `device`, floats in `dtype`; sequences stay where they are."""

        def move(values: Any) -> Any:
            if not isinstance(values, Tensor):
                return values
            return values.to(device, dtype if values.is_floating_point() else None)

        return self._unchecked({name: move(values) for name, values in self._parts().items()}, self.rows)

    def joined(self, other: Self) -> Self:
        """This split's samples, then the other's. Raises InputError where they do not fit together."""
        theirs = other._parts()
        return replace(  # type: ignore[type-var]
            self, **{name: _join(values, theirs[name]) for name, values in self._parts().items()}, rows=None
        )

    def fingerprint(self) -> int:
        """A checksum of the labels and of up to 1000 samples: tells data sets of one shape apart."""
        sample = self.select(torch.arange(0, len(self), max(1, len(self) // 1000)))
        value = zlib.crc32(self.labels.cpu().numpy().tobytes())
        for name, part in sample._parts().items():
            if name != "labels":
                raw = part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
                value = zlib.crc32(raw, value)
        return value

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name} {_kind(values)}" for name, values in self._parts().items())
        return f"{type(self).__name__}({len(self)}: {kinds})"


def _take(values: Any, rows: Tensor) -> Any:
    return values[rows] if isinstance(values, Tensor) else tuple(values[i] for i in rows.tolist())


def _join(a: Any, b: Any) -> Any:
    return torch.cat([a, b]) if isinstance(a, Tensor) else (*a, *b)


def _kind(values: Tensor | Sequence[Any]) -> str:
    if isinstance(values, Tensor):
        return f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
    return f"{type(values[0]).__name__ if len(values) else 'empty'} x {len(values)}"
