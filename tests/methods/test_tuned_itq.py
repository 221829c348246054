import itertools
from dataclasses import replace

import pytest
import torch
from small import small_dataset

from cmr_fast.errors import InputError
from cmr_fast.methods import tuned_itq
from cmr_fast.methods.baselines import CCAITQ
from cmr_fast.methods.evaluation import averaged, evaluate_model
from cmr_fast.methods.tuned_itq import GRID, TUNED_BITS, TunedCCAITQ, tune

PLAIN = {"inputs": "standard", "pca_dim": 0, "scale": "each", "ridge": 1.0, "dim": None, "weight": 0.5}


@pytest.fixture
def data():
    return small_dataset()


def test_the_setting_is_the_best_of_the_grid_on_held_out_pairs(data, monkeypatch):
    grid = {name: values[:2] for name, values in GRID.items()} | {"dim": (None, 2)}
    monkeypatch.setattr(tuned_itq, "GRID", grid)
    held = data.hold_out(0.2, 0)
    scores = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        try:
            model = TunedCCAITQ(TUNED_BITS, settings).fit(held.train)
        except InputError:
            continue
        judged = replace(held, query=held.valid, database=held.valid)
        scores[values] = averaged(evaluate_model(model, judged, convention="all"))["average"]
    found = tune(data, quiet=True)
    assert len(scores) > 1 and min(scores.values()) < max(scores.values())
    assert scores[tuple(found.values())] == pytest.approx(max(scores.values()))


def test_a_validation_split_of_the_data_is_what_is_asked(data, monkeypatch):
    seen = []
    monkeypatch.setattr(tuned_itq, "validate", lambda model, valid: seen.append(valid) or {"valid_map": 0.5})
    monkeypatch.setattr(tuned_itq, "GRID", {name: values[:1] for name, values in GRID.items()})
    own = data.hold_out(0.4, 3)
    tune(own, quiet=True)
    assert seen == [own.valid]


def test_it_is_cca_itq_behind_its_input_stage(data):
    model, plain = TunedCCAITQ(16, PLAIN, seed=2).fit(data.train), CCAITQ(16, 1.0, weight=0.5, seed=2).fit(data.train)
    for modality in ("image", "text"):  # standardised twice is standardised once
        x = getattr(data.query, modality)
        assert torch.allclose(model.encode(modality, x), plain.encode(modality, x), atol=1e-4)
    reduced = TunedCCAITQ(16, PLAIN | {"pca_dim": 3}).fit(data.train)
    assert reduced.stages["image"].out_dim == 3 and reduced.encode("image", data.query.image).shape[1] == 16


def test_what_the_features_do_not_allow_is_left_out(data, monkeypatch):
    negative = replace(data, train=replace(data.train, image=data.train.image - 5, text=data.train.text - 5))
    assert tune(negative, quiet=True)["inputs"] == "standard"
    monkeypatch.setattr(tuned_itq, "GRID", GRID | {"inputs": ("hellinger",)})
    with pytest.raises(InputError, match="hellinger input scaling needs features of at least 0"):
        tune(negative, quiet=True)


def test_refusals(data):
    with pytest.raises(InputError, match="not fitted"):
        TunedCCAITQ(16, PLAIN).encode("image", data.query.image)
    with pytest.raises(InputError, match=r"settings must name inputs, pca_dim, .* got ridge"):
        TunedCCAITQ(16, {"ridge": 1.0})
