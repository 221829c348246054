import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmr_fast.cli import main
from cmr_fast.data import ImageDataset, Images, load_images
from cmr_fast.errors import InputError
from cmr_fast.methods import checkpoint
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.scatter import Features, Scatter, ScatterConfig, WideResNet, accuracy, augmented

TINY = replace(Scatter.presets["small"], epochs=2, batch_size=32, valid_images=8, valid_steps=2)


@pytest.fixture(scope="module")
def data():
    return load_images("shapes", train=80, test=20)


def run(out, **changes):
    return RunConfig(out=out, **({"device": "cpu", "threads": 1, "quiet": True, "checkpoint_seconds": 0} | changes))


def stepped(config, batch, seed=0):
    """One step of a fresh network; returns it, its log, and the perturbed images of that step."""
    torch.manual_seed(seed)
    model = Scatter(config, 8)
    model.train()
    optimizers = model.optimizers()
    seen = []
    make = model.perturbation

    def recorded():
        attack = make()
        return None if attack is None else lambda x, y: seen.append((x, attack(x, y))) or seen[-1][1]

    model.perturbation = recorded
    logged = model.step(batch, optimizers, lambda loss: loss.backward(), 0.0)
    return model, logged, seen


def test_wrn_28_10_is_the_papers_network():
    net = WideResNet(28, 10, 10)
    assert sum(p.numel() for p in net.parameters()) == 36_479_194  # Zagoruyko and Komodakis 2016: 36.5M
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 28  # 25 of 3 x 3 and three shortcuts
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, 10) and torch.allclose(net.eval().head(net.features(x)), net(x))


def test_smoothed_labels_are_the_papers(data):
    batch = data.train.select(torch.arange(16))
    config = replace(TINY, perturb="none", augment=False, smoothing=0.5)
    torch.manual_seed(3)
    model = Scatter(config, 8).train()
    target = torch.full((16, 8), 0.5 / 7).scatter(1, batch.labels[:, None], 0.5)
    expected = -(target * F.log_softmax(model(batch.pixels()), dim=1)).sum(1).mean()
    _, logged, _ = stepped(config, batch, seed=3)
    assert torch.allclose(logged["loss"], expected, atol=1e-5)


@pytest.mark.parametrize("perturb", ["scatter", "madry", "random_targeted", "none"])
def test_each_perturbation_stays_in_its_ball_and_only_its_images_are_trained_on(data, perturb):
    batch = data.train.select(torch.arange(24))
    config = replace(TINY, perturb=perturb, steps=2, alpha=4 / 255)
    model, logged, seen = stepped(config, batch)
    assert model.training and all(torch.isfinite(v) for v in logged.values())
    if perturb == "none":
        assert not seen
        return
    clean, moved = seen[0]
    assert 0 < (moved - clean).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1


def test_perturbation_sees_the_network_in_evaluation_mode_and_leaves_its_statistics(data):
    batch = data.train.select(torch.arange(24))
    torch.manual_seed(0)
    model = Scatter(TINY, 8).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.perturbation()(batch.pixels(), batch.labels)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training


def test_the_presets_are_the_authors_step_and_say_where_they_depart():
    """Gradient through the solver, batch 60, smoothing 0.5; SVHN without augmentation; identity by name."""
    for name, config in {"paper": ScatterConfig(), **Scatter.presets}.items():
        assert (config.ot_grad, config.batch_size) == ("unrolled", 60), name
        assert (config.depth, config.epochs) == ((10, 30) if name.startswith("small") else (28, 200)), name
        assert config.augment == (name != "svhn") and (config.ot_solver == "identity") == ("identity" in name), name
    torch.manual_seed(0)
    attack = Scatter(replace(Scatter.presets["small-identity"]), 8).perturbation()
    assert (attack.solver, attack.ot_grad) == ("identity", "unrolled")


@pytest.mark.parametrize("method", ["scatter", "madry", "plain"])
def test_the_command_trains_as_the_authors_on_all_images_and_keeps_the_last_weights(method, tmp_path):
    out = tmp_path / "run"
    command = ["train", method, "--preset", "small", "--options", "train=40", "test=16", "--epochs", "3"]
    assert main([*command, "--threads", "1", "--quiet", "--out", str(out)]) == 0
    settings = json.loads((out / "config.json").read_text())
    assert (settings["run"]["valid_fraction"], settings["run"]["patience"]) == (0.0, 0)
    results = json.loads((out / "results.json").read_text())
    assert results["best_epoch"] == results["epochs"] == 3 and results["method"] == method
    assert "valid_accuracy" not in (out / "metrics.csv").read_text().splitlines()[0]
    chosen = tmp_path / "chosen"
    more = ["--valid-fraction", "0.2", "--patience", "1", "--quiet", "--out", str(chosen)]
    assert main([*command, *more]) == 0
    assert "valid_accuracy" in (chosen / "metrics.csv").read_text().splitlines()[0]


def test_features_are_scattered_on_request(data):
    batch = data.train.select(torch.arange(12))
    torch.manual_seed(0)
    model = Scatter(replace(TINY, scatter_on="features"), 8)
    attack = model.perturbation()
    assert isinstance(attack.model, Features)
    assert attack.model(batch.pixels()).shape == (12, 64)
    assert attack(batch.pixels()).shape == (12, 3, 32, 32)


@pytest.mark.parametrize("perturb", ["scatter", "random_targeted"])
def test_a_run_that_was_killed_ends_with_the_same_weights(data, tmp_path, perturb):
    config = replace(TINY, perturb=perturb, epochs=3)
    whole = train("scatter", config, data, run(tmp_path / "whole"))

    class Killed(Exception):
        pass

    step, calls = Scatter.step, []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == 5:  # in the second epoch
            raise Killed
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scatter, "step", dying)
        with pytest.raises(Killed):
            train("scatter", config, data, run(tmp_path / "killed"))
    again = train("scatter", config, data, run(tmp_path / "killed", resume=True))
    a, b = (checkpoint.load(r.path / "model.safetensors", "model")[0] for r in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert {k: v for k, v in whole.results.items() if k != "train_seconds"} == {
        k: v for k, v in again.results.items() if k != "train_seconds"
    }


def tinted(count, seed):
    """Three classes told by their mean colour."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    image = torch.randint(0, 200, (count, 3, 16, 16), generator=random)
    image[torch.arange(count), labels] += 55
    return Images(image.to(torch.uint8), labels)


def test_a_run_learns_and_its_model_comes_back(tmp_path):
    data = ImageDataset("tinted", tinted(200, 0), tinted(60, 1))
    config = replace(TINY, perturb="none", smoothing=0.0, epochs=5, augment=False, batch_size=20)
    done = train("scatter", config, data, run(tmp_path / "run", patience=0))
    assert done.results["accuracy"] > 0.9 and done.results["valid_accuracy"] > 0.8
    assert done.results["pgd20_accuracy"] < done.results["accuracy"] - 0.1 and done.results["pgd20_images"] == 60
    model = load_model(done.path)
    assert isinstance(model, Scatter) and model.config == config and not model.training
    assert accuracy(model, data.test) == done.results["accuracy"]
    assert json.loads((done.path / "results.json").read_text()) == done.results


def test_augmented_crops_and_flips():
    x = torch.arange(2 * 3 * 6 * 5.0).reshape(2, 3, 6, 5) + 1
    torch.manual_seed(0)
    many = torch.cat([augmented(x, flip=True, pad=1) for _ in range(200)])
    padded = F.pad(x, (1, 1, 1, 1))
    crops = [padded[s, :, i : i + 6, j : j + 5] for s in range(2) for i in range(3) for j in range(3)]
    crops += [crop.flip(2) for crop in crops]
    found = {next(n for n, crop in enumerate(crops) if torch.equal(crop, one)) for one in many}
    assert found == set(range(36))
    unflipped = torch.cat([augmented(x, flip=False, pad=1) for _ in range(50)])
    assert all(any(torch.equal(crop, one) for crop in crops[:18]) for one in unflipped)


def test_learning_rate_schedules(data):
    batch = data.train.select(torch.arange(8))
    for config, points in (
        (ScatterConfig(), {0.0: 0.1, 59.9 / 200: 0.1, 60 / 200: 0.01, 90 / 200: 0.001, 0.99: 0.001}),
        (replace(TINY, lr=0.1), {0.05: 0.05, 0.1: 0.1, 0.55: 0.05, 1.0: 0.0}),
    ):
        model = Scatter(replace(config, depth=10, width=1, perturb="none"), 8)
        optimizers = model.optimizers()
        for progress, rate in points.items():
            model.step(batch, optimizers, lambda loss: loss.backward(), progress)
            assert optimizers["net"].param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 11}, "depth must be"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"steps": 0}, "steps must be"),
        ({"eps": -0.1}, "eps and alpha are of pixels"),
        ({"ot_group": -1}, "ot_group must be"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(InputError, match=message):
        replace(ScatterConfig(), **changes)


def test_refuses_pairs_and_too_much_smoothing(data, tmp_path):
    from small import small_dataset

    with pytest.raises(InputError, match="trained on a ImageDataset"):
        train("scatter", TINY, small_dataset(), run(tmp_path / "a"))
    with pytest.raises(InputError, match="trained on a PairedDataset"):
        train("acmr", None, data, run(tmp_path / "b"))
    with pytest.raises(InputError, match=r"at most 0.5 for 2 classes"):
        Scatter(replace(TINY, smoothing=0.6), 2)
