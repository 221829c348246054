"""BERT-Attack: the batched engine against a loop over captions, words and candidates, one text a pass, in float64."""

import itertools

import pytest
import torch
from captions import CAPTIONS, WORDS, Victim, masked_lm, tokenizer, victim, whole_mlm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cmr_fast.attacks import BertAttack
from cmr_fast.attacks.text.words import STOP_WORDS, Caption
from cmr_fast.errors import InputError

PUNCTUATION = ".,'!-"


def embed(model, text):
    ids, mask = model.tokenize([text])
    return model.encode_text(ids, mask)[0]


def measured(objective, moved, clean, image):
    if objective == "kl":
        p, q = clean.softmax(0), moved.softmax(0)
        return float((p * (p / q).log()).sum())
    if objective == "l2":
        return float((moved - clean).square().sum().sqrt())
    if objective == "similarity":
        return -float(moved @ clean / moved.norm() / clean.norm())
    return -float(moved @ image)


def by_perplexity(grid, mlm, tok):
    """Fragments of several pieces, as Co-Attack's get_bpe_substitues orders them."""
    fragments = list(itertools.islice(itertools.product(*[row[:4] for row in grid[:12]]), 24))
    losses = []
    for fragment in fragments:
        logits = mlm(torch.tensor([fragment])).logits[0]
        losses.append(float(F.cross_entropy(logits, torch.tensor(fragment))))
    order = sorted(range(len(fragments)), key=losses.__getitem__)
    return [tok.convert_ids_to_tokens(fragments[i]) for i in order]


def glued(tokens):
    return tokens[0] + "".join(t[2:] if t.startswith("##") else " " + t for t in tokens[1:])


@torch.no_grad()
def oracle(text, image=None, *, words=1, k=10, threshold=0.3, objective="kl", max_length=64, compat=False, model=None):
    """One caption. Without `compat` words are parted at punctuation, which BERT's tokenizer does too."""
    model, mlm, tok = model or victim(), whole_mlm(), tokenizer()
    importance = "kl" if objective == "image" else objective
    if compat:
        parts = [(word, True) for word in text.split(" ")]
        join = " ".join
    else:
        spread = "".join(f"\0{c}\0" if c in PUNCTUATION else c for c in text).replace(" ", "\0 \0")
        parts = [(part, part != " " and part not in PUNCTUATION) for part in spread.split("\0") if part]
        join = "".join
    now = [part for part, _ in parts]
    ids = tok(text, truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]
    logits = mlm(torch.tensor([ids])).logits[0]
    clean = embed(model, text)
    scores, spans, position = [], [], 0 if compat else 1
    for i, (part, is_word) in enumerate(parts):
        count = len(tok.tokenize(part))
        spans.append((position, position + count))
        position += count
        masked = join([*now[:i], "[UNK]", *now[i + 1 :]])
        scores.append(measured(importance, embed(model, masked), clean, image) if is_word else None)
    order = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: -scores[i])
    changed = 0
    for i in order:
        if changed == words:
            break
        old, (first, end) = now[i], spans[i]
        if (old if compat else old.lower()) in STOP_WORDS:
            continue
        if first > max_length - 2 if compat else end > max_length - 1:
            continue
        top = logits[first:end].topk(min(k, logits.shape[1]))
        if end - first > 1 and len(top.indices) > 1:
            candidates = by_perplexity(top.indices.tolist(), mlm, tok)
        else:
            rows = zip(top.values.flatten().tolist(), top.indices.flatten().tolist(), strict=True)
            kept = [p for v, p in rows if threshold == 0 or v >= threshold]
            candidates = [tok.convert_ids_to_tokens([p]) for p in kept]
        if compat:
            tried = [glued(c) for c in candidates if "##" not in glued(c)]
            tried = [c for c in tried if c != old and c not in STOP_WORDS]
        else:
            plain = [c for c in candidates if not any(t[0] == "[" for t in c) and "##" not in glued(c)]
            tried = [c for c in map(glued, plain) if c.isalnum() and c != old.lower() and c not in STOP_WORDS]
        best, value = old, measured(objective, embed(model, join(now)), clean, image)
        for candidate in tried:
            new = measured(objective, embed(model, join([*now[:i], candidate, *now[i + 1 :]])), clean, image)
            if new > value:
                best, value = candidate, new
        changed += best != old
        now[i] = best
    return join(now)


def images(count):
    return F.normalize(torch.randn((count, 16), generator=torch.Generator().manual_seed(5), dtype=torch.float64))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(
    ("objective", "words", "k", "threshold"),
    [("kl", 1, 10, 0.3), ("l2", 2, 5, 0.0), ("similarity", 1, 3, 1.0), ("image", 3, 12, 0.3), ("image", 1, 1, 0.0)],
)
def test_equals_the_oracle_word_for_word(compat, objective, words, k, threshold):
    targets = images(len(CAPTIONS))
    atk = BertAttack(
        victim(), masked_lm(), words=words, k=k, threshold=threshold, objective=objective,
        compat="coattack" if compat else None,
    )  # fmt: skip
    options = {"words": words, "k": k, "threshold": threshold, "objective": objective, "compat": compat}
    expected = [oracle(text, image, **options) for text, image in zip(CAPTIONS, targets, strict=True)]
    assert atk(CAPTIONS, targets) == expected
    assert sum(a != b for a, b in zip(CAPTIONS, expected, strict=True)) >= 4


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from([*WORDS, "Snowboarders", "x9", "[MASK]", "..."]), max_size=9), max_size=6),
    words=st.integers(1, 3),
    batch=st.integers(1, 4),
    tokens=st.sampled_from([1, 20, None]),
    compat=st.sampled_from([None, "coattack"]),
)
def test_batched_equals_one_at_a_time(texts, words, batch, tokens, compat):
    texts = [" ".join(["dog", *text]) for text in texts]
    options = {"words": words, "k": 4, "threshold": 0.0, "compat": compat}
    atk = BertAttack(victim(), masked_lm(), batch=batch, tokens=tokens, **options)
    one = BertAttack(victim(), masked_lm(), **options)
    together, info = atk(texts, return_info=True)
    assert together == [one([text])[0] for text in texts]
    for text, now, swaps in zip(texts, together, info.changes, strict=True):
        caption = Caption(text, spaces=compat is not None)
        changed = list(caption.words)
        for swap in swaps:
            assert changed[swap.place] == swap.before
            changed[swap.place] = swap.after
        assert len({swap.place for swap in swaps}) == len(swaps) <= words
        assert caption.joined(changed) == now


def test_captions_longer_than_the_models():
    texts = [" ".join(CAPTIONS[7:8] * 6), CAPTIONS[0]]
    short = victim(context=12)
    for compat in (False, True):
        options = {"words": 2, "threshold": 0.0, "max_length": 15, "objective": "l2"}
        atk = BertAttack(short, masked_lm(), compat="coattack" if compat else None, **options)
        assert atk(texts) == [oracle(text, compat=compat, model=short, **options) for text in texts]


def test_case_punctuation_and_the_rest_stay_as_they_are():
    text = "  The MAN's hat,\tblue -- and big!  "
    caption = Caption(text)
    assert caption.words == ["The", "MAN", "s", "hat", "blue", "and", "big"]
    assert caption.joined(caption.words) == text
    changed, info = BertAttack(victim(), masked_lm(), threshold=0.0)([text], return_info=True)
    (swap,) = info.changes[0]
    assert changed == [text.replace(swap.before, swap.after)]
    assert swap.after.lower() not in STOP_WORDS and swap.after != swap.before.lower()


def test_captions_of_stop_words_and_of_other_scripts():
    texts = ["the one in which it is", "犬が走る", "собака бежит", "كلب يركض", "ξ"]
    atk = BertAttack(victim(), masked_lm(), threshold=0.0, check=False)
    changed, info = atk(texts, return_info=True)
    assert changed[0] == texts[0] and not info.changes[0]
    assert all(len(swaps) <= 1 for swaps in info.changes)


def test_the_objective_goes_up_and_is_that_of_what_is_returned():
    changed, info = BertAttack(victim(), masked_lm(), words=2, objective="l2")(CAPTIONS, return_info=True)
    with torch.no_grad():
        apart = [
            float((embed(victim(), a) - embed(victim(), b)).norm()) for a, b in zip(CAPTIONS, changed, strict=True)
        ]
    torch.testing.assert_close(info.objective, torch.tensor(apart))
    assert min(value for value, swaps in zip(apart, info.changes, strict=True) if swaps) > 0


def test_equal_texts_are_encoded_once():
    model = Victim()
    atk = BertAttack(model, masked_lm())
    one, many = atk([CAPTIONS[1]]), None
    alone, model.texts = model.texts, 0
    many = atk([CAPTIONS[1]] * 5)
    assert many == one * 5 and model.texts == alone


def test_the_victim_is_left_as_it_was():
    model = Victim().train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    state = torch.get_rng_state()
    BertAttack(model, masked_lm())(CAPTIONS[:3])
    assert (
        model.training
        and model.network.training
        and all(p.requires_grad for p in model.parameters() if p is not frozen)
    )
    assert not frozen.requires_grad and torch.equal(torch.get_rng_state(), state)


def test_bfloat16_encodes_and_float32_scores():
    seen = []

    def objective(moved, clean, images):
        seen.append(moved.dtype)
        return (moved - clean).norm(dim=-1)

    model = Victim().float()
    BertAttack(model, masked_lm(), objective=objective, dtype=torch.bfloat16)(CAPTIONS[:4])
    assert set(seen) == {torch.float32}


class Deaf(Victim):
    def encode_text(self, ids, mask):
        return torch.ones(len(ids), 16) / 4


def test_more_pieces_than_there_are_take_all_of_them():
    every = len(tokenizer())
    many, all_of_them = (BertAttack(victim(), masked_lm(), k=k)(CAPTIONS) for k in (10 * every, every))
    assert many == all_of_them


def test_a_victim_that_ignores_its_text_is_called_out():
    with pytest.raises(InputError, match="ignores its text"):
        BertAttack(Deaf(), masked_lm())(CAPTIONS)
    assert BertAttack(Deaf(), masked_lm(), check=False)(CAPTIONS) == list(CAPTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda atk: atk("a dog"), "list of captions, got str"),
        (lambda atk: atk(["a dog", ""]), r"texts\[1\] has no word"),
        (lambda atk: atk(["a dog", " ... "]), r"texts\[1\] has no word"),
        (lambda atk: atk(["a dog", "a \ud83d cat"]), r"texts\[1\] has half a character, a surrogate"),
        (lambda atk: atk(["a dog"], torch.tensor([[0.0] * 15 + [torch.nan]])), "finite embeddings, row 0 is not"),
        (lambda atk: atk(["a dog", 3]), r"texts\[1\] must be a caption, got int"),
        (
            lambda atk: atk(["a dog"], torch.zeros(2, 16)),
            r"floats \(1, d\), .* got torch.float32 \(2, 16\)",
        ),
        (lambda atk: BertAttack(victim(), masked_lm(), objective="image")(["a dog"]), "pass images="),
        (lambda atk: BertAttack(victim(), masked_lm(), objective="image")(["a dog"], torch.zeros(1, 3)), "wide as"),
        (lambda atk: BertAttack(victim(), masked_lm(), objective="cos"), "objective must be one of kl, l2"),
        (lambda atk: BertAttack(victim(), masked_lm(), k=0), "k must be"),
        (lambda atk: BertAttack(victim(), masked_lm(), compat="sga"), "compat must be"),
        (lambda atk: BertAttack(victim(), whole_mlm()), "mlm must be a masked language model"),
        (lambda atk: BertAttack(len, masked_lm()), "must have tokenize"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(BertAttack(victim(), masked_lm()))


def test_no_captions():
    assert BertAttack(victim(), masked_lm())([]) == []
