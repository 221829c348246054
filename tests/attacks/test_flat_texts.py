"""Texts in flat batches: what goes through the victim, in which passes, and what it may not return."""

import pytest
import torch
from captions import CAPTIONS, Victim, victim

from cmr_fast.attacks.text.encoder import FlatTexts
from cmr_fast.errors import InputError


class Watched(Victim):
    """Notes the shape of every pass; more than `most` rows do not fit."""

    most = 1 << 30

    def encode_text(self, ids, mask):
        self.passes = [*getattr(self, "passes", []), tuple(ids.shape)]
        if len(ids) > self.most:
            raise torch.OutOfMemoryError("too much")
        return super().encode_text(ids, mask)


def one_by_one(texts):
    with torch.no_grad():
        return torch.cat([victim().encode_text(*victim().tokenize([text])) for text in texts])


@pytest.mark.parametrize("tokens", [1, 17, 40, None])
def test_rows_are_those_of_single_texts(tokens):
    texts = [*CAPTIONS, *CAPTIONS[::-1], "Dog", "dog"]
    flat = FlatTexts(Watched().eval(), tokens=tokens)
    with flat.prepare():
        vectors = flat(texts)
    torch.testing.assert_close(vectors, one_by_one(texts))
    assert flat.queries == len(CAPTIONS)  # "Dog" and "dog" are the same tokens
    assert sum(rows for rows, _ in flat.model.passes) == len(CAPTIONS)
    assert all(rows == 1 or rows * length <= (tokens or 512) for rows, length in flat.model.passes)
    lengths = [length for _, length in flat.model.passes]
    assert lengths == sorted(lengths, reverse=True)


def test_memory_that_runs_out_is_met_by_halves():
    model = Watched().eval()
    model.most = 3
    flat = FlatTexts(model)
    with flat.prepare(), pytest.warns(RuntimeWarning, match="split into halves"):
        torch.testing.assert_close(flat(CAPTIONS), one_by_one(CAPTIONS))
    model.most = 0
    with flat.prepare(), pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning):
        flat(CAPTIONS)


def test_other_errors_are_the_victims_own():
    class Broken(Victim):
        def encode_text(self, ids, mask):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        FlatTexts(Broken())(CAPTIONS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.zeros(n, 4, 2), "must return floats"),
        (lambda n: torch.zeros(n + 1, 4), "must return floats"),
        (lambda n: torch.zeros(n, 4, dtype=torch.int64), "must return floats"),
        (lambda n: torch.full((n, 4), torch.nan), "not finite"),
    ],
)
def test_what_a_victim_may_not_return(returned, message):
    class Wrong(Victim):
        def encode_text(self, ids, mask):
            return returned(len(ids))

    with pytest.raises(InputError, match=message):
        FlatTexts(Wrong())(CAPTIONS)


def test_tokens_of_the_wrong_kind():
    class Wrong(Victim):
        def tokenize(self, texts):
            ids, mask = super().tokenize(texts)
            return ids.int(), mask

    with pytest.raises(InputError, match=r"int64 ids and a bool mask \(10, L\)"):
        FlatTexts(Wrong())(CAPTIONS)
