import itertools
from dataclasses import replace

import pytest
import torch
from small import small_dataset

from cmr_fast.errors import InputError
from cmr_fast.methods import tuned_semantic
from cmr_fast.methods.baselines import SemanticMatching
from cmr_fast.methods.evaluation import averaged, evaluate_model
from cmr_fast.methods.tuned_semantic import MAPS, PENALTIES, TunedSemanticMatching, tune


@pytest.fixture
def data():
    return small_dataset()


def test_the_choice_is_the_best_of_all_pairs_of_choices_on_held_out_pairs(data, monkeypatch):
    monkeypatch.setattr(tuned_semantic, "PENALTIES", (1.0, 100.0))
    held = data.hold_out(0.2, 0)
    judged = replace(held, query=held.valid, database=held.valid)
    scores = {}
    maps = [kind for kind in MAPS if kind == "standard" or float(data.train.image.min()) >= 0]
    for image, text in itertools.product(itertools.product(maps, (1.0, 100.0)), repeat=2):
        try:
            model = TunedSemanticMatching({"image": image, "text": text}).fit(held.train)
        except InputError:
            continue
        scores[image, text] = averaged(evaluate_model(model, judged, convention="all"))["average"]
    found = tune(data, quiet=True)
    assert len(scores) > 1 and min(scores.values()) < max(scores.values())
    assert scores[found["image"], found["text"]] == pytest.approx(max(scores.values()))


def test_with_penalty_1_on_standardised_inputs_it_is_semantic_matching(data):
    settings = {"image": ("standard", 1.0), "text": ("standard", 1.0)}
    tuned, plain = TunedSemanticMatching(settings).fit(data.train), SemanticMatching().fit(data.train)
    for modality in ("image", "text"):
        x = getattr(data.query, modality)
        assert torch.allclose(tuned.encode(modality, x), plain.encode(modality, x), atol=1e-3)


def test_maps_that_the_features_do_not_allow_are_left_out_and_a_split_of_the_data_is_asked(data, monkeypatch):
    seen, validate = [], tuned_semantic.validate
    monkeypatch.setattr(tuned_semantic, "validate", lambda model, valid: seen.append(valid) or validate(model, valid))
    negative = replace(data, train=replace(data.train, image=data.train.image - 5, text=data.train.text - 5))
    own = negative.hold_out(0.4, 3)
    assert {kind for kind, _ in tune(own, quiet=True).values()} == {"standard"}
    assert len(seen) == len(PENALTIES) ** 2 and all(torch.equal(one.labels, own.valid.labels) for one in seen)


def test_refuses(data):
    with pytest.raises(InputError, match="settings must name image, text, got image"):
        TunedSemanticMatching({"image": ("standard", 1.0)})
    with pytest.raises(InputError, match="not fitted"):
        TunedSemanticMatching({"image": ("standard", 1.0), "text": ("standard", 1.0)}).encode("image", data.query.image)
