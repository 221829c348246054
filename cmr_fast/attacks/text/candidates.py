"""The words that a masked language model would put in the place of another (Li et al. 2020, section 3.2).

The model reads the caption as it is, unmasked. A word of one piece gets the k likeliest pieces at its position; a word
of several the product of the 4 likeliest at each of its first 12 positions, the first 24 of it, ordered by how likely
the model finds them standing alone.
"""

from collections.abc import Sequence
from itertools import islice, product
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks.text.encoder import chunks, split, tokens_on
from cmr_fast.attacks.text.words import STOP_WORDS, Caption, is_word
from cmr_fast.errors import InputError

EACH, POSITIONS, MOST = 4, 12, 24  # of a word of several pieces: Li et al.'s code
LOGITS = 512  # rows of the vocabulary's width at once
Ids = tuple[int, ...]


@runtime_checkable
class WordModel(Protocol):
    """What of a masked language model is needed (models.mlm.MaskedLM has it)."""

    context: int
    special: frozenset[int]

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of [CLS] and [SEP]."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def pieces(self, words: Sequence[str]) -> list[list[int]]:
        """Numbers of each word's pieces."""

    def text(self, pieces: Sequence[int]) -> str:
        """What pieces read, ## kept where the first has it."""

    def word(self, pieces: Sequence[int]) -> str | None:
        """The same, or None where it is no whole word."""

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Float (N, L, d) of int64 and bool (N, L)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Float (..., V) of (..., d)."""


class Candidates:
    """Candidates for words of one batch of captions.

    Parameters
    ----------
    mlm
        The masked language model.
    captions
        The batch.
    k
        Of the likeliest pieces at a position.
    threshold
        Least logit of a word of one piece; 0 for none.
    max_length
        Tokens of a caption that the model reads, [CLS] and [SEP] counted.
    previous
        Take the pieces predicted one position before the word's own, and leave in what is no word: Co-Attack's code.
    tokens
        Of a forward pass; None as of FlatTexts.
    """

    def __init__(
        self,
        mlm: WordModel,
        captions: Sequence[Caption],
        *,
        k: int,
        threshold: float,
        max_length: int,
        previous: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.mlm, self.k, self.threshold, self.previous = mlm, k, threshold, previous
        self.most = tokens or tokens_on(mlm.device)
        self.captions, self.max_length = captions, max_length
        mlm.pieces([part for caption in captions for part in (*caption.words, *caption.gaps)])  # tokenized in one go
        self.places: list[list[tuple[int, int]]] = []  # of each word: its pieces, as positions of the ids
        rows: list[Ids] = []
        for caption in captions:
            row, places = [mlm.ends[0]], []
            for gap, pieces in zip(mlm.pieces(caption.gaps), [*mlm.pieces(caption.words), []], strict=True):
                row += gap
                places.append((len(row), len(row) + len(pieces)))
                row += pieces
            rows.append((*row[: max_length - 1], mlm.ends[1]))
            self.places.append(places[:-1])
        self._rows = rows  # ids of each caption
        self._hidden: dict[Ids, Tensor] = {}  # (L, d) by ids
        self._ranked: dict[tuple[Ids, ...], list[Ids]] = {}
        self._found: dict[tuple[int, int], list[str]] = {}

    def reads(self, caption: int, word: int) -> bool:
        """Whether the model reads a word: it has pieces, and they lie within max_length.

        Parameters
        ----------
        caption, word
            Their numbers.
        """
        first, end = self.places[caption][word]
        if self.previous:  # Co-Attack's rule, of positions that begin at 0 for the first word
            return first - 1 <= self.max_length - 2
        return first < end <= self.max_length - 1

    def __call__(self, chosen: Sequence[tuple[int, int]]) -> list[list[str]]:
        """Candidates for words, the likeliest first; the word itself, stop words and parts of words are none.

        Parameters
        ----------
        chosen
            (caption, word) each.
        """
        new = [pair for pair in dict.fromkeys(chosen) if pair not in self._found]
        self._found.update(zip(new, self._find(new), strict=True))
        return [self._found[pair] for pair in chosen]

    def _find(self, chosen: Sequence[tuple[int, int]]) -> list[list[str]]:
        self._read([caption for caption, _ in chosen])
        vectors = []
        for caption, word in chosen:
            first, end = (place - self.previous for place in self.places[caption][word])
            vectors.append(self._hidden[self._rows[caption]][first:end])
        spans = [len(vector) for vector in vectors]  # positions
        if not sum(spans):
            return [[] for _ in chosen]
        logits = map(self.mlm.logits, torch.cat(vectors).split(LOGITS))
        tops = [part.topk(min(self.k, part.shape[-1]), dim=-1) for part in logits]
        values = torch.cat([top.values for top in tops]).cpu().split(spans)
        pieces = torch.cat([top.indices for top in tops]).cpu().split(spans)
        self._rank([_few(piece) for piece in pieces if len(piece) > 1])
        return [
            self._words(self._fragments(value, piece), self.captions[caption].words[word])
            for (caption, word), value, piece in zip(chosen, values, pieces, strict=True)
        ]

    def _read(self, captions: Sequence[int]) -> None:
        """Keep what the model makes of captions, (L, d) each."""
        rows = sorted({self._rows[i] for i in captions} - self._hidden.keys(), key=lambda row: (-len(row), row))
        for row, hidden in zip(rows, self._passed(rows), strict=True):
            self._hidden[row] = hidden

    def _passed(self, rows: Sequence[Ids]) -> list[Tensor]:
        """(L, d) of each row; the longest come first."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)

        def read(numbers: Tensor) -> Tensor:
            part = [rows[i] for i in numbers.tolist()]
            ids = torch.zeros((len(part), len(part[0])), dtype=torch.int64)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for i, row in enumerate(part):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
            return self.mlm.hidden(ids.to(self.mlm.device), mask.to(self.mlm.device))

        every = torch.arange(len(rows))
        batches = [hidden for part in chunks(lengths, self.most) for hidden in split(read, every[part])]
        flat = [hidden for batch in batches for hidden in batch]
        return [hidden[: len(row)] for row, hidden in zip(rows, flat, strict=True)]

    def _fragments(self, values: Tensor, pieces: Tensor) -> list[Ids]:
        """Pieces of each candidate, of logits and pieces (positions, k)."""
        if len(pieces) > 1:
            return self._ranked[_few(pieces)]
        kept = pieces if self.threshold == 0 else pieces[values >= self.threshold]
        return [(piece,) for piece in kept.flatten().tolist()]

    def _rank(self, grids: Sequence[tuple[Ids, ...]]) -> None:
        """Keep the products of pieces in the order of the perplexity that the model gives them standing alone."""
        new = [grid for grid in dict.fromkeys(grids) if grid not in self._ranked]
        products = {grid: list(islice(product(*grid), MOST)) for grid in new}
        fragments = list(dict.fromkeys(fragment for some in products.values() for fragment in some))
        fragments.sort(key=len, reverse=True)
        losses: dict[Ids, float] = {}
        for start in range(0, len(fragments), LOGITS // POSITIONS):
            part = fragments[start : start + LOGITS // POSITIONS]
            hidden = self._passed(part)
            targets = torch.tensor([piece for fragment in part for piece in fragment], device=hidden[0].device)
            each = F.cross_entropy(self.mlm.logits(torch.cat(hidden)), targets, reduction="none")
            means = [loss.mean() for loss in each.split([len(fragment) for fragment in part])]
            losses.update(zip(part, torch.stack(means).tolist(), strict=True))
        for grid, some in products.items():
            self._ranked[grid] = sorted(some, key=losses.__getitem__)

    def _words(self, fragments: Sequence[Ids], word: str) -> list[str]:
        if self.previous:
            texts = [self.mlm.text(fragment) for fragment in fragments]
            return [text for text in texts if text != word and "##" not in text and text not in STOP_WORDS]
        words = [self.mlm.word(fragment) for fragment in fragments]
        taken = STOP_WORDS | {word.lower()}
        return list(dict.fromkeys(w for w in words if w is not None and is_word(w) and w.lower() not in taken))


def _few(pieces: Tensor) -> tuple[Ids, ...]:
    """The likeliest pieces of each of the first positions."""
    return tuple(map(tuple, pieces[:POSITIONS, :EACH].tolist()))


def check_model(mlm: object) -> None:
    """Refuse what is no masked language model.

    Parameters
    ----------
    mlm
        As it was given.

    Raises
    ------
    InputError
        For an object without the functions of WordModel.
    """
    if not isinstance(mlm, WordModel):
        raise InputError(
            f"mlm must be a masked language model like cmr_fast.models.mlm.MaskedLM, got {type(mlm).__name__}"
        )
