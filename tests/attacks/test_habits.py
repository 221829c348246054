"""What torchattacks' users do with an attack after it was made, beside torchattacks itself."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from networks import samples
from torch import nn

import cmr_fast as cf
from cmr_fast.errors import InputError

attacks = cf.attacks
EPS, ALPHA = 8 / 255, 2 / 255
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.fixture
def torchattacks():
    return pytest.importorskip("torchattacks")


@pytest.fixture
def normalised(model):
    """A model of normalised inputs, as torchvision's are."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model).eval()
            self.mean, self.std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))

        def forward(self, z):
            return self.inner(z * self.std + self.mean)

    return Normalised()


def scaled(x):
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def pixels(z):
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return z * std + mean


def both(torchattacks, model, change, **options):
    """Our attack and theirs, each changed in the same way."""
    options = {"eps": EPS, "alpha": ALPHA, "steps": 5, "random_start": False, **options}
    pair = attacks.PGD(model, **options), torchattacks.PGD(copy.deepcopy(model), **options)
    for atk in pair:
        change(atk)
    return pair


@pytest.mark.parametrize("kind", [list, np.float32, torch.tensor, tuple])
def test_normalised_inputs(torchattacks, normalised, kind):
    x, y = samples(16)
    ours, theirs = both(torchattacks, normalised, lambda a: a.set_normalization_used(mean=kind(MEAN), std=kind(STD)))
    adv, want = ours(scaled(x), y), theirs(scaled(x), y)
    assert ((adv - want).abs() > 1e-5).double().mean() < 0.01  # a sign of a gradient near 0 may differ
    moved = (pixels(adv) - x).abs()
    assert 0.9 * EPS < moved.max() <= EPS + 1e-6
    assert pixels(adv).min() >= -1e-6 and pixels(adv).max() <= 1 + 1e-6
    info = ours(scaled(x), y, return_info=True)[1]
    assert torch.equal(info.success, normalised(ours(scaled(x), y)).argmax(1) != y)
    start = scaled((x + EPS / 2).clamp(0, 1))
    assert (pixels(attacks_start(normalised, scaled(x), y, start)) - x).abs().max() <= EPS + 1e-6
    with pytest.raises(InputError, match="normalize must be"):
        ours.set_normalization_used(MEAN, [0.1, 0.0, 0.1])
    with pytest.raises(InputError, match="must lie in bounds"):
        ours(3 * scaled(x), y)


def attacks_start(model, z, y, start):
    atk = attacks.PGD(model, EPS, ALPHA, 0)
    atk.set_normalization_used(MEAN, STD)
    return atk(z, y, start=start)


def test_normalised_inputs_in_numpy_and_16_bits(normalised):
    x, y = samples(8)
    atk = attacks.PGD(lambda z: normalised(z.float()), EPS, ALPHA, 3)
    atk.set_normalization_used(MEAN, STD)
    adv = atk(scaled(x).numpy(), y.numpy(), index=range(8))
    assert isinstance(adv, np.ndarray)
    np.testing.assert_array_equal(adv, atk(scaled(x), y, index=range(8)).numpy())
    for dtype in (torch.bfloat16, torch.float16):
        half = atk(scaled(x).to(dtype), y)
        assert half.dtype == dtype and (pixels(half.float()) - x).abs().max() < EPS + 0.03


MODES = {
    "label": lambda a: a.set_mode_targeted_by_label(quiet=True),
    "least likely": lambda a: a.set_mode_targeted_least_likely(quiet=True),
    "second least": lambda a: a.set_mode_targeted_least_likely(kth_min=2, quiet=True),
    "function": lambda a: a.set_mode_targeted_by_function(lambda x, y: (y + 2) % 5, quiet=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_targeted_modes_bit_for_bit(torchattacks, model, mode):
    x, y = samples(16)
    labels = (y + 1) % 5 if mode == "label" else y
    ours, theirs = both(torchattacks, model, MODES[mode])
    assert ours.get_mode() == theirs.get_mode() != "default"
    adv = ours(x, labels)
    assert torch.equal(adv, theirs(x, labels))
    ours.set_mode_default(), theirs.set_mode_default()
    assert ours.get_mode() == "default" and torch.equal(ours(x, y), theirs(x, y))
    assert not torch.equal(ours(x, y), adv)


def test_random_targets_are_never_the_label(model):
    x, y = samples(24)
    atk = attacks.PGD(model, 0.3, 0.03, 20)
    atk.set_mode_targeted_random(quiet=True)
    assert atk.get_mode() == "targeted(random)"
    adv, info = atk(x, y, return_info=True)
    predicted = copy.deepcopy(model).eval()(adv).argmax(1)
    assert torch.equal(info.success, predicted != y) and len(predicted.unique()) > 2


def test_modes_that_cannot_be(model, data):
    x, y = data
    for atk in (attacks.APGD(model), attacks.FeatureScatter(model), attacks.LocalSearch(model)):
        with pytest.raises(InputError, match="has no targeted mode"):
            atk.set_mode_targeted_by_label()
        atk.set_mode_default()
    with pytest.raises(InputError, match="named loss"):
        attacks.PGD(model, loss=lambda o, t: o.sum(1)).set_mode_targeted_random()
    atk = attacks.PGD(model, EPS, ALPHA, 1)
    for kth in (0, -1, "1", None, 1.5):
        with pytest.raises(InputError, match="kth_min must be"):
            atk.set_mode_targeted_least_likely(kth)
    atk.set_mode_targeted_least_likely(5)
    with pytest.raises(InputError, match="below the 5 classes"):
        atk(x, y)
    with pytest.raises(InputError, match="must be a function"):
        atk.set_mode_targeted_by_function([1, 2])
    for wrong in (lambda x, y: y[:3], lambda x, y: y + 9, lambda x, y: "no", lambda x, y: None, lambda x, y: y.float()):
        atk.set_mode_targeted_by_function(wrong)
        with pytest.raises(InputError, match=r"target function must return|labels from 0 to 4"):
            atk(x, y)
    atk.set_mode_targeted_by_label()
    for labels in ([1, 2], y[:3], y + 9, y[:, None], "1"):
        with pytest.raises(InputError, match="y must"):
            atk(x, labels)


@pytest.mark.parametrize("save_type", ["float", "int"])
def test_what_is_saved_is_what_torchattacks_saves(torchattacks, normalised, tmp_path, save_type, capsys):
    batches = [samples(8, seed=s) for s in (1, 2)]
    loader = [(scaled(x), y) for x, y in batches]
    ours, theirs = both(torchattacks, normalised, lambda a: a.set_normalization_used(mean=MEAN, std=STD))
    options = {"return_verbose": True, "save_predictions": True, "save_clean_inputs": True, "save_type": save_type}
    seen = ours.save(loader, str(tmp_path / "ours.pt"), **options)
    assert "Robust accuracy" in capsys.readouterr().out
    want = theirs.save(loader, str(tmp_path / "theirs.pt"), **options)
    assert seen[0] == pytest.approx(want[0]) and seen[1] == pytest.approx(want[1], rel=1e-3)
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("ours", "theirs"))
    assert one.keys() == other.keys() and one["save_type"] == save_type
    assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["preds"], other["preds"])
    for name in ("adv_inputs", "clean_inputs"):
        assert one[name].dtype == other[name].dtype
        far = (one[name].float() - other[name].float()).abs() > (1 if save_type == "int" else 1e-5)
        assert far.double().mean() < 0.01
    for written in ("ours.pt", "theirs.pt"):
        wanted = {"load_predictions": True, "load_clean_inputs": True, "normalize": {"mean": MEAN, "std": STD}}
        path = str(tmp_path / written)
        loaded, by_them = (kind.load(path, batch_size=16, **wanted) for kind in (ours, torchattacks.PGD))
        for a, b in zip(next(iter(loaded)), next(iter(by_them)), strict=True):
            torch.testing.assert_close(a, b)
    capsys.readouterr()
    assert ours.save(loader, verbose=False) is None and capsys.readouterr().out.count("Robust") == 0


def test_saving_is_refused_before_the_work(model, tmp_path):
    atk = attacks.PGD(lambda z: pytest.fail("asked"), EPS, ALPHA, 1)
    loader = [samples(4)]
    for path in (tmp_path, tmp_path / "none" / "adv.pt"):
        with pytest.raises(InputError, match="expected the name of a file"):
            atk.save(loader, path)
    with pytest.raises(InputError, match="save_type must be"):
        atk.save(loader, tmp_path / "adv.pt", save_type="uint8")
    with pytest.raises(InputError, match="at least one batch"):
        attacks.PGD(model, EPS, ALPHA, 1).save([], tmp_path / "adv.pt")
    assert not list(tmp_path.iterdir())
    torch.save({"adv_inputs": torch.zeros(1), "labels": torch.zeros(1)}, tmp_path / "few.pt")
    (tmp_path / "other.pt").write_text("text")
    for name, words in (("few.pt", "got no preds"), ("other.pt", "expected what save has written")):
        with pytest.raises(InputError, match=words):
            attacks.PGD.load(tmp_path / name, load_predictions=True)


def test_training_mode_under_attack(torchattacks, model):
    """Batch normalisation and dropout stay in evaluation mode unless asked for; all is put back."""
    noted = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop = copy.deepcopy(model), nn.Dropout(0.5)

        def forward(self, z):
            noted.append((self.training, self.body[1].training, self.drop.training))
            return self.body(self.drop(z))

    x, y = samples(8)
    net = Noting().eval()
    before = [v.clone() for v in net.state_dict().values()]
    for flags in ((False, False, False), (True, False, False), (True, True, False), (True, True, True)):
        atk = attacks.PGD(net, EPS, ALPHA, 2)
        atk.set_model_training_mode(*flags)
        noted.clear()
        atk(x, y)
        assert set(noted) == {flags}
        assert not net.training and not net.body[1].training and not net.drop.training
        assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_device_print_and_the_order_of_the_arguments(model, data):
    x, y = data
    atk = attacks.PGD(model, EPS, ALPHA, 4, False)
    assert not atk.random_start and torch.equal(atk(x, y), attacks.PGD(model, EPS, ALPHA, 4, random_start=False)(x, y))
    atk.set_device("cpu")
    assert atk(x, y).device.type == "cpu"
    for device in ("gpu", 3.5, None):
        with pytest.raises(InputError, match="device must be"):
            atk.set_device(device)
    for name, value in (("model", "Sequential"), ("eps", EPS), ("steps", 4), ("attack_mode", "default"),
                        ("normalization_used", False)):  # fmt: skip
        assert f"{name}={value}" in str(atk)
    for other in (attacks.APGD(model), attacks.CW(model), attacks.FeatureScatter(model), attacks.LocalSearch(model)):
        assert type(other).__name__ in repr(other) and "object at" not in repr(other)
    assert atk.supported_mode == ("default", "targeted") and atk.model is model


def test_what_is_loaded_is_checked(tmp_path):
    path = tmp_path / "adv.pt"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"adv_inputs": pickle.loads}))
    for name, words in (("fifo", "FIFO"), ("code.pt", "expected what save has written"), ("none.pt", "there is no")):
        with pytest.raises(InputError, match=words) as caught:
            attacks.PGD.load(tmp_path / name)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="load_path must be the path"):
        attacks.PGD.load(3)
    x, y = samples(2)
    for stored, words in (
        ({"adv_inputs": x, "labels": y[:1]}, "a row for each of 2 adv_inputs, got 1"),
        ({"adv_inputs": [1], "labels": [1]}, "adv_inputs must be a dense tensor .* got list"),
        ({"adv_inputs": x, "labels": torch.tensor(1)}, "labels must be a dense tensor"),
    ):
        torch.save(stored, path)
        with pytest.raises(InputError, match=words):
            attacks.PGD.load(path)
    torch.save({"adv_inputs": x, "labels": y}, path)
    for normalize in ({"mean": MEAN}, (MEAN, STD), 3):
        with pytest.raises(InputError, match=r'normalize must be \{"mean"'):
            attacks.PGD.load(path, normalize=normalize)
    with pytest.raises(InputError, match="each of 3 channels, got 4 and 1 values"):
        attacks.PGD.load(path, normalize={"mean": [0.5] * 4, "std": 0.2})
    ((loaded, labels),) = attacks.PGD.load(path, normalize={"mean": MEAN, "std": STD})
    torch.testing.assert_close(loaded, scaled(x))
    assert torch.equal(labels, y)


def test_batches_to_save_are_tensors_or_arrays(model, tmp_path):
    x, y = samples(8)
    atk = attacks.PGD(model, EPS, ALPHA, 2, random_start=False)
    for batches, words in (
        (3, "got int"),
        ([x], "got a Tensor"),
        ([(x, y, y)], "got a tuple of 3"),
        ([("a", y)], "x must"),
    ):
        with pytest.raises(InputError, match=words):
            atk.save(batches, tmp_path / "adv.pt", verbose=False)
    with pytest.raises(InputError, match="save_path must be the path"):
        atk.save([(x, y)], 3)
    atk.save([(x.numpy(), y.numpy()), [x, y]], tmp_path / "adv.pt", verbose=False)
    ((loaded, labels),) = atk.load(tmp_path / "adv.pt")
    assert torch.equal(loaded, torch.cat([atk(x, y)] * 2)) and torch.equal(labels, torch.cat([y, y]))


def test_normalisation_of_other_channels_is_refused_as_by_the_argument(model):
    x, y = samples(4)
    for mean, std in (([0.5] * 4, [0.2] * 4), ([0.5] * 3, [0.2] * 2)):
        atk = attacks.PGD(model, EPS, ALPHA, 1)
        atk.set_normalization_used(mean, std)
        for other in (atk, attacks.PGD(model, EPS, ALPHA, 1, normalize=(mean, std))):
            with pytest.raises(InputError, match="a value for each of 3 channels, got"):
                other(x, y)
