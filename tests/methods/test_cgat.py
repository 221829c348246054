from dataclasses import replace

import pytest
import torch
from small import small_dataset
from test_dcmh import SMALL, pixel_dataset
from torch.testing import assert_close

from cmr_fast.attacks.by_codes import CodeAttack, centre_codes
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.methods.cgat import IMAGE_SHARE, TEXT_SHARE, CenterGuided
from cmr_fast.methods.cmimh import CMIMH, CMIMHConfig
from cmr_fast.methods.dcmh import DCMH
from cmr_fast.methods.hardening import harden_on_the_fly
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.ssah import SSAHConfig

RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)
CONFIGS = {
    "dcmh": replace(SMALL, epochs=4, defence="cgat", cgat_eps=0.2, cgat_steps=3),
    "ssah": SSAHConfig(
        bits=8, epochs=4, batch_size=16, hidden=16, feature_dim=12, discriminator_hidden=(8, 6), lr=5e-3,
        multi_scale=False, text_input="standard", defence="cgat", cgat_eps=0.2, cgat_steps=3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return small_dataset(multi=True)


def made(data, **changes):
    torch.manual_seed(0)
    model = DCMH(replace(CONFIGS["dcmh"], **changes), data.image_shape, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    model.begin_round(data.train, 0.0)
    return model


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_term_is_the_agreement_of_attacked_items_with_their_centres(data, modality):
    model = made(data)
    batch = data.train.select(torch.arange(5, 21))
    codes, x = model._signs, getattr(data.train, modality)
    torch.manual_seed(3)
    term = CenterGuided(model, data.train).loss(modality, batch, codes)
    torch.manual_seed(3)
    low, high = float(x.min()), float(x.max())
    eps = 0.2 * (high - low) * (1 if modality == "image" else TEXT_SHARE / IMAGE_SHARE)
    centres = centre_codes(codes, data.train.labels, batch.labels)
    atk = CodeAttack(
        model, modality, eps=eps, bounds=(low, high), steps=3, lr=eps / 4, away=True, random_start=True, batch=16
    )
    moved = atk(getattr(batch, modality), centres)
    assert 0 < float((moved - getattr(batch, modality)).abs().max()) <= eps
    assert_close(term, -(model.encode(modality, moved).tanh() * centres).mean())
    clean = -(model.encode(modality, getattr(batch, modality)).tanh() * centres).mean()
    assert clean.item() >= -1 and clean < term and term.item() <= 1
    term.backward()
    network = model.image_network if modality == "image" else model.text_network
    assert all(p.grad is not None and p.grad.to_dense().abs().sum() > 0 for p in network.parameters())


def test_a_random_start_is_the_generators_and_stays_in_the_ball(data):
    model, x = made(data), data.train.image
    centres = torch.ones(8)
    atk = CodeAttack(model, "image", eps=0.3, bounds=(-5, 5), steps=1, lr=1e-9, away=True, random_start=True)
    torch.manual_seed(1)
    first = atk(x, centres)
    assert not torch.equal(first, atk(x, centres))
    torch.manual_seed(1)
    assert torch.equal(first, atk(x, centres))
    moved = (first - x).abs()
    assert moved.max() <= 0.3 and moved.mean() == pytest.approx(0.15, abs=0.02)
    still = CodeAttack(model, "image", eps=0.3, bounds=(-5, 5), steps=1, lr=1e-9, away=True)
    assert_close(still(x, centres), x)  # where none is asked for, it starts at the input
    assert model._guided is not None and made(data, defence="none")._guided is None


@pytest.mark.parametrize("method", CONFIGS)
def test_trained_models_hold_where_undefended_ones_fall(data, method, tmp_path):
    """Attacked away from its centres, the share of bits that agree with them falls less."""
    config = replace(CONFIGS[method], epochs=20)
    runs = {
        name: train(method, replace(config, defence=name), data, replace(RUN, out=tmp_path / name))
        for name in ("none", "cgat")
    }
    assert all(-1 <= row["cgat_image"] <= 1 for row in runs["cgat"].history)
    assert "cgat_image" not in runs["none"].history[0]
    kept = {}
    for name, run in runs.items():
        codes = signs(run.model.encode("text", data.train.text).detach())
        centres = centre_codes(codes, data.train.labels, data.query.labels)
        low, high = float(data.query.image.min()), float(data.query.image.max())
        atk = CodeAttack(run.model, "image", eps=0.2 * (high - low), bounds=(low, high), steps=10, away=True)
        kept[name] = (signs(run.model.encode("image", atk(data.query.image, centres))) == centres).float().mean()
    assert kept["cgat"] > kept["none"] + 0.02


@pytest.mark.parametrize("method", CONFIGS)
def test_resumed_run_equals_one_that_was_not_stopped(data, method, tmp_path, monkeypatch):
    settings = replace(RUN, checkpoint_seconds=0.0)
    whole = train(method, CONFIGS[method], data, replace(settings, out=tmp_path / "whole"))
    kind, calls = type(whole.model), []

    def stops(self, split, progress, begin=kind.begin_round):
        calls.append(progress)
        if len(calls) == 3:
            raise KeyboardInterrupt
        begin(self, split, progress)

    monkeypatch.setattr(kind, "begin_round", stops)
    with pytest.raises(KeyboardInterrupt):
        train(method, CONFIGS[method], data, replace(settings, out=tmp_path / "cut"))
    resumed = train(method, CONFIGS[method], data, replace(settings, out=tmp_path / "cut", resume=True))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match=r"config cgat_eps was 0\.2 and is now 0\.1"):
        changed = replace(CONFIGS[method], cgat_eps=0.1)
        train(method, changed, data, replace(settings, out=tmp_path / "cut", resume=True))


def test_narrow_weights_and_pixels(data, tmp_path):
    run = train(
        "dcmh", replace(CONFIGS["dcmh"], epochs=1), data, replace(RUN, out=tmp_path / "a", precision="bf16-true")
    )
    assert load_model(run.path).config.defence == "cgat"
    config = replace(CONFIGS["dcmh"], epochs=1, batch_size=6, cgat_steps=1, lr=1e-4, text_input="raw")
    run = train("dcmh", config, pixel_dataset(), replace(RUN, out=tmp_path / "b"))
    assert -1 <= run.history[0]["cgat_image"] <= 1


def test_fine_tuning_goes_on_from_the_model(data, tmp_path):
    base = train("dcmh", replace(CONFIGS["dcmh"], defence="none"), data, replace(RUN, out=tmp_path / "base")).model
    before = {name: p.clone() for name, p in base.state_dict().items()}
    still = harden_on_the_fly(base, data, replace(RUN, out=tmp_path / "still"), epochs=2)
    assert len(still.history) == 2 and "cgat_text" in still.history[0] and still.model.config.defence == "cgat"
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    base.config = replace(base.config, lr=0.0, lr_end=0.0)
    same = harden_on_the_fly(base, data, replace(RUN, out=tmp_path / "same"), epochs=1).model
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), same.parameters(), strict=True))
    cmimh = CMIMH(CMIMHConfig(bits=6, hidden=12), data.image_dim, data.text_dim, data.num_classes)
    with pytest.raises(InputError, match="dcmh or ssah, got cmimh"):
        harden_on_the_fly(cmimh, data, RUN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defence": "other"}, "defence must be one of none, cgat"),
        ({"cgat_eps": 0.0}, "cgat_eps must be above 0"),
        ({"cgat_steps": 0}, "cgat_steps must be at least 1"),
        ({"cgat_weight": -1.0}, "cgat_weight must be finite"),
    ],
)
@pytest.mark.parametrize("method", CONFIGS)
def test_bad_settings(method, changes, words):
    with pytest.raises(InputError, match=words):
        replace(CONFIGS[method], **changes)
