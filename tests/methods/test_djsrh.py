from dataclasses import replace

import pytest
import torch
from small import small_dataset

from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import Random
from cmr_fast.methods.djsrh import DJSRH, DJSRHConfig
from cmr_fast.methods.evaluation import averaged, evaluate_model
from cmr_fast.methods.loop import RunConfig, load_model, train

SMALL = DJSRHConfig(
    bits=16, epochs=12, batch_size=15, image_hidden=24, text_hidden=24, lr_image=0.05, lr_text=0.05, beta=0.5,
    affinity="inputs", text_input="standard",
)  # fmt: skip
RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)


def made(**changes):
    torch.manual_seed(0)
    data = small_dataset()
    model = DJSRH(replace(SMALL, **changes), data.image_dim, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    return model.double(), data.train.to("cpu", torch.float64)


def cosine(a, b):
    return float(a @ b) / max(float(a.norm()) * float(b.norm()), 1e-12)


def objective(config, alpha, images, texts, image_outputs, text_outputs):
    """The paper's loss pair by pair, float64; images and texts are what similarities are taken of."""
    m = len(images)
    bend = {"stretched": lambda c: 2 * c - 1}.get(config.affinity, lambda c: c)
    joint = [
        [
            config.beta * bend(cosine(images[i], images[j])) + (1 - config.beta) * bend(cosine(texts[i], texts[j]))
            for j in range(m)
        ]
        for i in range(m)
    ]
    a, b = torch.tanh(alpha * image_outputs), torch.tanh(alpha * text_outputs)
    total = 0.0
    for i in range(m):
        for j in range(m):
            both = sum(joint[i][k] * joint[j][k] for k in range(m)) / m
            s = config.mu * ((1 - config.eta) * joint[i][j] + config.eta * both)
            total += (s - cosine(a[i], b[j])) ** 2 + config.lambda1 * (s - cosine(a[i], a[j])) ** 2
            total += config.lambda2 * (s - cosine(b[i], b[j])) ** 2
    return total / m**2


@pytest.mark.parametrize("affinity", ["stretched", "cosine", "inputs"])
def test_the_loss_is_the_papers(affinity):
    model, split = made(affinity=affinity, lambda1=0.3, lambda2=0.7, eta=0.4)
    model.begin_round(split, 5 / 12)
    batch = split.select(torch.arange(4, 11))
    inputs = [model.scalings[m](getattr(batch, m)) for m in ("image", "text")]
    outputs = [model.encode(m, getattr(batch, m)).detach() for m in ("image", "text")]
    seen = inputs if affinity == "inputs" else [batch.image, batch.text]
    expected = objective(model.config, 6**0.5, *seen, *outputs)
    logged = model.step(batch, model.optimizers(), lambda loss: loss.backward(), 5 / 12)
    assert float(logged["loss"]) == pytest.approx(expected, rel=1e-10)


def test_a_step_goes_down_the_slope_of_both_networks():
    model, split = made()
    model.begin_round(split, 0.0)
    batch = split.select(torch.arange(12))
    before = [p.detach().clone() for p in model.parameters()]
    first, again = (
        float(model.step(batch, model.optimizers(), lambda loss: loss.backward(), 0.0)["loss"]) for _ in range(2)
    )
    assert again < first
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_alpha_is_the_root_of_the_epoch():
    model, split = made(epochs=80)
    for epoch in (1, 2, 9, 80):
        model.begin_round(split, (epoch - 1) / 80)
        assert model.alpha == pytest.approx(epoch**0.5)


def test_beats_random_codes_and_reloads(tmp_path):
    data = small_dataset()
    run = train("djsrh", SMALL, data, replace(RUN, out=tmp_path / "run"))
    chance = averaged(evaluate_model(Random(16).fit(data.train), data))["average"]
    assert run.results["all"]["average"] > chance + 0.1
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    loaded = load_model(tmp_path / "run")
    assert torch.equal(loaded.encode("text", data.query.text), run.model.encode("text", data.query.text))


def test_labels_are_not_looked_at(tmp_path):
    data = small_dataset()
    other = replace(data, train=replace(data.train, labels=data.train.labels.flip(0)))
    config = replace(SMALL, epochs=2)
    models = [train("djsrh", config, d, replace(RUN, out=tmp_path / str(i))).model for i, d in enumerate((data, other))]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_run_equals_one_that_was_not_stopped(tmp_path, monkeypatch):
    data, config = small_dataset(), replace(SMALL, epochs=4)
    settings = replace(RUN, checkpoint_seconds=0.0, valid_fraction=0.2)
    whole = train("djsrh", config, data, replace(settings, out=tmp_path / "whole"))
    calls = []

    def stops(self, split, progress, begin=DJSRH.begin_round):
        calls.append(progress)
        if len(calls) == 3:
            raise KeyboardInterrupt
        begin(self, split, progress)

    monkeypatch.setattr(DJSRH, "begin_round", stops)
    with pytest.raises(KeyboardInterrupt):
        train("djsrh", config, data, replace(settings, out=tmp_path / "cut"))
    resumed = train("djsrh", config, data, replace(settings, out=tmp_path / "cut", resume=True))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 0}, "bits must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"mu": -1.0}, "mu must be finite"),
        ({"affinity": "dot"}, "affinity must be one of stretched, cosine, inputs"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(InputError, match=words):
        replace(SMALL, **changes)
