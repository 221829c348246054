"""Single characters changed (Charmer, Abad Rocamora et al. 2024; in batches as LEAF's training attack, 2025).

A text of n characters has 2n + 1 places: its characters, and the gaps around them. A character at a place replaces one
or is inserted; no character takes one out. An edit is found in two flat batches: at random places a space tells how
much each matters (where one stands already it is taken out), then random characters are tried at the best of them.
"""

import string
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cmr_fast.attacks.problem import STREAM
from cmr_fast.attacks.settings import whole
from cmr_fast.attacks.text.base import Change, Result, TextAttack
from cmr_fast.attacks.text.encoder import TextEncoder
from cmr_fast.attacks.text.objectives import Objective
from cmr_fast.attacks.text.words import Caption
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import pgd_noise

PROBE = " "
ALPHABET = ("", *string.ascii_lowercase, " ", *string.ascii_uppercase, *string.digits, *string.punctuation)  # LEAF's


class CharacterAttack(TextAttack):
    """Characters of captions inserted, replaced or taken out: `adv = CharacterAttack(victim)(captions)`.

    Parameters
    ----------
    victim
        As of BertAttack; no masked language model is needed.
    edits
        Most characters that may change: the Levenshtein distance.
    tries
        Random places, and random characters, an edit.
    alphabet
        Characters to try, "" to take one out.
    objective
        As of BertAttack; LEAF's are "l2" and "similarity".
    dictionary
        Words, lower-case: an edit must leave fewer different ones of them in the text than before, so it breaks one and
        makes none (LEAF's constraint). None: any edit.
    seed
        Of the draws, which depend on it, on a caption's `index` and on the edit, and on nothing else.
    dtype, batch, tokens, check
        As of BertAttack.

    Raises
    ------
    InputError
        For settings out of their range, and models without the functions that are needed.

    Notes
    -----
    Abad Rocamora et al. 2024, "Revisiting character-level adversarial attacks for language models"; Abad Rocamora et
    al. 2025, "Robustness in both domains: CLIP needs a robust text encoder". Here an edit that does not raise the
    objective is not made.
    """

    def __init__(
        self,
        victim: TextEncoder,
        *,
        edits: int = 1,
        tries: int = 50,
        alphabet: Sequence[str] = ALPHABET,
        objective: str | Objective = "l2",
        dictionary: Collection[str] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        batch: int = 256,
        tokens: int | None = None,
        check: bool = True,
    ) -> None:
        super().__init__(victim, objective, dtype, batch, tokens, check)
        self.edits, self.tries = whole("edits", edits, 1), whole("tries", tries, 1)
        self.alphabet = tuple(alphabet)
        if not self.alphabet or not all(isinstance(c, str) and len(c) <= 1 for c in self.alphabet):
            raise InputError(f"alphabet must be single characters, or '' to take one out, got {self.alphabet!r}")
        if isinstance(dictionary, (str, bytes)) or not isinstance(dictionary, Collection | None):
            raise InputError(f"dictionary must be a set of words or None, got {type(dictionary).__name__}")
        self.dictionary = None if dictionary is None else frozenset(dictionary)
        self.seed = whole("seed", seed, 0, 2**64 - 1)

    def _attack(self, texts: list[str], images: Tensor | None, numbers: Tensor) -> list[Result]:
        clean = self.texts(texts)
        now = list(texts)
        values = self.objective(clean, clean, images).tolist()
        changes: list[list[Change]] = [[] for _ in texts]
        for edit in range(self.edits):
            places = self._drawn(numbers, [2 * len(text) + 1 for text in now], 2 * edit)
            probed = [[self._changed(t, place, PROBE) for place in some] for t, some in zip(now, places, strict=True)]
            probed_values = self._values(probed, clean, images)
            best = [some[int(v.argmax())] for some, v in zip(places, probed_values, strict=True)]
            letters = self._drawn(numbers, [len(self.alphabet)] * len(now), 2 * edit + 1)
            tried = [
                [self._changed(t, place, self.alphabet[i]) for i in some]
                for t, place, some in zip(now, best, letters, strict=True)
            ]
            with_now = [[*some, t] for some, t in zip(tried, now, strict=True)]  # of one pass: equal tokens are a tie
            for row, scores in enumerate(self._values(with_now, clean, images)):
                which = int(scores[:-1].argmax())
                if scores[which] > scores[-1]:
                    change = _change(now[row], best[row], self.alphabet[letters[row][which]])
                    changes[row].append(change)
                    now[row], values[row] = tried[row][which], float(scores[which])
        return [Result(*row) for row in zip(now, values, changes, strict=True)]

    def _drawn(self, numbers: Tensor, counts: Sequence[int], stream: int) -> list[list[int]]:
        """For each caption `tries` different numbers below its count, or all of them."""
        noise = pgd_noise(numbers, max(counts), seed=(self.seed + stream * STREAM) % 2**64)
        return [
            row[:count].argsort(stable=True)[: self.tries].tolist() for row, count in zip(noise, counts, strict=True)
        ]

    def _changed(self, text: str, place: int, character: str) -> str:
        """A text with a character at a place; the text itself where the dictionary forbids it."""
        change = _change(text, place, character)
        moved = text[: place // 2] + change.after + text[(place + 1) // 2 :]
        if not any(map(str.isalnum, moved)):  # nothing would be left to read
            return text
        if self.dictionary is not None and self._known(moved) >= self._known(text):
            return text
        return moved

    def _known(self, text: str) -> int:
        assert self.dictionary is not None
        return len(self.dictionary.intersection(map(str.lower, Caption(text).words)))

    def _values(self, texts: Sequence[Sequence[str]], clean: Tensor, images: Tensor | None) -> list[Tensor]:
        """The objective of each caption's variants."""
        counts = [len(some) for some in texts]
        rows = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts)).to(clean.device)
        vectors = self.texts([text for some in texts for text in some])
        if len({" ".join(text.split()) for some in texts for text in some}) > 1:  # blanks alone change no token
            self._refuse_deaf(clean, vectors)
        values = self.objective(vectors, clean[rows], None if images is None else images[rows])
        return list(values.cpu().split(counts))


def _change(text: str, place: int, character: str) -> Change:
    """What it is to put a character at a place: taken out where it stands there already."""
    before = text[place // 2] if place % 2 else ""
    return Change(place, before, "" if before == character else character)
