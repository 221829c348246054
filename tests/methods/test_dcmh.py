from dataclasses import replace

import pytest
import torch
from small import small_dataset
from torch import nn
from torch.testing import assert_close

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.methods.dcmh import DCMH, DCMHConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.models.hashing import CNNF, BagLinear

SMALL = DCMHConfig(
    bits=8, epochs=30, batch_size=16, image_hidden=24, text_hidden=24, optimizer="adam", lr=5e-3, eta=0.01,
    text_input="standard",
)  # fmt: skip
RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)


def made(data=None, **changes):
    torch.manual_seed(0)
    data = data or small_dataset(multi=True)
    model = DCMH(replace(SMALL, **changes), data.image_shape, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    return model, data.train


def objective(f, g, b, labels, gamma, eta, squared=False):
    """Eq. 1 by its full N x N arrays, float64."""
    share = (labels.double() @ labels.double().T > 0).double()
    theta = 0.5 * f @ g.T
    log = (1 + theta.exp()).log()
    pairs = (0.5 * (0.999 * share * theta - log) ** 2).sum() if squared else (log - share * theta).sum()
    balance = f.sum(0).square().sum() + g.sum(0).square().sum()
    return pairs + gamma * ((b - f).square().sum() + (b - g).square().sum()) + eta * balance


@pytest.mark.parametrize("pair_loss", ["nll", "squared"])
def test_a_step_follows_equation_1(pair_loss):
    """The image network's gradient is dJ/dF of the batch's rows, carried back, over n N; then the text's."""
    model, train_split = made(pair_loss=pair_loss, optimizer="sgd", lr=0.5, lr_end=0.5, gamma=0.7, eta=0.3)
    model, split = model.double(), train_split.to("cpu", torch.float64)
    model.begin_round(split, 0.0)
    f, g = model.memory.image.clone(), model.memory.text.clone()
    b = signs(f + g)
    rows = torch.arange(3, 19)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = split.select(rows)
    again, _ = made(pair_loss=pair_loss, optimizer="sgd")
    again = again.double()
    for name, network in (("image", again.image_network), ("text", again.text_network)):
        again.train()
        outputs = again.encode(name, getattr(batch, name))
        codes = {"image": f.clone(), "text": g.clone()}
        codes[name] = codes[name].index_copy(0, rows, outputs)
        args = (codes["image"], codes["text"], b, split.labels, 0.7, 0.3, pair_loss == "squared")
        loss = objective(*args) / (len(rows) * len(split))
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        for (key, _), slope in zip(network.named_parameters(), slopes, strict=True):
            before[f"{name}_network.{key}"] -= 0.5 * slope.to_dense()
        f = codes["image"].detach()  # the text's step sees the image's new outputs
    model.step(batch, model.optimizers(), lambda loss: loss.backward(), 0.0)
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), before[name], rtol=1e-6, atol=1e-9, msg=name)
    assert_close(model.memory.image, f)


def test_memory_is_what_the_networks_said_and_signs_are_never_zero():
    model, split = made()
    model.begin_round(split, 0.0)
    assert_close(model.memory.image, model.encode("image", split.image).detach())
    model.memory.image.zero_()
    model.memory.text.zero_()
    model.begin_round(split, 0.5)
    assert torch.equal(model._signs, torch.ones_like(model._signs))


def test_learns_what_random_codes_do_not(tmp_path):
    run = train("dcmh", SMALL, small_dataset(multi=True), replace(RUN, out=tmp_path / "run"))
    chance = train("dcmh", replace(SMALL, epochs=1, lr=1e-9, lr_end=1e-9), small_dataset(multi=True),
                   replace(RUN, out=tmp_path / "none"))  # fmt: skip
    assert run.results["all"]["average"] > chance.results["all"]["average"] + 0.08
    losses = [row["loss_image"] for row in run.history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("sgd", "32-true"), ("adam", "32-true"), ("sgd", "bf16-true"), ("adam", "64-true")]
)
def test_resumed_run_equals_one_that_was_not_stopped(tmp_path, optimizer, precision, monkeypatch):
    data = small_dataset()
    config = replace(SMALL, epochs=4, optimizer=optimizer, lr=1e-2, text_input="raw")
    settings = replace(RUN, checkpoint_seconds=0.0, valid_fraction=0.2, precision=precision)
    whole = train("dcmh", config, data, replace(settings, out=tmp_path / "whole"))
    calls = []

    def stops(self, split, progress, begin=DCMH.begin_round):
        calls.append(progress)
        if len(calls) == 3:
            raise KeyboardInterrupt
        begin(self, split, progress)

    monkeypatch.setattr(DCMH, "begin_round", stops)
    with pytest.raises(KeyboardInterrupt):
        train("dcmh", config, data, replace(settings, out=tmp_path / "cut"))
    resumed = train("dcmh", config, data, replace(settings, out=tmp_path / "cut", resume=True))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row["loss_text"] for row in whole.history] == [row["loss_text"] for row in resumed.history]


def test_loaded_model_gives_the_same_codes(tmp_path):
    data = small_dataset()
    run = train("dcmh", replace(SMALL, epochs=2), data, replace(RUN, out=tmp_path / "run"))
    loaded = load_model(tmp_path / "run")
    for name in ("image", "text"):
        x = getattr(data.query, name)
        assert torch.equal(loaded.encode(name, x), run.model.encode(name, x))
    assert loaded.image_shape == (7,) and loaded.image_dim == 7


def pixel_dataset(count=24):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    image = torch.randint(0, 40, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    image[labels == 1] += 180
    text = torch.eye(2)[labels].repeat(1, 3)
    pairs = Pairs(image, text, labels)
    half = pairs.select(torch.arange(count // 2, count))
    return PairedDataset("pixels", pairs.select(torch.arange(count // 2)), half, half)


def test_raw_pixels_train_and_reload(tmp_path):
    data = pixel_dataset()
    config = replace(SMALL, epochs=3, batch_size=6, lr=1e-4, text_input="raw")
    run = train("dcmh", config, data, replace(RUN, out=tmp_path / "run"))
    assert isinstance(run.model.image_network[0], CNNF)
    codes = load_model(tmp_path / "run").encode("image", data.query.image)
    assert codes.shape == (12, 8) and codes.isfinite().all()
    assert_close(codes, run.model.encode("image", data.query.image.float()))


def test_a_start_goes_on_from_its_weights(tmp_path):
    data = small_dataset()
    first = train("dcmh", replace(SMALL, epochs=3), data, replace(RUN, out=tmp_path / "first"))
    more = data.train.joined(data.train.select(torch.arange(10)))
    data = replace(data, train=more)
    still = train(
        "dcmh", replace(SMALL, epochs=1, lr=0.0, lr_end=0.0), data, replace(RUN, out=tmp_path / "second"),
        start=first.model,
    )  # fmt: skip
    for (name, a), b in zip(first.model.named_parameters(), still.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(still.model.memory.image) == len(more)
    with pytest.raises(InputError, match="start must be a trained ACMR"):
        train("acmr", None, data, replace(RUN, out=tmp_path / "third"), start=first.model)
    with pytest.raises(InputError, match="do not fit"):
        train("dcmh", replace(SMALL, bits=4), data, replace(RUN, out=tmp_path / "third"), start=first.model)


def test_bag_layer_is_a_linear_layer():
    torch.manual_seed(0)
    layer = BagLinear(40, 7, sparse=True).double()
    x = torch.where(torch.rand(9, 40) < 0.06, torch.rand(9, 40), 0.0).double()
    x[3] = 0
    upstream = torch.randn(9, 7, dtype=torch.float64)
    sparse = layer(x)
    assert_close(sparse, x @ layer.weight + layer.bias)
    sparse.backward(upstream)
    assert layer.weight.grad.is_sparse
    found = layer.weight.grad.to_dense(), layer.bias.grad.clone()
    layer.zero_grad()
    (x @ layer.weight + layer.bias).backward(upstream)
    assert_close(found[0], layer.weight.grad)
    assert_close(found[1], layer.bias.grad)


def test_bag_layer_gives_inputs_a_gradient_and_takes_any_density():
    layer = BagLinear(12, 3, sparse=True)
    x = torch.rand(4, 12, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.detach().sum(dim=1).expand(4, 12))
    assert_close(layer(torch.zeros(2, 12)), layer.bias.expand(2, 3))
    assert_close(layer(x.detach()), layer.eval()(x.detach()))
    dense = BagLinear(12, 3)
    dense(torch.eye(12)).sum().backward()
    assert not dense.weight.grad.is_sparse


def test_bags_of_words_are_trained_sparsely_and_equal_dense_training():
    generator = torch.Generator().manual_seed(0)
    data = small_dataset()
    text = (torch.rand(len(data.train), 60, generator=generator) < 0.04).float()
    data = PairedDataset("bags", *(Pairs(data.train.image, text, data.train.labels) for _ in range(3)))
    found = []
    for sparse in (True, False):
        model, split = made(data, optimizer="sgd", lr=0.05, text_input="raw")
        assert model.text_network[0].sparse
        model.text_network[0].sparse = sparse
        model.begin_round(split, 0.0)
        model.step(split.select(torch.arange(16)), model.optimizers(), lambda loss: loss.backward(), 0.0)
        found.append(model.text_network[0].weight.detach())
    assert_close(found[0], found[1])


def test_cnn_f_has_the_papers_layers():
    network = CNNF(224, 224)
    convolutions = [m for m in network.features if isinstance(m, nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in convolutions] == [
        (64, 3, 11, 11), (256, 64, 5, 5), (256, 256, 3, 3), (256, 256, 3, 3), (256, 256, 3, 3),
    ]  # fmt: skip
    assert network.fc6.in_features == 256 * 6 * 6 and network.fc7.out_features == 4096


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 0}, "bits must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"eta": -1.0}, "eta must be finite"),
        ({"pair_loss": "l2"}, "pair_loss must be one of nll, squared"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay is for sgd"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(InputError, match=words):
        replace(SMALL, **changes)


def test_cnnf_refuses_images_that_its_pools_leave_nothing_of():
    with pytest.raises(InputError, match="64 x 64 pixels or more, got 32 x 80"):
        DCMH(DCMHConfig(bits=8), (3, 32, 80), 5, 2)
