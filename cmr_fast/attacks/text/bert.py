"""BERT-Attack on captions (Li et al. 2020; on image-text models Co-Attack, SGA and MAT use it with one word).

    importance of a word   how far the embedding moves when [UNK] stands in its place
    candidates             what a masked language model, reading the clean caption, would put there
    swap                   in the order of importance, for the candidate that raises the objective most, until `words`
                           have changed; a word that no candidate beats stays, and does not count

A batch of captions takes three kinds of passes: one over all texts with a word masked, one of the masked language
model, and then, round after round, one over the candidates of the next word of every caption that is not done.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cmr_fast.attacks.settings import real, whole
from cmr_fast.attacks.text.base import Change, Result, TextAttack
from cmr_fast.attacks.text.candidates import Candidates, WordModel, check_model
from cmr_fast.attacks.text.encoder import TextEncoder, evaluating
from cmr_fast.attacks.text.objectives import Objective, find, image
from cmr_fast.attacks.text.words import STOP_WORDS, UNKNOWN, Caption
from cmr_fast.errors import InputError

Compat = Literal["coattack"] | None


@dataclass
class Prepared:
    """A batch of captions as both models read them: what an attack against other images need not find again.

    Attributes
    ----------
    captions
        N of them.
    candidates
        For their words.
    orders
        Of each caption the words to try, the most important last.
    clean
        Embeddings, float (N, d).
    known
        Embeddings of texts that were tried, (d,) each.
    """

    captions: list[Caption]
    candidates: Candidates
    orders: list[list[int]]
    clean: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Search:
    """One caption under attack."""

    caption: Caption
    row: int  # in the batch
    order: list[int]  # words to try, the next one last
    words: list[str]  # as they are now
    value: float  # of the objective now
    changes: list[Change] = field(default_factory=list)


class BertAttack(TextAttack):
    """Words of captions swapped for those of a masked language model: `adv = BertAttack(victim, mlm)(captions)`.

    Parameters
    ----------
    victim
        `tokenize(texts) -> ids, mask` and `encode_text(ids, mask) -> (N, d)`, a dual encoder say; a module is attacked
        in evaluation mode and left as it was.
    mlm
        A masked language model, as of cmr_fast.models.mlm.MaskedLM.load.
    words
        Most words that may change.
    k
        Of the masked language model's likeliest pieces at a position.
    threshold
        Least logit of a candidate of one piece; 0 for none.
    objective
        "kl" (Co-Attack), "l2" (MAT's Eq. 4), "similarity" (to the clean text, lowered), "image" (similarity to the
        caption's image, lowered: SGA), or a function of (changed, clean, images) embeddings -> (M,).
    importance
        The same, of masked texts; None is the objective, and "kl" where that needs an image.
    max_length
        Tokens of a caption that the masked language model reads, [CLS] and [SEP] counted; words beyond stay. None: all
        that it can.
    compat
        "coattack": as the code of Co-Attack and SGA, with candidates predicted one position before the word (the first
        word gets those of [CLS]), words parted at single spaces with punctuation on them, and candidates that are
        special tokens or several words.
    dtype
        torch.bfloat16: texts are encoded under autocast; importance and objective are float32 all the same.
    batch
        Captions at once; the result does not depend on it but for rounding.
    tokens
        Of a forward pass, padding counted; None: 512 for each thread of a CPU, 65,536 elsewhere.
    check
        Refuse a victim whose embedding does not change with its text.

    Raises
    ------
    InputError
        For settings out of their range, and models without the functions that are needed.

    Notes
    -----
    Li et al. 2020, "BERT-ATTACK: adversarial attack against BERT using BERT", Algorithm 1; Zhang et al. 2022, "Towards
    adversarial attack on vision-language pre-training models". Stop words are those of their code, and
    words are compared without case.
    """

    def __init__(
        self,
        victim: TextEncoder,
        mlm: WordModel,
        *,
        words: int = 1,
        k: int = 10,
        threshold: float = 0.3,
        objective: str | Objective = "kl",
        importance: str | Objective | None = None,
        max_length: int | None = None,
        compat: Compat = None,
        dtype: torch.dtype | None = None,
        batch: int = 256,
        tokens: int | None = None,
        check: bool = True,
    ) -> None:
        super().__init__(victim, objective, dtype, batch, tokens, check)
        check_model(mlm)
        self.mlm, self.words, self.k = mlm, whole("words", words, 1), whole("k", k, 1)
        self.threshold = real("threshold", threshold, -1e30, 1e30)
        unset = "kl" if self.objective is image else objective
        self.importance = find(unset if importance is None else importance, "importance")
        self.max_length = whole("max_length", mlm.context if max_length is None else max_length, 3, mlm.context)
        if compat not in (None, "coattack"):
            raise InputError(f"compat must be 'coattack' or None, got {compat!r}")
        self.compat = compat

    def _holding(self) -> AbstractContextManager[None]:
        return evaluating(self.mlm)

    def _attack(self, texts: list[str], images: Tensor | None, numbers: Tensor) -> list[Result]:
        return self.finish(self.prepare(texts, images), images)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Both models in evaluation mode and without gradients, for `prepare` and `finish`."""
        with self.texts.prepare(), self._holding():
            yield

    def prepare(self, texts: list[str], images: Tensor | None = None) -> Prepared:
        """Find the order of the words of a batch of captions.

        Parameters
        ----------
        texts
            N captions with words.
        images
            Embeddings (N, d), for an importance that uses them.
        """
        captions = [Caption(text, spaces=self.compat is not None) for text in texts]
        candidates = Candidates(
            self.mlm, captions, k=self.k, threshold=self.threshold, max_length=self.max_length,
            previous=self.compat is not None, tokens=self.texts.tokens,
        )  # fmt: skip
        orders = [
            [i for i, word in enumerate(c.words) if not self._stops(word) and candidates.reads(row, i)]
            for row, c in enumerate(captions)
        ]
        masked = [(row, word) for row, order in enumerate(orders) if len(order) > 1 for word in order]  # one needs none
        vectors = self.texts([*texts, *(captions[row].swapped(word, UNKNOWN) for row, word in masked)])
        clean, moved = vectors.tensor_split([len(texts)])
        self._refuse_deaf(clean, moved)
        if masked:
            rows = torch.tensor([row for row, _ in masked], device=clean.device)
            values = self.importance(moved, clean[rows], None if images is None else images[rows]).tolist()
            # equal ones in the order of the caption
            for (_, word), row in sorted(((value, -w), row) for value, (row, w) in zip(values, masked, strict=True)):
                orders[row].remove(-word)
                orders[row].append(-word)
        return Prepared(captions, candidates, orders, clean, dict(zip(texts, clean, strict=True)))

    def finish(self, prepared: Prepared, images: Tensor | None = None) -> list[Result]:
        """Swap words of a prepared batch.

        Parameters
        ----------
        prepared
            N captions; what is found about them is added to it.
        images
            Embeddings (N, d), for an objective that uses them.
        """
        start = self.objective(prepared.clean, prepared.clean, images).tolist()
        searches = [
            _Search(caption, row, list(order), list(caption.words), value)
            for row, (caption, order, value) in enumerate(zip(prepared.captions, prepared.orders, start, strict=True))
        ]
        active = [search for search in searches if search.order]
        while active:
            self._swap(active, prepared, images)
            active = [search for search in active if search.order and len(search.changes) < self.words]
        return [Result(search.caption.joined(search.words), search.value, search.changes) for search in searches]

    def embedded(self, prepared: Prepared, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts (M, d), those that were tried before from memory.

        Parameters
        ----------
        prepared
            Where they are kept.
        texts
            M of them.
        """
        new = [text for text in dict.fromkeys(texts) if text not in prepared.known]
        if new:
            prepared.known.update(zip(new, self.texts(new), strict=True))
        return torch.stack([prepared.known[text] for text in texts])

    def _stops(self, word: str) -> bool:
        return (word if self.compat else word.lower()) in STOP_WORDS

    def _swap(self, active: list[_Search], prepared: Prepared, images: Tensor | None) -> None:
        """Try the next word of each caption."""
        chosen = [search.order.pop() for search in active]
        found = prepared.candidates([(search.row, word) for search, word in zip(active, chosen, strict=True)])
        texts = [
            search.caption.swapped(word, candidate, search.words)
            for search, word, some in zip(active, chosen, found, strict=True)
            for candidate in some
        ]
        if not texts:
            return
        counts = [len(some) for some in found]
        clean = prepared.clean
        rows = torch.tensor([search.row for search in active]).repeat_interleave(torch.tensor(counts)).to(clean.device)
        vectors = self.embedded(prepared, texts)
        values = self.objective(vectors, clean[rows], None if images is None else images[rows])
        for search, word, some, scores in zip(active, chosen, found, values.cpu().split(counts), strict=True):
            if not some:
                continue
            best = int(scores.argmax())
            if scores[best] > search.value:  # the word itself, in any case, is no candidate: nothing ties with it
                search.changes.append(Change(word, search.words[word], some[best]))
                search.words[word], search.value = some[best], float(scores[best])
