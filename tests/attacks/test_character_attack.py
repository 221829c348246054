"""The character attack: against LEAF's loop, a caption after the other, with the same draws."""

import pytest
import torch
from captions import CAPTIONS, Victim, victim
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cmr_fast.attacks import CharacterAttack
from cmr_fast.attacks.problem import STREAM
from cmr_fast.attacks.text.characters import ALPHABET
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import pgd_noise

DICTIONARY = {"dog", "man", "ball", "grass", "a", "small", "beach", "playing", "young", "woman"}


def embed(model, text):
    ids, mask = model.tokenize([text])
    return model.encode_text(ids, mask)[0]


def expanded(text, place, character):
    """LEAF's generate_sentence: a text with "" between its characters, one of these places set."""
    spread = [""]
    for c in text:
        spread += [c, ""]
    spread[place] = "" if spread[place] == character else character
    return "".join(spread)


def valid(before, after):
    def count(text):
        return len(DICTIONARY & set("".join(c if c.isalnum() else " " for c in text.lower()).split()))

    return count(after) < count(before)


@torch.no_grad()
def oracle(text, number, *, edits, tries, seed, objective, constrained, model=None):
    model = model or victim()
    clean = embed(model, text)

    def value(moved):
        e = embed(model, moved)
        return float((e - clean).norm()) if objective == "l2" else -float(F.cosine_similarity(e, clean, dim=0))

    def draw(count, stream):
        noise = pgd_noise(torch.tensor([number]), count, seed=(seed + stream * STREAM) % 2**64)[0].tolist()
        return sorted(range(count), key=noise.__getitem__)[:tries]

    def variants(now, changes):
        moved = [expanded(now, place, character) for place, character in changes]
        moved = [m if any(map(str.isalnum, m)) else now for m in moved]
        return [m if not constrained or valid(now, m) else now for m in moved]

    now, best = text, value(text)
    for edit in range(edits):
        places = draw(2 * len(now) + 1, 2 * edit)
        scores = [value(m) for m in variants(now, [(place, " ") for place in places])]
        place = places[scores.index(max(scores))]
        letters = draw(len(ALPHABET), 2 * edit + 1)
        tried = variants(now, [(place, ALPHABET[i]) for i in letters])
        scores = [value(m) for m in tried]
        if max(scores) > best:
            best, now = max(scores), tried[scores.index(max(scores))]
    return now


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize(("objective", "edits", "tries", "seed"), [("l2", 1, 8, 0), ("similarity", 2, 5, 7)])
def test_equals_leafs_loop(constrained, objective, edits, tries, seed):
    texts = CAPTIONS[:7]
    options = {"edits": edits, "tries": tries, "seed": seed, "objective": objective}
    atk = CharacterAttack(victim(), dictionary=DICTIONARY if constrained else None, **options)
    expected = [oracle(text, i, constrained=constrained, **options) for i, text in enumerate(texts)]
    assert atk(texts) == expected
    assert sum(a != b for a, b in zip(texts, expected, strict=True)) >= (3 if constrained else 7)


def distance(a, b):
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=10, deadline=None)
@example(texts=["AAAAA", "Ax."], edits=2, batch=2, seed=64427)  # the victim reads "$x." as "#x."
@given(
    texts=st.lists(st.text("abdogx .,'A犬é", min_size=1, max_size=12).filter(lambda t: any(map(str.isalnum, t))),
                   max_size=5),
    edits=st.integers(1, 3), batch=st.integers(1, 3), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_batched_equals_one_at_a_time_and_keeps_the_budget(texts, edits, batch, seed):
    atk = CharacterAttack(victim(), edits=edits, tries=6, batch=batch, seed=seed, check=False)
    together, info = atk(texts, return_info=True)
    assert together == [atk([text], index=[i])[0] for i, text in enumerate(texts)]
    for text, now, changes in zip(texts, together, info.changes, strict=True):
        assert distance(text, now) <= len(changes) <= edits
        for change in changes:
            text = text[: change.place // 2] + change.after + text[(change.place + 1) // 2 :]
        assert text == now


def test_the_draws_depend_on_seed_and_number():
    texts = [CAPTIONS[1]] * 4
    atk = CharacterAttack(victim(), tries=4)
    assert len(set(atk(texts))) > 1 and atk(texts) == atk(texts)
    assert len(set(atk(texts, index=[5, 5, 5, 5]))) == 1
    assert CharacterAttack(victim(), tries=4, seed=1)(texts) != atk(texts)


def test_more_tries_and_edits_move_the_embedding_further():
    _, few = CharacterAttack(victim(), tries=3)(CAPTIONS, return_info=True)
    _, many = CharacterAttack(victim(), tries=40, edits=2)(CAPTIONS, return_info=True)
    assert many.objective.mean() > few.objective.mean() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": 0}, "edits must be"),
        ({"alphabet": ("ab",)}, "single characters"),
        ({"alphabet": ()}, "single characters"),
        ({"dictionary": "words"}, "dictionary must be a set of words"),
        ({"dtype": torch.float32}, "dtype must be"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        CharacterAttack(Victim(), **options)


def test_a_bad_index_is_named():
    with pytest.raises(InputError, match=r"index must be integers \(2,\)"):
        CharacterAttack(victim())(["a dog", "a man"], index=[1])


def test_one_letter_which_blanks_leave_as_it_is_is_attacked():
    (moved,) = CharacterAttack(victim(), edits=1, seed=0)(["a"])
    assert moved != "a"
    assert (embed(victim(), moved) - embed(victim(), "a")).norm() > 0
