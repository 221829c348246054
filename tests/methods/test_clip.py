"""CLIP training on captions: heads on what frozen towers see, then the towers too; resumed, stored, reported."""

import json
from dataclasses import replace

import pytest
import tiny_towers
import torch
from torch.testing import assert_close

from cmr_fast.cli import main
from cmr_fast.data import load_captions
from cmr_fast.errors import InputError
from cmr_fast.methods import clip
from cmr_fast.methods.clip import Clip, ClipConfig
from cmr_fast.methods.evaluation import recalls
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.models.clip import TwoTowers

SMALL = ClipConfig(dim=16, hidden=16, epochs=4, head_epochs=2, batch_size=16, image_lr=1e-3, text_lr=1e-3, head_lr=1e-2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "cmr_fast"


@pytest.fixture(scope="module")
def data():
    return load_captions("shapes", count=60)


@pytest.fixture(scope="module")
def config(tmp_path_factory, data):
    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    return replace(SMALL, towers=tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels()))


def quiet(out, **settings):
    return RunConfig(out=out, quiet=True, checkpoint_seconds=0.0, **settings)


def test_training_brings_images_to_their_captions(data, config, tmp_path):
    longer = replace(config, epochs=25, head_epochs=24, captions=0, image_lr=1e-4, text_lr=1e-4)
    run = train("clip", longer, data, RunConfig(out=tmp_path / "run", quiet=True, valid_fraction=0.0))
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.5
    chance = 100 * sum(min(1, k / 12) for k in (1, 5, 10)) * 2
    train_scores = recalls(run.model, data.train.select(torch.arange(12)))
    assert train_scores.rsum > chance + 60
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["tr"]) == {"R@1", "R@5", "R@10", "median_rank", "mean_rank"} and 0 <= results["rsum"] <= 600
    loaded = load_model(tmp_path / "run")
    with torch.no_grad():
        for modality in ("image", "text"):
            assert_close(loaded.embed(modality, data.test), run.model.embed(modality, data.test), atol=1e-5, rtol=0)


def test_heads_alone_leave_the_towers_as_they_were(data, config, tmp_path):
    run = train("clip", replace(config, epochs=2, head_epochs=2), data, quiet(tmp_path / "run"))
    fresh = Clip(config)
    fresh.fit_inputs(data.train)
    for tower in ("image_tower", "text_tower"):
        now, before = (getattr(m.dual, tower).state_dict() for m in (run.model, fresh))
        assert all(torch.equal(now[name], before[name]) for name in before)
    longer = train("clip", config, data, quiet(tmp_path / "longer", valid_fraction=0.0))
    moved = longer.model.dual.text_tower.state_dict()
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    frozen = longer.model.dual.image_tower.network.conv_stem.weight
    assert torch.equal(frozen, fresh.dual.image_tower.network.conv_stem.weight)


def test_what_frozen_towers_see_is_what_they_give(data, config):
    torch.manual_seed(1)
    model = Clip(config)
    model.fit_inputs(data.train)
    model.eval()
    with torch.no_grad():
        through = {m: model.embed(m, data.test) for m in ("image", "text")}
        model.begin_round(data.train, 0.0)
        model.eval()
        for modality, expected in through.items():
            assert_close(model.embed(modality, data.test), expected, atol=2e-6, rtol=0)
        batch = data.train.select(torch.tensor([5, 2]))
        rows, chosen = model._drawn(batch.text)
        found = model._through_heads(model._train, batch, rows, chosen)[1][0]()
        texts = [batch.text[row][c] for row, c in zip(rows.tolist(), chosen.tolist(), strict=True)]
        assert_close(found, model.dual.encode_text(*model.dual.tokenize(texts)), atol=2e-6, rtol=0)


def test_features_are_kept_for_the_next_run_and_made_anew_for_other_weights(data, config, cache, monkeypatch):
    made = []

    def through(self, pixels, original=TwoTowers.image_features):
        made.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(TwoTowers, "image_features", through)
    for expected in ([48], [48]):
        model = Clip(config)
        model.fit_inputs(data.train)
        model.begin_round(data.train, 0.0)
        model.begin_round(data.train, 0.0)
        assert made == expected
    (file,) = cache.glob("towers-*.safetensors")
    file.write_bytes(b"damaged")
    model._seen.clear()
    model.begin_round(data.train, 0.0)
    assert made == [48, 48]
    with torch.no_grad():
        model.dual.image_tower.network.conv_stem.weight.add_(1)
    model._seen.clear()
    model.begin_round(data.train, 0.0)
    assert made == [48, 48, 48]


@pytest.mark.parametrize(("captions", "drawn"), [(1, [1, 1, 1]), (2, [1, 2, 2]), (0, [1, 3, 2])])
def test_captions_are_drawn_without_repeats(config, captions, drawn):
    model = Clip(replace(config, captions=captions))
    seen = set()
    for _ in range(30):
        rows, chosen = model._drawn([("a",), ("b", "c", "d"), ("e", "f")])
        assert torch.bincount(rows).tolist() == drawn
        pairs = list(zip(rows.tolist(), chosen.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        seen |= set(pairs)
    assert len(seen) == 6


def test_every_caption_of_an_image_is_its_positive(data, config):
    """The loss of a batch is the mean over both directions of -log of the softmax, positives sharing the target."""
    model = Clip(replace(config, captions=0, dropout=0.0))
    model.fit_inputs(data.train)
    model.begin_round(data.train, 0.0)
    batch = data.train.select(torch.tensor([0, 3, 7]))
    with torch.no_grad():
        rows, chosen = model._drawn(batch.text)
        image, text = (encode() for (encode,) in model._through_heads(model._train, batch, rows, chosen))
        z = model.dual.scale * image @ text.T
        match = (torch.arange(3)[:, None] == rows).float()
        of_images = -(match / match.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean()
        of_texts = -(match * z.log_softmax(0)).sum(0).mean()
    torch.manual_seed(0)
    logged = model.step(batch, model.optimizers(), lambda loss: loss.backward(), 0.0)
    assert_close(logged["loss"], (of_images + of_texts) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_other_precisions(data, config, tmp_path, precision, monkeypatch):
    inside = []

    def seen(pixels, crops, original=clip.augmented):
        inside.append(torch.is_autocast_enabled("cpu"))
        return original(pixels, crops)

    monkeypatch.setattr(clip, "augmented", seen)
    run = train("clip", replace(config, epochs=2, head_epochs=1), data, quiet(tmp_path / "run", precision=precision))
    assert all(row["loss"] > 0 for row in run.history) and run.results["rsum"] > 0
    assert set(inside) == {precision == "bf16-mixed"}  # of Fabric, which marks no method of a module on one device
    if precision == "64-true":
        plain = train("clip", replace(config, epochs=2, head_epochs=1), data, quiet(tmp_path / "plain"))
        assert run.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-3)


def test_train_and_validation_together(data, config, tmp_path):
    run = train("clip", replace(config, epochs=2, head_epochs=2), data, quiet(tmp_path / "run", refit=True))
    described = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert described["train"] == 48 and "valid" not in described and run.results["rsum"] > 0


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(data, config, tmp_path, monkeypatch, epoch):
    whole = train("clip", config, data, quiet(tmp_path / "whole"))
    original = Clip.begin_round

    def stop(self, split, progress):
        if round(progress * config.epochs) == epoch:
            raise KeyboardInterrupt
        original(self, split, progress)

    monkeypatch.setattr(Clip, "begin_round", stop)
    with pytest.raises(KeyboardInterrupt):
        train("clip", config, data, quiet(tmp_path / "run"))
    monkeypatch.setattr(Clip, "begin_round", original)
    again = train("clip", config, data, quiet(tmp_path / "run", resume=True))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_learning_rates_rise_and_fall_in_both_parts(config):
    model = Clip(replace(config, epochs=40, head_epochs=20))
    steps = [model._rates(step / 400) for step in range(400)]
    assert all(set(rates) == {"heads"} for rates in steps[:200])
    assert all(set(rates) == {"heads", "image", "text"} for rates in steps[200:])
    heads = [rates["heads"] for rates in steps]
    assert max(heads[:200]) == pytest.approx(config.head_lr) and heads[199] < 1e-3 * config.head_lr
    assert max(heads[200:]) == pytest.approx(config.joint_head_lr) and min(heads) > 0
    towers_alone = Clip(replace(config, head_epochs=0))
    assert set(towers_alone._rates(0.0)) == {"heads", "image", "text"}
    heads_alone = Clip(replace(config, epochs=2, head_epochs=9))
    assert set(heads_alone._rates(0.99)) == {"heads"}


def test_augmented_images_stay_in_range_and_differ():
    torch.manual_seed(0)
    pixels = torch.rand(6, 3, 24, 24)
    out = clip.augmented(pixels)
    assert out.shape == pixels.shape and out.min() >= 0 and out.max() <= 1
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(out, pixels, strict=True))
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert_close(clip.augmented(flat), flat)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dropout": 1.0}, "dropout must be"),
        ({"captions": -1}, "captions must be"),
        ({"image_lr": float("nan")}, "image_lr must be finite"),
        ({"towers": 3}, "towers must be a text"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(InputError, match=message):
        ClipConfig(**setting)


def test_a_model_of_open_clip_is_trained_stored_and_read_again(data, config, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    (tmp_path / "least.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "least.json")
    with pytest.raises(InputError, match="has no heads of its own, expected head_epochs 0"):
        Clip(replace(config, towers="open_clip/least"))
    settings = replace(config, towers="open_clip/least", head_epochs=0, epochs=1)
    run = train("clip", settings, data, quiet(tmp_path / "run"))
    loaded = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in run.model.state_dict().items())


def test_pairs_are_refused(config, tmp_path):
    from cmr_fast.data import load

    with pytest.raises(InputError, match="clip is trained on a CaptionedDataset, got a PairedDataset"):
        train("clip", config, load("shapes", count=80), quiet(tmp_path / "run"))


def test_the_commands(config, tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "report"
    flags = ["--towers", config.towers, "--epochs", "3", "--head-epochs", "2", "--batch-size", "16", "--dim", "8"]
    assert main(["train", "clip", "--data", "shapes", "--options", "count=60", *flags, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "TR R@1" in out and f"cmr-fast evaluate {run}" in out
    assert main(["evaluate", str(run), "--out", str(tmp_path / "scores.json")]) == 0
    stored, results = (json.loads(f.read_text()) for f in (tmp_path / "scores.json", run / "results.json"))
    assert stored == {name: results[name] for name in ("tr", "ir", "rsum")}
    assert main(["report", str(run), "--out", str(report)]) == 0
    for name in ("index.html", "README.md", "results.csv", "recall-at-k.png", "losses.png", "found.png"):
        assert (report / name).stat().st_size > 0
    assert f"{results['rsum']:.1f}" in (report / "README.md").read_text()
    for modality, rows in (("image", 12), ("text", 60)):
        file = tmp_path / f"{modality}.npy"
        assert main(["encode", str(run), "--modality", modality, "--out", str(file)]) == 0
        assert f"float32 ({rows}, 8)" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--k", "5"]) == 2
    assert "is for mAP" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_parts_have_the_whole_batchs_loss_and_gradient(data, config, chunk):
    found = []
    for part in (0, chunk):
        torch.manual_seed(0)
        model = Clip(replace(config, epochs=1, head_epochs=0, dropout=0.0, chunk=part, captions=2))
        model.fit_inputs(data.train)
        model.double().eval()
        torch.manual_seed(1)
        logged = model.step(data.train.select(torch.arange(11)), model.optimizers(), lambda x: x.backward(), 0.5)
        found.append((logged["loss"], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, whole), (again, parts) = found
    assert_close(again, loss, atol=1e-12, rtol=0)
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name, gradient in whole.items():
        assert_close(parts[name], gradient, atol=1e-10, rtol=1e-8, msg=name)
