from dataclasses import replace

import pytest
import torch
from small import small_dataset
from test_dcmh import pixel_dataset
from torch.nn import functional as F
from torch.testing import assert_close

from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.ssah import SSAH, MultiScale, SSAHConfig

SMALL = SSAHConfig(
    bits=8, epochs=30, batch_size=16, feature_dim=16, hidden=24, discriminator_hidden=(12, 8), lr=3e-3, label_lr=5e-3,
    discriminator_lr=1e-3, text_input="standard",
)  # fmt: skip
RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)


def made(data=None, **changes):
    torch.manual_seed(0)
    data = data or small_dataset(multi=True)
    model = SSAH(replace(SMALL, **changes), data.image_shape, data.text_dim, data.num_classes).double()
    model.fit_inputs(data.train)
    split = data.train.to("cpu", torch.float64)
    model.begin_round(split, 0.0)
    return model, split


@pytest.mark.parametrize("pair_loss", ["nll", "squared"])
def test_terms_are_the_printed_ones(pair_loss):
    """Against the full arrays, float64."""
    model, split = made(pair_loss=pair_loss)
    rows = torch.tensor([3, 9, 17, 40])
    labels = split.labels[rows].double()
    said = model.network["image"](model.scaled("image", split.image[rows]))
    wanted = signs(torch.randn(4, 8, dtype=torch.float64))
    share = (split.labels[rows].double() @ split.labels.double().T > 0).double()
    expected = {}
    for name, own, stored in (("features", said[0], model.memory.features), ("codes", said[1], model.memory.codes)):
        theta = 0.5 * own @ stored.T
        log = (1 + theta.exp()).log()
        pairs = log - share * theta if pair_loss == "nll" else 0.5 * (0.999 * share * theta - log) ** 2
        expected[name] = pairs.mean()
    expected["quantisation"] = 0.5 * ((said[1] - wanted) ** 2).mean()
    expected["labels"] = 0.5 * ((said[2] - labels) ** 2).mean()
    found = model.terms(said, rows, labels, wanted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, msg=name)
    weights = {"alpha": 2.0, "gamma": 3.0, "eta": 5.0, "beta": 7.0}
    model.config = replace(model.config, **weights)
    terms = dict(zip(("features", "codes", "quantisation", "labels"), torch.eye(4, dtype=torch.float64), strict=True))
    for (name, row), weight in zip(terms.items(), weights.values(), strict=True):
        assert float(model.objective({name: row.sum()})) == weight


def stepped(**changes):
    model, split = made(dropout=0.0, **changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    log = model.step(split.select(torch.arange(16)), model.optimizers(), lambda loss: loss.backward(), 0.0)
    return model, before, log


def test_the_adversary_reaches_the_image_and_text_networks():
    """With every other weight 0 only the discriminator's gradient is left: features move, and towards its 1."""
    alone = {"alpha": 0.0, "gamma": 0.0, "eta": 0.0, "beta": 0.0}
    model, before, log = stepped(**alone, delta=1.0)
    for modality in ("image", "text"):
        name = f"network.{modality}.features.weight"
        assert not torch.equal(dict(model.named_parameters())[name], before[name])
    data = small_dataset(multi=True).train.to("cpu", torch.float64)
    model, split = made(dropout=0.0, **alone, delta=1.0, discriminator_lr=0.0)
    scores = []
    optimizers = model.optimizers()
    for _ in range(30):
        said = model.network["image"](model.scaled("image", data.image[:16]))
        scores.append(float(model.discriminator["image"](said[0]).mean().detach()))
        model.step(split.select(torch.arange(16)), optimizers, lambda loss: loss.backward(), 0.0)
    assert scores[-1] > scores[0] + 0.01
    assert "loss_discriminator" in log


def test_the_networks_steps_leave_the_discriminators_alone_and_the_other_way_round():
    model, before, _ = stepped(discriminator_lr=0.0)
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == name.startswith("discriminator") or "weights" in name, name
    model, before, _ = stepped(lr=0.0, label_lr=0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("network"), name


def test_without_an_adversary_there_is_no_discriminator_step():
    model, before, log = stepped(delta=0.0)
    assert "loss_discriminator" not in log
    assert all(torch.equal(p, before[f"discriminator.{n}"]) for n, p in model.discriminator.named_parameters())


def test_discriminators_learn_to_tell_the_modalities_apart():
    model, split = made(lr=0.0, label_lr=0.0, discriminator_lr=5e-3, dropout=0.0)
    optimizers = model.optimizers()
    logs = [
        model.step(split.select(torch.arange(16)), optimizers, lambda loss: loss.backward(), 0.0) for _ in range(60)
    ]
    assert logs[-1]["loss_discriminator"] < 0.7 * logs[0]["loss_discriminator"]


def test_memory_is_what_the_label_network_says():
    model, split = made()
    features, codes, _ = model.network["label"](split.labels.double())
    assert_close(model.memory.features, features.detach())
    rows = torch.arange(5, 21)
    model.step(split.select(rows), model.optimizers(), lambda loss: loss.backward(), 0.0)
    assert_close(model.memory.codes[:5], codes.detach()[:5])
    assert_close(model.memory.codes[rows], codes.detach()[rows])  # what it said in this step, before its update


def test_class_ids_are_one_hot():
    model, _ = made(small_dataset())
    assert model._one_hot(torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_multi_scale_text():
    scales = MultiScale(23).double()
    assert scales.levels == (1, 2, 3) and scales.out_dim == 92
    text = torch.rand(3, 23, dtype=torch.float64)
    out = scales(text)
    assert torch.equal(out[:, :23], text)
    pooled = torch.stack([text[:, i : i + 10].mean(dim=1) for i in (0, 10)], dim=1)
    assert_close(out[:, 46:69], F.interpolate(pooled[:, None], size=23, mode="linear")[:, 0])
    assert MultiScale(3).out_dim == 3
    assert_close(MultiScale(3)(torch.eye(3)), torch.eye(3))


def test_codes_are_the_signs_of_the_relaxed_ones():
    model, split = made()
    _, codes, _ = model.network["text"](model.scaled("text", split.text))
    assert_close(model.encode("text", split.text).tanh(), codes)


def test_pair_terms_need_no_array_of_all_pairs():
    """10,000 pairs: all against all would be 400 MB; a step sees the buffers in tiles of less than a megabyte."""
    model, _ = made()
    model, count = model.float(), 10_000
    model._labels = torch.arange(count) % 5
    model.memory.features, model.memory.codes = torch.rand(count, 16), torch.rand(count, 8)
    said = torch.rand(128, 16, requires_grad=True), torch.rand(128, 8, requires_grad=True), torch.rand(128, 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        terms = model.terms(said, torch.arange(128), torch.rand(128, 3), torch.ones(128, 8))
        (terms["features"] + terms["codes"]).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 2_000_000
    assert said[0].grad.abs().sum() > 0 and said[1].grad.abs().sum() > 0


def test_learns_what_random_codes_do_not(tmp_path):
    data = small_dataset(multi=True)
    run = train("ssah", replace(SMALL, epochs=60, beta=10.0, delta=0.1), data, replace(RUN, out=tmp_path / "run"))
    still = replace(SMALL, epochs=1, lr=0.0, label_lr=0.0)
    chance = train("ssah", still, data, replace(RUN, out=tmp_path / "none"))
    assert run.results["all"]["average"] > chance.results["all"]["average"] + 0.08


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumed_run_equals_one_that_was_not_stopped_and_loads(tmp_path, precision, monkeypatch):
    data = small_dataset()
    config = replace(SMALL, epochs=4)
    settings = replace(RUN, checkpoint_seconds=0.0, precision=precision)
    whole = train("ssah", config, data, replace(settings, out=tmp_path / "whole"))
    calls = []

    def stops(self, split, progress, begin=SSAH.begin_round):
        calls.append(progress)
        if len(calls) == 3:
            raise KeyboardInterrupt
        begin(self, split, progress)

    monkeypatch.setattr(SSAH, "begin_round", stops)
    with pytest.raises(KeyboardInterrupt):
        train("ssah", config, data, replace(settings, out=tmp_path / "cut"))
    resumed = train("ssah", config, data, replace(settings, out=tmp_path / "cut", resume=True))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = load_model(tmp_path / "whole")
    image = data.query.image.to(next(whole.model.parameters()).dtype)
    assert torch.allclose(loaded.encode("image", image.float()), whole.model.encode("image", image).float(), atol=0.02)
    if precision == "32-true":
        assert torch.equal(loaded.encode("image", image), whole.model.encode("image", image))
    assert loaded.config.discriminator_hidden == (12, 8)


def test_raw_pixels(tmp_path):
    data = pixel_dataset()
    config = replace(SMALL, epochs=2, batch_size=6, lr=1e-4, text_input="raw", multi_scale=False)
    run = train("ssah", config, data, replace(RUN, out=tmp_path / "run"))
    assert run.model.encode("image", data.query.image).shape == (12, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 0}, "bits must be at least 1"),
        ({"delta": -1.0}, "delta must be finite"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"discriminator_hidden": (3,)}, "two widths"),
        ({"pair_loss": "l2"}, "pair_loss must be one of"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(InputError, match=words):
        replace(SMALL, **changes)
