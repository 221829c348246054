"""Training on shards that are streamed: their order, resumed at the sample, broken pairs, what is held, refusals."""

import csv
import json
from dataclasses import replace
from weakref import WeakSet

import pytest
import tiny_towers
import torch
from pair_shards import write_shards

from cmr_fast.cli import main
from cmr_fast.data import load_captions, stream, stream_captions, streamed
from cmr_fast.data.streams import Stream
from cmr_fast.errors import InputError
from cmr_fast.methods._ranks import Ranks
from cmr_fast.methods.acmr import ACMRConfig
from cmr_fast.methods.clip import Clip, ClipConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.mat import Finetune, FinetuneConfig

COUNTS = (13, 20, 0, 15)
TOTAL = sum(COUNTS)
SIZE, BUFFER = 32, 16


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pairs():
    return load_captions("shapes", count=60)


@pytest.fixture(scope="module")
def towers(tmp_path_factory, pairs):
    words = sorted({w for row in pairs.train.text for caption in row for w in caption.lower().split()})
    return tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, pairs.train.pixels())


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pairs):
    return write_shards(tmp_path_factory.mktemp("pairs") / "shards", pairs.train, COUNTS)


@pytest.fixture(scope="module")
def held(tmp_path_factory, pairs):
    return write_shards(tmp_path_factory.mktemp("pairs") / "held", pairs.test, (7, 5))


@pytest.fixture
def config(towers):
    return ClipConfig(
        towers=towers, dim=8, hidden=8, epochs=4, head_epochs=2, batch_size=14, head_lr=1e-2, image_lr=1e-3,
        text_lr=1e-3, captions=2,
    )  # fmt: skip


def made(path, held, **options):
    return stream_captions(path, **{"test": held, "size": SIZE, "buffer": BUFFER, **options})


def settings(out, **changes):
    defaults = {"checkpoint_seconds": 0.0, "valid_fraction": 0.0, "round_steps": 3, "device": "cpu", "quiet": True}
    return RunConfig(out=out, **(defaults | changes))


def batches_of(split, steps, per_pass=4, size=14, seed=3):
    return list(split.batches(steps, per_pass, size, seed, []))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_batches_are_the_streams_stretches_wherever_a_round_begins(kind, pairs, held, tmp_path):
    """48 pairs, 14 at a time: four steps a pass, and a pass may end within a round."""
    folder = write_shards(tmp_path / "shards", pairs.train, COUNTS, kind)
    split = made(folder, held).train
    assert len(split) == TOTAL
    expected = []
    reader = stream(folder, batch=14, size=SIZE, buffer=BUFFER, seed=3)
    for number in range(2):
        reader.set_epoch(number)
        expected += list(reader)
    for first in range(8):
        seen = batches_of(split, range(first, 8))
        assert [step for step, _ in seen] == list(range(first, 8))
        for step, batch in seen:
            assert torch.equal(batch.image.pixels(), expected[step].image)
            assert batch.text == expected[step].text
            assert batch.rows.tolist() == list(range(step % 4 * 14, min(TOTAL, (step % 4 + 1) * 14)))
            for row, label in enumerate(batch.labels.tolist()):  # the number of the pair in all files
                assert torch.equal(batch.image.pixels()[row], pairs.train.image[label])


def test_a_rank_decodes_its_own_photos_alone(shards, held, monkeypatch):
    decoded = []
    decode = streamed._decoded
    monkeypatch.setattr(streamed, "_decoded", lambda size, sample: decoded.append(sample.name) or decode(size, sample))
    split = made(shards, held).train
    whole = batches_of(split, range(4))
    decoded.clear()
    for rank in range(2):
        share = streamed.Share(lambda count, rank=rank: Ranks(rank, 2).own(count), list)
        mine = list(split.batches(range(4), 4, 14, 3, [], share))
        assert len(decoded) == len(set(decoded)) == sum(Ranks(0, 2).counts(n)[0] for n in (14, 14, 14, 6)) == 24
        assert [batch.text for _, batch in mine] == [batch.text for _, batch in whole]
        decoded.clear()


def test_a_dual_encoder_is_trained_on_a_stream(shards, held, config, tmp_path):
    long = replace(config, epochs=12, head_epochs=11, captions=0, image_lr=1e-4, text_lr=1e-4)
    run = train(
        "clip", long, made(shards, held, valid=held), settings(tmp_path / "run", round_steps=0, checkpoint_seconds=9)
    )
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.5
    assert [row["samples"] for row in run.history] == [TOTAL * (1 + epoch) for epoch in range(12)]
    assert {"valid_rsum", "skipped"} <= run.history[0].keys() and run.results["skipped"] == 0
    assert run.results["rsum"] == pytest.approx(max(row["valid_rsum"] for row in run.history)), "of the same shards"


def test_heads_alone_see_what_the_frozen_towers_say(shards, held, config, tmp_path):
    """A step on a streamed batch is the step on the same pairs held."""
    split = made(shards, held).train
    ((_, batch),) = batches_of(split, range(1))
    losses, kept = [], []
    for by_stream in (True, False):
        torch.manual_seed(0)
        model = Clip(replace(config, dropout=0.0, captions=0))
        model.fit_inputs(None)
        whole = replace(batch, image=batch.image.pixels(), rows=None)
        model.begin_round(split if by_stream else whole, 0.0)
        taken = batch if by_stream else whole.select(torch.arange(len(whole)))
        losses.append(model.step(taken, model.optimizers(), lambda loss: loss.backward(), 0.0)["loss"])
        kept.append(model.dual.state_dict())
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    fresh = Clip(config)
    fresh.fit_inputs(None)
    for name, value in fresh.dual.state_dict().items():
        if "tower" in name:
            assert torch.equal(kept[0][name], value), name
        else:
            torch.testing.assert_close(kept[0][name], kept[1][name], atol=2e-3, rtol=0, msg=name)


class Killed(BaseException):
    """Stands for a kill within a round."""


@pytest.mark.parametrize(("method", "at"), [("clip", 2), ("clip", 5), ("clip", 13), ("finetune", 5)])
def test_a_run_killed_within_a_pass_ends_with_the_same_bits(method, at, shards, held, config, tmp_path, monkeypatch):
    """Rounds of three steps, passes of four; clip trains its towers from step 8 on."""
    kind = Clip if method == "clip" else Finetune
    if method == "finetune":
        config = FinetuneConfig(towers=config.towers, dim=8, hidden=8, max_steps=16, batch_size=14, lr=1e-2)
    whole = train(method, config, made(shards, held), settings(tmp_path / "whole"))
    step, steps = kind.step, []

    def dies(self, *arguments):
        if len(steps) == at:
            raise Killed
        steps.append(at)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", dies)
        with pytest.raises(Killed):
            train(method, config, made(shards, held), settings(tmp_path / "killed"))
    assert (tmp_path / "killed" / "checkpoint.safetensors").exists() == (at >= 3)
    again = train(method, config, made(shards, held), settings(tmp_path / "killed", resume=True))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in again.history]
    assert rows == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.history]
    assert rows[-1]["samples"] == 4 * TOTAL
    before = kind(config)
    before.fit_inputs(None)
    tower = before.dual.text_tower.state_dict()
    assert any(not torch.equal(value, expected[f"dual.text_tower.{name}"]) for name, value in tower.items())


def test_a_resumed_run_needs_the_same_shards_and_order(pairs, shards, held, config, tmp_path):
    short = replace(config, epochs=1, head_epochs=1)
    train("clip", short, made(shards, held), settings(tmp_path / "run"))
    for data in (made(shards, held, buffer=5), made([shards / "0.tar", shards / "1.tar"], held)):
        with pytest.raises(InputError, match="cannot be resumed, data"):
            train("clip", short, data, settings(tmp_path / "run", resume=True))


def test_broken_pairs_are_named_or_left_out_and_counted(pairs, held, config, tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", pairs.train, COUNTS, broken=(1, 7, 40))
    short = replace(config, epochs=2, head_epochs=2)
    with pytest.raises(InputError, match=r"\.tar: 00\d\d: not a photo that Pillow can read"):
        train("clip", short, made(folder, held), settings(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    data = made(folder, held, broken="skip")
    run = train("clip", short, data, settings(tmp_path / "run", round_steps=4, quiet=False))
    assert [row["skipped"] for row in run.history] == [3, 3] and run.results["skipped"] == 6
    assert "epoch 1: left out " in capsys.readouterr().err
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [(row["samples"], row["skipped"]) for row in csv.DictReader(file)] == [("48", "3"), ("96", "3")]
    seen = [batch for _, batch in batches_of(data.train, range(4))]
    assert sorted(torch.cat([batch.labels for batch in seen]).tolist()) == sorted({*range(TOTAL)} - {1, 7, 40})
    whole = write_shards(tmp_path / "all broken", pairs.train, (4,), broken=range(4))
    with pytest.raises(InputError, match="no batch with two whole pairs, 4 were left out"):
        train("clip", short, made(whole, held, broken="skip"), settings(tmp_path / "nothing", round_steps=0))


def test_a_round_of_which_nothing_is_whole_is_logged_and_the_training_goes_on(pairs, held, config, tmp_path):
    folder = write_shards(tmp_path / "shards", pairs.train, (16,), broken=range(5))
    run = train("clip", config, made(folder, held, broken="skip"), settings(tmp_path / "run", round_steps=1))
    assert [row["samples"] for row in run.history] == [14, 16, 30, 32, 46, 48, 62, 64]
    assert run.results["skipped"] == 4 * 5
    empty = [number for number, row in enumerate(run.history) if "loss" not in row]
    assert empty and all(number % 2 for number in empty), "the last two of a pass alone can be too few"
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [number for number, row in enumerate(csv.DictReader(file)) if row["loss"] == ""] == empty


def test_nothing_is_held_but_a_window_and_a_few_batches(pairs, held, tmp_path, monkeypatch):
    """Not the photos, not the names of files that are done with; 48 pairs in 24 files, windows of 6, 2 at a time."""
    folder = write_shards(tmp_path / "shards", pairs.train, (2,) * 24)
    split = made(folder, held, buffer=6).train
    assert len(split) == TOTAL
    windows, listed, alive, batches = [], [], [], WeakSet()
    read = Stream._read

    def noted(self, shards, *arguments, **options):
        samples = read(self, shards, *arguments, **options)
        windows.append(len(samples))
        assert not any(isinstance(sample.image, bytes) for sample in samples), "photos are read when they are decoded"
        return samples

    def remembered(self, *arguments):
        begin(self, *arguments)
        batches.add(self)

    begin = streamed._Batch.__init__
    monkeypatch.setattr(streamed._Batch, "__init__", remembered)
    monkeypatch.setattr(Stream, "_read", noted)
    for _ in split.batches(range(24), 24, 2, 0, []):
        listed.append(sum(shard._samples is not None for shard in split._shards))
        alive.append(len(batches))
    assert windows == [6] * 8
    assert max(listed) <= 3 and 1 <= max(alive) <= 4


def test_a_shard_that_changes_while_it_is_read_is_named(pairs, held, tmp_path):
    split = made(write_shards(tmp_path / "shards", pairs.train, (8, 8)), held).train
    assert len(split) == 16
    write_shards(tmp_path / "shards", pairs.train, (9, 8))
    with pytest.raises(InputError, match=r"0\.tar: had 8 pairs when it was first listed and has 9 now"):
        batches_of(split, range(2), per_pass=2, size=8)


def test_bad_input_is_one_error_before_anything_is_written(pairs, shards, held, config, tmp_path):
    out = tmp_path / "run"
    for path, options, message in (
        (tmp_path / "none-*.tar", {}, "no file matches, expected .tar or .parquet files"),
        (shards, {"test": shards}, "is trained on and among the test shards"),
        (shards, {"valid": shards / "1.tar"}, "is trained on and among the valid shards"),
        (shards, {"valid": "shapes"}, "shapes: has no validation split"),
        (shards, {"test": str(tmp_path / "nothing")}, "no data at"),
        (shards, {"text": "cap.txt"}, "has no text; expected one of .cap.txt"),
        (shards, {"broken": "no"}, "broken must be refuse or skip"),
        ([], {}, "expected .tar or .parquet files, of one kind, got none"),
    ):
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            made(path, **{"held": held, **options})
    data = made(shards, held)
    for changes, message in (
        ({"valid_fraction": 0.1}, "nothing is held out of a stream for validation; expected valid=PATH"),
        ({"refit": True}, "a stream takes no validation pairs in"),
    ):
        with pytest.raises(InputError, match=message):
            train("clip", config, data, settings(out, **changes))
    with pytest.raises(InputError, match="acmr is trained on a PairedDataset, got a StreamedDataset"):
        train("acmr", ACMRConfig(), data, settings(out))
    more = FinetuneConfig(towers=config.towers, max_steps=4, augment_text="eda")
    with pytest.raises(InputError, match="augmented pairs are of images that are held"):
        train("finetune", more, data, settings(out))
    assert not out.exists()


def test_columns_of_parquet_that_are_no_photos_and_captions_are_named(pairs, held, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"image": [[1.0]] * 4, "words": ["a"] * 4}), tmp_path / "0.parquet")
    with pytest.raises(InputError, match=r"no column for text; expected caption or .* it has image, words"):
        made(tmp_path, held)
    with pytest.raises(InputError, match=r"row \d is float64 \(1,\) and captions; expected a photo and captions"):
        made(tmp_path, held, text="words")


def test_the_command_trains_on_shards_and_later_ones_find_what_was_held(shards, held, towers, tmp_path, capsys):
    run = tmp_path / "run"
    data = ["--data", str(shards / "*.tar"), "--options", f"size={SIZE}", f"buffer={BUFFER}"]
    flags = {"towers": towers, "dim": 8, "hidden": 8, "epochs": 2, "head-epochs": 1, "batch-size": 14, "out": run}
    more = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    refusals = (
        ([], "need --test DATA"),
        (["--test", str(held)], "nothing is held out of a stream for validation"),
        (["--valid", str(held)], "--valid is for a stream, which has --test too"),
    )
    for given, message in refusals:
        assert main(["train", "clip", *data, *more, *given]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "acmr", "--test", str(held)]) == 2
    assert "--test is for methods on images with captions" in capsys.readouterr().err
    assert not run.exists()
    assert main(["train", "clip", *data, *more, "--test", str(held), "--valid", str(held)]) == 0
    shown = capsys.readouterr()
    assert "clip on shards: epoch 2/2  samples 96  loss" in shown.err and "TR R@1" in shown.out
    assert json.loads((run / "config.json").read_text())["data"]["train"] == TOTAL
    assert main(["evaluate", str(run)]) == 0
    assert f"{json.loads((run / 'results.json').read_text())['rsum']:.1f}" in capsys.readouterr().out
    assert main(["encode", str(run), "--modality", "image", "--out", str(tmp_path / "x.npy")]) == 0
    assert "float32 (12, 8)" in capsys.readouterr().out
    assert main(["encode", str(run), "--modality", "image", "--split", "train", "--out", str(tmp_path / "y.npy")]) == 2
    assert "the train split is a stream" in capsys.readouterr().err
    assert load_model(run).config.epochs == 2
