"""TextAttack's recipes on our towers, and our search inside its Attack: needs textattack, an environment of its own."""

import importlib
import os
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from captions import CAPTIONS, masked_lm, victim

from cmr_fast.attacks import BertAttack, CharacterAttack
from cmr_fast.attacks.text.objectives import OBJECTIVES
from cmr_fast.attacks.text.words import STOP_WORDS
from cmr_fast.errors import InputError

NAME = "cmr_fast.attacks.text.textattack"
with_textattack = pytest.mark.skipif(find_spec("textattack") is None, reason="textattack is not installed")


@pytest.fixture(scope="module")
def adapter():
    """The module, with NLTK's stop words (which TextAttack reads when it is imported) in a folder of this run."""
    with tempfile.TemporaryDirectory() as folder:
        if "NLTK_DATA" not in os.environ:
            place = Path(folder) / "corpora" / "stopwords"
            place.mkdir(parents=True)
            (place / "english").write_text("\n".join(sorted(STOP_WORDS)) + "\n")
            os.environ["NLTK_DATA"] = folder
        yield importlib.import_module(NAME)


@pytest.mark.skipif(find_spec("textattack") is not None, reason="textattack is installed")
def test_without_textattack_it_is_said_how_to_get_it():
    with pytest.raises(InputError, match=r'pip install "cmr-fast\[textattack\]" in an environment of its own'):
        importlib.import_module(NAME)


@with_textattack
@pytest.mark.parametrize("objective", ["kl", "l2", "similarity"])
def test_our_search_inside_textattack_is_our_search(adapter, objective):
    attack = adapter.FlatBERTAttack.build(
        adapter.TextTowerWrapper(victim()), masked_lm(), objective=objective, words=2, threshold=0.0
    )
    results = adapter.attack_texts(attack, CAPTIONS)
    expected, info = BertAttack(victim(), masked_lm(), objective=objective, words=2, threshold=0.0)(
        CAPTIONS, return_info=True
    )
    assert [r.perturbed_text() for r in results] == expected
    assert sum(r.perturbed_text() != text for r, text in zip(results, CAPTIONS, strict=True)) >= 5
    np.testing.assert_allclose([r.perturbed_result.score for r in results], info.objective, rtol=1e-5, atol=1e-6)


@with_textattack
def test_one_text_at_a_time_finds_the_same(adapter):
    attack = adapter.FlatBERTAttack.build(adapter.TextTowerWrapper(victim()), masked_lm())
    together = [r.perturbed_text() for r in adapter.attack_texts(attack, CAPTIONS)]
    again = adapter.FlatBERTAttack.build(adapter.TextTowerWrapper(victim()), masked_lm())
    assert [again.attack(text, 0).perturbed_text() for text in CAPTIONS] == together


@with_textattack
def test_images_are_found_by_the_label(adapter):
    images = torch.randn(len(CAPTIONS), 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrapper = adapter.TextTowerWrapper(victim())
    attack = adapter.FlatBERTAttack.build(wrapper, masked_lm(), objective="image", images=images)
    order = list(reversed(range(len(CAPTIONS))))
    results = adapter.attack_texts(attack, [CAPTIONS[i] for i in order], order)
    expected = BertAttack(victim(), masked_lm(), objective="image")(CAPTIONS, images)
    assert [r.perturbed_text() for r in results] == [expected[i] for i in order]
    with pytest.raises(InputError, match="rows of the 10 images here, got 10"):
        attack.attack("a dog", 10)


@with_textattack
def test_textattacks_own_search_equals_a_loop_over_its_candidates(adapter):
    """The goal and the wrapper: no changed word of any caption scores higher than the one it chose."""
    wrapper = adapter.TextTowerWrapper(victim())
    attack = adapter.RetrievalBERTAttack.build(wrapper, masked_lm(), k=5)
    kl, moved = OBJECTIVES["kl"], 0
    for text in CAPTIONS[:4]:
        result = attack.attack(text, 0)
        found = result.perturbed_text()
        clean, changed = wrapper([text]), wrapper([found])
        assert result.perturbed_result.score == pytest.approx(float(kl(changed, clean)), rel=1e-9)
        if found == text:
            continue
        moved += 1
        before, after = (t.replace(",", "").replace(".", "").split() for t in (text, found))
        places = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert len(places) == 1 and before[places[0]] not in STOP_WORDS
        others = attack.get_transformations(
            result.original_result.attacked_text, result.original_result.attacked_text, indices_to_modify=places
        )
        scores = kl(wrapper([t.text for t in others]), clean.expand(len(others), -1))
        assert float(scores.max()) == pytest.approx(result.perturbed_result.score, rel=1e-9)
    assert moved >= 2


@with_textattack
def test_any_text_attack_can_be_the_search(adapter):
    goal = adapter.EmbeddingDistance(adapter.TextTowerWrapper(victim()))
    engine = CharacterAttack(victim(), seed=3)
    attack = adapter.RetrievalBERTAttack.build(adapter.TextTowerWrapper(victim()), masked_lm())
    mixed = type(attack)(goal, [], attack.transformation, adapter.FlatSearch(engine))
    assert [r.perturbed_text() for r in adapter.attack_texts(mixed, CAPTIONS)] == engine(CAPTIONS)


@with_textattack
def test_random_states_weights_and_modes_are_left_as_they_were(adapter):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    model = victim().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    try:
        attack = adapter.FlatBERTAttack.build(adapter.TextTowerWrapper(model), masked_lm())
        adapter.attack_texts(attack, CAPTIONS[:2])
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    seen = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(seen[0], expected[0]) and (seen[1] == expected[1]).all() and seen[2] == expected[2]


@with_textattack
def test_bad_input(adapter):
    wrapper = adapter.TextTowerWrapper(victim())
    with pytest.raises(InputError, match=r"mlm must be a cmr_fast.models.mlm.MaskedLM, got str"):
        adapter.RetrievalBERTAttack.build(wrapper, "bert-base-uncased")
    with pytest.raises(InputError, match="tokenize"):
        adapter.TextTowerWrapper(torch.nn.Linear(2, 2))
    attack = adapter.FlatBERTAttack.build(wrapper, masked_lm())
    with pytest.raises(InputError, match="no word"):
        adapter.attack_texts(attack, ["a dog", " , "])
    with pytest.raises(InputError, match="one a text, 2, got 1"):
        adapter.attack_texts(attack, ["a dog", "a man"], [0])
    classifier = type("Classifier", (), {"model": None, "__call__": lambda self, texts: [0.5] * len(texts)})()
    with pytest.raises(InputError, match="must return embeddings"):
        adapter.EmbeddingDistance(classifier).init_attack_example(adapter.AttackedText("a dog"), 0)
