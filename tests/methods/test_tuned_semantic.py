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
    """Without negative features, so that every map is allowed."""
    data = small_dataset()
    parts = {n: getattr(data, n) for n in ("train", "query", "database")}
    return replace(data, **{n: replace(p, image=p.image.exp(), text=p.text.exp()) for n, p in parts.items()})


def test_the_choice_is_the_best_of_all_pairs_of_choices_on_held_out_pairs(data, monkeypatch):
    monkeypatch.setattr(tuned_semantic, "PENALTIES", (1.0, 100.0))
    held = data.hold_out(0.2, 0)
    judged = replace(held, query=held.valid, database=held.valid)
    scores = {}
    for image, text in itertools.product(itertools.product(MAPS, (1.0, 100.0)), repeat=2):
        model = TunedSemanticMatching({"image": image, "text": text}).fit(held.train)
        scores[image, text] = averaged(evaluate_model(model, judged, convention="all"))["average"]
    found = tune(data, quiet=True)
    assert len(scores) == 36 and len({round(score, 6) for score in scores.values()}) > 10
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
    own = replace(data, train=replace(data.train, image=data.train.image - 5)).hold_out(0.4, 3)
    assert tune(own, quiet=True)["image"][0] == "standard"
    assert len(seen) == len(PENALTIES) ** 2 * len(MAPS), "of texts all maps"
    assert all(torch.equal(one.labels, own.valid.labels) for one in seen)
    seen.clear()
    monkeypatch.setattr(tuned_semantic, "WIDE", min(data.image_dim, data.text_dim) - 1)
    assert {kind for kind, _ in tune(data, quiet=True).values()} == {"standard"}
    assert len(seen) == len(PENALTIES) ** 2


def test_a_map_that_held_out_pairs_rule_out_is_not_chosen(data):
    text = data.train.text.clone()
    text[data.hold_out(0.2, 0).valid.rows[0]] = -1e-6
    negative = replace(data, train=replace(data.train, text=text))
    assert tune(negative, quiet=True)["text"][0] == "standard"
    TunedSemanticMatching(tune(negative, quiet=True)).fit(negative.train)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("standard", "image needs an input scaling and a penalty, got 'standard'"),
        (("standard", -1.0), "penalty must be"),
        (("standard", float("nan")), "penalty must be"),
        (("standard", "1"), "penalty must be"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        TunedSemanticMatching({"image": setting, "text": ("standard", 1.0)})


def test_refuses(data):
    fitted = TunedSemanticMatching({"image": ("chi2", 1.0), "text": ("standard", 1.0)}).fit(data.train)
    for modality in ("image", "text"):
        with pytest.raises(InputError, match=f"{modality} features must be .* wide, got 99"):
            fitted.encode(modality, torch.zeros(2, 99))
        with pytest.raises(InputError, match="in a tensor, got"):
            fitted.encode(modality, [[1.0]])
    with pytest.raises(InputError, match="modality must be one of"):
        fitted.encode("audio", data.query.image)
    with pytest.raises(InputError, match="settings must name image, text, got image"):
        TunedSemanticMatching({"image": ("standard", 1.0)})
    with pytest.raises(InputError, match="not fitted"):
        TunedSemanticMatching({"image": ("standard", 1.0), "text": ("standard", 1.0)}).encode("image", data.query.image)
