"""What text attacks share: the calling habit, batches, the victim left as it was, what is told of the changes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from cmr_fast.attacks.settings import flag, whole
from cmr_fast.attacks.text.encoder import FlatTexts, TextEncoder
from cmr_fast.attacks.text.objectives import Objective, find
from cmr_fast.attacks.text.words import check_texts
from cmr_fast.errors import InputError

Embeddings = Tensor | np.ndarray


@dataclass(frozen=True)
class Change:
    """One change of a caption: where, what stood there and what stands there now.

    Attributes
    ----------
    place
        Of a word its number; of a character its place in the text before, counted with the gaps: 2 i + 1 is character
        i, 2 i the gap before it.
    before, after
        Words, or characters; "" for what is inserted or taken out.
    """

    place: int
    before: str
    after: str


@dataclass(frozen=True)
class Result:
    """A caption attacked: its text, the objective there, and its changes in the order in which they were made."""

    text: str
    objective: float
    changes: list[Change]


@dataclass(frozen=True)
class TextInfo:
    """What return_info=True adds, one entry a caption.

    Attributes
    ----------
    changes
        In the order in which they were made.
    objective
        float (N,), of the texts returned.
    queries
        Different texts that went through the victim.
    """

    changes: list[list[Change]]
    objective: Tensor
    queries: int

    def __repr__(self) -> str:
        """In one line."""
        changed = sum(map(bool, self.changes))
        return f"TextInfo({changed} of {len(self.changes)} changed, {self.queries} texts through the victim)"


class TextAttack:
    """Calling habits and checks; a subclass says how a batch of captions is attacked in `_attack`."""

    def __init__(
        self, victim: TextEncoder, objective: str | Objective, dtype: torch.dtype | None, batch: int,
        tokens: int | None, check: bool,
    ) -> None:  # fmt: skip
        self.texts = FlatTexts(victim, dtype, None if tokens is None else whole("tokens", tokens, 1))
        self.objective, self.batch, self.check = find(objective), whole("batch", batch, 1), flag("check", check)

    @property
    def model(self) -> TextEncoder:
        """The victim."""
        return self.texts.model

    @overload
    def __call__(
        self, texts: Sequence[str], images: Embeddings | None = None, *, index: object = None,
        return_info: Literal[False] = False,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def __call__(
        self, texts: Sequence[str], images: Embeddings | None = None, *, index: object = None,
        return_info: Literal[True],
    ) -> tuple[list[str], TextInfo]: ...  # fmt: skip

    def __call__(
        self, texts: Sequence[str], images: Embeddings | None = None, *, index: object = None, return_info: bool = False
    ) -> list[str] | tuple[list[str], TextInfo]:
        """Adversarial captions.

        Parameters
        ----------
        texts
            N captions.
        images
            Embeddings of their images, float (N, d), for objectives that use them.
        index
            int64 (N,) numbers that a caption's random draws depend on, besides the seed. By default its place in
            `texts`. An attack without such draws has no use for it.
        return_info
            Return a TextInfo beside them.

        Returns
        -------
        adv
            list of str; with return_info (adv, TextInfo).

        Raises
        ------
        InputError
            For captions without words, images of another shape, and a victim that ignores its text.
        """
        texts = check_texts(texts)
        numbers = _numbers(index, len(texts))
        before = self.texts.queries
        results: list[Result] = []
        with self.texts.prepare(), self._holding():
            targets = None if images is None else checked_images(images, len(texts), self.texts.device)
            for start in range(0, len(texts), self.batch):
                rows = slice(start, start + self.batch)
                results += self._attack(texts[rows], None if targets is None else targets[rows], numbers[rows])
        adversarial = [result.text for result in results]
        if not return_info:
            return adversarial
        values = torch.tensor([result.objective for result in results])
        return adversarial, TextInfo([r.changes for r in results], values, self.texts.queries - before)

    def _holding(self) -> AbstractContextManager[None]:
        """What else is held in evaluation mode."""
        return nullcontext()

    def _attack(self, texts: list[str], images: Tensor | None, numbers: Tensor) -> list[Result]:
        """The captions of a batch, attacked to the end."""
        raise NotImplementedError

    def _refuse_deaf(self, clean: Tensor, moved: Tensor) -> None:
        """InputError, once, where different texts all have the same embedding."""
        if not self.check or not len(moved):
            return
        every = torch.cat([clean, moved])
        if bool((every - every[:1]).abs().amax() <= 1e-6 * every.abs().amax()):
            raise InputError(
                f"the victim ignores its text: {len(every)} different ones have the same embedding; expected an "
                "encoder that they change (check=False attacks it all the same)"
            )
        self.check = False


def _numbers(index: object, count: int) -> Tensor:
    if index is None:
        return torch.arange(count)
    try:
        numbers = torch.as_tensor(index)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"index must be integers ({count},), got {type(index).__name__}") from error
    if numbers.shape != (count,) or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise InputError(f"index must be integers ({count},), got {numbers.dtype} {tuple(numbers.shape)}")
    return numbers.long().cpu()


def checked_images(images: object, count: int, device: torch.device) -> Tensor:
    """Embeddings of images, on a device.

    Parameters
    ----------
    images
        As they were given.
    count
        How many there must be.
    device
        Where they are needed.

    Raises
    ------
    InputError
        For anything but finite floats (count, d).
    """
    tensor = torch.as_tensor(images) if isinstance(images, (Tensor, np.ndarray)) else None
    if tensor is None or not tensor.is_floating_point() or tensor.ndim != 2 or len(tensor) != count:
        seen = type(images).__name__ if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise InputError(f"images must be embeddings, floats ({count}, d), one a caption, got {seen}")
    if len(broken := (~tensor.isfinite().all(dim=1)).nonzero()):
        raise InputError(f"images must be finite embeddings, row {int(broken[0])} is not")
    return tensor.detach().to(device)
