"""EDA and RandAugment: what each operation may change, how often, and that draws belong to a caption or an image."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.data import EDA, MaskedSynonyms, RandAugment, WordNet
from cmr_fast.data.augment import STOP_WORDS, random_crops
from cmr_fast.errors import InputError

KNOWN = {"dog": ["hound", "domestic dog", "Dog"], "runs": ["races"], "ball": ["sphere"], "the": ["thee"]}
TEXT = "The dog, a big dog of 2020, runs after the ball!"


def test_replace_changes_words_everywhere_and_leaves_punctuation():
    eda = EDA(0.1, 40, synonyms=KNOWN, operations=["replace"])
    made = set(eda([TEXT])[0])
    assert made == {
        TEXT.replace("dog", "hound"), TEXT.replace("dog", "domestic dog"), TEXT.replace("runs", "races"),
        TEXT.replace("ball", "sphere"),
    }  # fmt: skip


def test_insert_adds_synonyms():
    for made in EDA(0.3, 20, synonyms=KNOWN, operations=["insert"])([TEXT])[0]:
        more = Counter(made.split()) - Counter(TEXT.split())
        new = sum(more.values()) - more["domestic"]  # a phrase of two words
        assert new == int(0.3 * len(TEXT.split())) and set(more) <= {
            "hound",
            "domestic",
            "dog",
            "races",
            "sphere",
            "thee",
        }
        assert not Counter(TEXT.split()) - Counter(made.split())


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(["dog", "ball", "the", "x", "2"]), min_size=1, max_size=9), max_size=4),
    alpha=st.floats(0.01, 1), count=st.integers(1, 7), seed=st.integers(0, 99),
)  # fmt: skip
def test_counts_and_draws(texts, alpha, count, seed):
    texts = [" ".join(words) for words in texts]
    eda = EDA(alpha, count, synonyms=KNOWN, seed=seed)
    made = eda(texts)
    assert made == eda(texts) == [eda([text], [i])[0] for i, text in enumerate(texts)]
    assert all(len(some) == count and all(text.split() for text in some) for some in made)
    for text, some in zip(texts, EDA(alpha, count, operations=["swap"], seed=seed)(texts), strict=True):
        assert all(sorted(m.split()) == sorted(text.split()) for m in some)
    for text, some in zip(texts, EDA(alpha, count, operations=["delete"], seed=seed)(texts), strict=True):
        for m in some:
            left = iter(text.split())
            assert m and all(word in left for word in m.split())  # a subsequence


def test_a_word_is_left_where_only_punctuation_would_be():
    made = EDA(0.9, 50, operations=["delete"])(["A dog , running !", ". .", "dog"])
    assert all(set(text.split()) & {"A", "dog", "running"} for text in made[0])
    assert set(made[1]) <= {".", ". ."} and set(made[2]) == {"dog"}


def test_share_of_what_is_deleted():
    made = EDA(0.2, 500, operations=["delete"])([" ".join("abcdefghij")])[0]
    assert 7.5 < np.mean([len(text.split()) for text in made]) < 8.5


def test_stop_words_are_not_replaced():
    assert EDA(1.0, 5, synonyms=lambda words, i: ["other"], operations=["replace"])(["the dog is in it"]) == [
        ["the other is in it"] * 5
    ]
    assert "the" in STOP_WORDS


def wordnet(folder):
    """A small WordNet in its own format: offsets are places in the data files."""
    head = "  1 This software and database is being provided to you  \n"
    synsets = {
        "noun": [["dog", "domestic_dog", "Canis_familiaris"], ["cad", "dog"], ["man"], ["bus", "coach"]],
        "verb": [["run"], ["chase", "dog"], ["race", "run"]], "adj": [["able(p)", "fit"]], "adv": [["fast"]],
    }  # fmt: skip
    for part, groups in synsets.items():
        data, index = head, {}
        for words in groups:
            offset = len(data.encode())
            for word in words:
                index.setdefault(word.lower().partition("(")[0], []).append(offset)
            listed = " ".join(f"{word} 0" for word in words)
            data += f"{offset:08d} 05 {part[0]} {len(words):02x} {listed} 001 @ 00001740 {part[0]} 0000 | a gloss  \n"
        lines = [
            f"{word} {part[0]} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}  "
            for word, at in sorted(index.items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(head + "\n".join(lines) + "\n")
    (folder / "verb.exc").write_text("ran run\n")
    return folder


def test_wordnet_is_read_from_its_files_alone(tmp_path):
    source = WordNet(wordnet(tmp_path))
    assert source.synonyms("dog") == ["domestic dog", "canis familiaris", "cad", "chase"]
    assert source.synonyms("dogs") == ["dog", "domestic dog", "canis familiaris", "cad", "chase"]
    assert source.synonyms("ran") == ["run", "race"] and source.synonyms("buses") == ["bus", "coach"]
    assert source.synonyms("able") == ["fit"] and source.synonyms("nothing-here") == []
    made = EDA(0.1, 30, synonyms=source, operations=["replace"])(["Two Dogs ran."])[0]
    assert {"Two cad ran.", "Two Dogs race."} <= set(made)


def test_damaged_wordnet(tmp_path):
    with pytest.raises(InputError, match=r"lacks index\.noun"):
        WordNet(tmp_path)
    wordnet(tmp_path)
    (tmp_path / "data.noun").write_text("nothing\n")
    with pytest.raises(InputError, match=r"data\.noun: has no synset"):
        WordNet(tmp_path).synonyms("dog")
    (tmp_path / "index.noun").write_text("dog n x\n")
    with pytest.raises(InputError, match="not an index of WordNet"):
        WordNet(tmp_path)


def test_words_of_a_masked_lm():
    pytest.importorskip("transformers")
    from captions import masked_lm

    source = MaskedSynonyms(masked_lm().eval(), k=20)
    words = ["a", "small", "dog", "runs"]
    found = source(words, 2)
    assert found and all(word.isalnum() for word in found) and source(words, 2) == found
    assert source(words * 40, 2) == []
    assert EDA(0.3, 4, synonyms=source)(["a small dog runs on grass"])[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDA(0.0), "alpha must be"),
        (lambda: EDA(operations=["replace"]), "pass synonyms="),
        (lambda: EDA(operations=["rotate"]), "operations must be some of replace"),
        (lambda: EDA(synonyms=3), "synonyms must be"),
        (lambda: EDA()("text"), "list of captions"),
        (lambda: EDA()(["a", " "]), r"texts\[1\] must be a text with a word"),
        (lambda: EDA()(["a"], [1, 2]), "index must have a number"),
        (lambda: RandAugment(2, 11), "level must be"),
        (lambda: RandAugment()(torch.zeros(1, 3, 8, 8)), "uint8"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def photos(count=4):
    return torch.randint(60, 190, (count, 3, 24, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_randaugments_draws_belong_to_an_image():
    pytest.importorskip("PIL")
    images = photos(8)
    augment = RandAugment(2, 7, seed=3)
    made = augment(images)
    assert made.dtype == torch.uint8 and made.shape == images.shape and not torch.equal(made, images)
    assert torch.equal(made, torch.cat([augment(images[i : i + 1], [i]) for i in range(8)]))
    assert torch.equal(RandAugment(0, 7)(images), images)


@pytest.mark.parametrize(("level", "still"), [(5, {"identity", "brightness", "sharpness"}), (7, {"identity"})])
def test_no_ops_are_those_that_change_nothing(level, still):
    image_module = pytest.importorskip("PIL.Image")
    augment = RandAugment(2, level)
    image = image_module.fromarray(photos(1)[0].permute(1, 2, 0).contiguous().numpy())
    same = {op for op in augment.OPERATIONS if np.array_equal(np.array(augment.apply(image, op)), np.array(image))}
    assert same == set(augment.no_ops) == still


def test_geometry():
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:, 10] = 255
    moved = np.array(RandAugment(1, 10).apply(image_module.fromarray(pixels), "translate x"))
    assert (moved[:, 0] == 255).all() and (moved[:, 10:] == 128).all()


@pytest.mark.parametrize("least", [0.5, 0.9])
def test_crops_are_parts_of_the_area_that_was_asked_for(least):
    """Of a picture whose colours are its coordinates: where the corners came from says which part it was."""
    pytest.importorskip("PIL")
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    made = random_crops(image.expand(200, 3, 64, 64), least, seed=1).float()
    width = (made[:, 0, 32, 60] - made[:, 0, 32, 4]) / 4 / 56
    height = (made[:, 1, 60, 32] - made[:, 1, 4, 32]) / 4 / 56
    area, ratio = width * height, width / height
    assert least - 0.05 < area.min() < least + 0.1 and 0.9 < area.max() < 1.05
    assert 0.7 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.4
    left, right = made[:, 0, 32, 0], made[:, 0, 32, 63]
    assert left.min() == 0 and right.max() == 252 and left.std() > 1
    again = random_crops(image[None], least, seed=1, index=[7])[0]
    assert torch.equal(again, made[7].byte())
    with pytest.raises(InputError, match="above 0 and at most 1, got 0"):
        random_crops(image[None], 0)
