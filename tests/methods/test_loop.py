import csv
import json
import math
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from small import ACMR_SMALL, KILLED_EPOCHS, small_dataset, train_small

from cmr_fast.errors import DivergedError, InputError
from cmr_fast.methods import METHODS, checkpoint
from cmr_fast.methods.acmr import ACMR
from cmr_fast.methods.grid import grid_search
from cmr_fast.methods.loop import Retriever, RunConfig, encode_all, evaluate_model, load_model, save_model, train


def quick(out, **changes):
    settings = {"device": "cpu", "valid_fraction": 0.3, "threads": 1, "quiet": True, "checkpoint_seconds": 0}
    return RunConfig(out=out, **(settings | changes))


def weights(path):
    return checkpoint.load(path, "model")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    return train("acmr", ACMR_SMALL, small_dataset(), quick(folder))


def test_a_run_writes_everything_it_promises(finished):
    folder = finished.path
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.csv", "tensorboard", "checkpoint.safetensors", "model.safetensors", "results.json"
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == finished.results
    assert [int(row["epoch"]) for row in rows(folder)] == list(range(1, finished.results["epochs"] + 1))
    assert any((folder / "tensorboard").iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "acmr" and config["config"]["dim"] == 6 and config["data"]["train"] < 45


def test_the_best_epoch_by_validation_is_kept_and_evaluated(finished):
    scores = [row["valid_map"] for row in finished.history]
    best = max(range(len(scores)), key=scores.__getitem__)
    assert finished.results["best_epoch"] == best + 1
    assert finished.results["valid_map"] == scores[best]
    again = load_model(finished.path)
    data = small_dataset()
    found = evaluate_model(again, data)
    assert found["i2t"].map == finished.results["all"]["i2t"]
    assert found["t2i"].map == finished.results["all"]["t2i"]
    hits = evaluate_model(again, data, k=50, convention="topk_hits")
    assert hits["i2t"].map == finished.results["topk_hits@50"]["i2t"]


def test_the_trained_model_beats_an_untrained_one(finished):
    data = small_dataset()
    torch.manual_seed(0)
    untrained = evaluate_model(ACMR(ACMR_SMALL, 7, 5, 3).eval(), data)
    assert finished.results["all"]["average"] > 0.1 + (untrained["i2t"].map + untrained["t2i"].map) / 2


def test_encode_all_is_eval_mode_and_restores_training_mode(finished):
    model = load_model(finished.path).train()
    data = small_dataset().query
    once, twice = (encode_all(model, "image", data.image) for _ in range(2))
    assert torch.equal(once, twice) and model.training and once.shape == (45, 6)


def test_validation_is_cut_from_train_and_never_touches_test(tmp_path):
    data = small_dataset()
    seen = []

    class Watching(ACMR):
        def fit_inputs(self, train):
            seen.append(len(train))
            super().fit_inputs(train)

    train(Watching, replace(ACMR_SMALL, epochs=1), data, quick(tmp_path / "a", valid_fraction=0.3))
    train(Watching, replace(ACMR_SMALL, epochs=1), data, quick(tmp_path / "b", valid_fraction=0))
    assert seen[0] < seen[1] == 45


def test_early_stop_waits_for_patience(tmp_path):
    class Still(ACMR):
        def step(self, batch, optimizers, backward, progress):
            return {"loss": torch.tensor(1.0)}

    run = train(Still, ACMR_SMALL, small_dataset(), quick(tmp_path / "r", patience=3))
    assert (run.results["best_epoch"], run.results["epochs"]) == (1, 4)
    run = train(Still, ACMR_SMALL, small_dataset(), quick(tmp_path / "s", patience=0))
    assert run.results["epochs"] == ACMR_SMALL.epochs


def test_eval_every_leaves_other_epochs_without_scores(tmp_path):
    run = train("acmr", replace(ACMR_SMALL, epochs=5), small_dataset(), quick(tmp_path / "r", eval_every=2))
    assert [math.isnan(row["valid_map"]) for row in run.history] == [True, False, True, False, False]


def test_without_validation_the_last_weights_are_kept(tmp_path):
    run = train("acmr", replace(ACMR_SMALL, epochs=3), small_dataset(), quick(tmp_path / "r", valid_fraction=0))
    assert run.results["best_epoch"] == 3 and run.results["valid_map"] is None
    last = checkpoint.load(run.path / "checkpoint.safetensors", "checkpoint")[0]
    kept = weights(run.path / "model.safetensors")
    assert all(torch.equal(value, last[f"model.{name}"]) for name, value in kept.items())


def test_refit_trains_on_everything_for_the_epochs_that_validation_chose(tmp_path):
    data = small_dataset()
    run = train("acmr", ACMR_SMALL, data, quick(tmp_path / "run", refit=True))
    selection = json.loads((tmp_path / "run" / "selection" / "results.json").read_text())
    assert run.results["epochs"] == selection["best_epoch"] < ACMR_SMALL.epochs
    plain = train(
        "acmr", replace(ACMR_SMALL, epochs=selection["best_epoch"]), data, quick(tmp_path / "plain", valid_fraction=0)
    )
    assert same(run.model.state_dict(), plain.model.state_dict())
    again = train("acmr", ACMR_SMALL, data, quick(tmp_path / "run", refit=True, resume=True))
    assert same(run.model.state_dict(), again.model.state_dict())
    with pytest.raises(InputError, match="overwritten"):
        train("acmr", ACMR_SMALL, data, quick(tmp_path / "run", refit=True))
    held = data.hold_out(0.3, 0)
    run = train("acmr", ACMR_SMALL, held, quick(tmp_path / "held", refit=True))
    assert json.loads((run.path / "config.json").read_text())["data"]["train"] == 45
    with pytest.raises(InputError, match="refit needs a validation split"):
        train("acmr", ACMR_SMALL, data, quick(tmp_path / "none", refit=True, valid_fraction=0))


def test_same_seed_same_weights_other_seed_other_weights(finished, tmp_path):
    again = train("acmr", ACMR_SMALL, small_dataset(), quick(tmp_path / "again"))
    other = train("acmr", ACMR_SMALL, small_dataset(), quick(tmp_path / "other", seed=1))
    assert same(finished.model.state_dict(), again.model.state_dict())
    assert not same(finished.model.state_dict(), other.model.state_dict())


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path):
    torch.manual_seed(7)
    want, threads = torch.randn(3), torch.get_num_threads()
    torch.manual_seed(7)
    train("acmr", replace(ACMR_SMALL, epochs=1), small_dataset(), quick(tmp_path / "r"))
    assert torch.equal(torch.randn(3), want) and torch.get_num_threads() == threads


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(tmp_path):
    """SIGKILL at random moments, resume, and again; the last attempt is left alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lightning.fabric", "torch.utils.tensorboard", "cmr_fast.retrieval.metrics", "small"]
    )

    def attempt(name, kill_after=None):
        process = context.Process(target=train_small, args=(str(tmp_path / name), True))
        started = time.monotonic()
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        return process.exitcode, time.monotonic() - started

    attempt("warm")
    code, length = attempt("whole")
    assert code == 0
    moments, reached = random.Random(), []
    for _ in range(6):
        attempt("run", moments.uniform(0.05, 0.45) * length)
        if (tmp_path / "run" / "checkpoint.safetensors").exists():
            state = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors", "checkpoint")[1]["state"]
            reached.append(state["epoch"])
    assert attempt("run")[0] == 0
    assert any(0 < epoch < KILLED_EPOCHS for epoch in reached), reached
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert same(weights(run / "model.safetensors"), weights(whole / "model.safetensors"))
    last = [checkpoint.load(folder / "checkpoint.safetensors", "checkpoint")[0] for folder in (run, whole)]
    assert same(*last)
    assert rows(run) == rows(whole) and len(rows(run)) == KILLED_EPOCHS
    results = [json.loads((folder / "results.json").read_text()) | {"train_seconds": 0} for folder in (run, whole)]
    assert results[0] == results[1]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


class Stop(Exception):
    """Stands for a kill between two epochs."""


def stopped_after(folder, epoch):
    """A run folder as a kill after `epoch` would leave it, with a later row already in metrics.csv."""

    class Stopping(ACMR):
        def step(self, batch, optimizers, backward, progress):
            if progress * self.config.epochs > epoch + 0.5:
                raise Stop
            return super().step(batch, optimizers, backward, progress)

    with pytest.raises(Stop):
        train(Stopping, ACMR_SMALL, small_dataset(), quick(folder))
    return folder


def test_resume_cuts_metrics_back_to_the_checkpoint(finished, tmp_path):
    folder = stopped_after(tmp_path / "run", 4)
    with open(folder / "metrics.csv", "a") as file:
        file.write("5,0.1,0.2\n6,0.")
    train("acmr", ACMR_SMALL, small_dataset(), quick(folder, resume=True))
    assert rows(folder) == rows(finished.path)


def test_resume_of_a_finished_run_only_evaluates_again(finished, tmp_path):
    folder = shutil.copytree(finished.path, tmp_path / "run")
    again = train("acmr", ACMR_SMALL, small_dataset(), quick(folder, resume=True))
    assert again.results == finished.results and again.history == finished.history


def test_resume_starts_afresh_where_nothing_was_saved_yet(finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.abcd.json").write_text("{")
    run = train("acmr", ACMR_SMALL, small_dataset(), quick(folder, resume=True))
    assert same(run.model.state_dict(), finished.model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(ACMR_SMALL, alpha=0.5)}, "config alpha was 0.1 and is now 0.5"),
        ({"config": replace(ACMR_SMALL, epochs=13)}, "config epochs was 12"),
        ({"seed": 3}, "run seed was 0 and is now 3"),
        ({"data": small_dataset(seed=1)}, "data crc32"),
    ],
)
def test_resume_refuses_other_settings(tmp_path, change, message):
    folder = stopped_after(tmp_path / "run", 1)
    config, data = change.pop("config", ACMR_SMALL), change.pop("data", small_dataset())
    with pytest.raises(InputError, match=message):
        train("acmr", config, data, quick(folder, resume=True, **change))


def test_resume_refuses_another_methods_run(tmp_path):
    class Other(ACMR):
        name = "other"

    folder = stopped_after(tmp_path / "run", 1)
    with pytest.raises(InputError, match="a run of acmr, it cannot be resumed with other"):
        train(Other, ACMR_SMALL, small_dataset(), quick(folder, resume=True))


def test_an_existing_run_is_not_overwritten(finished, tmp_path):
    before = (finished.path / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=r"overwritten.*resume"):
        train("acmr", ACMR_SMALL, small_dataset(), quick(finished.path))
    assert (finished.path / "metrics.csv").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="this is a file"):
        train("acmr", ACMR_SMALL, small_dataset(), quick(tmp_path / "file"))


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors"])
def test_damaged_files_are_refused(finished, tmp_path, name):
    kind = name.removesuffix(".safetensors")
    whole = (finished.path / name).read_bytes()
    file = tmp_path / name
    moments = random.Random(1)
    for _ in range(60):
        at = moments.randrange(len(whole))
        file.write_bytes(whole[:at])
        with pytest.raises(InputError):
            checkpoint.load(file, kind)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << moments.randrange(8)
        file.write_bytes(flipped)
        try:
            tensors, meta = checkpoint.load(file, kind)
        except InputError:
            continue
        # what a flip may leave readable is padding of the header, which holds nothing
        assert same(tensors, checkpoint.load(finished.path / name, kind)[0])
        assert meta == checkpoint.load(finished.path / name, kind)[1]
    file.write_bytes(whole)
    checkpoint.load(file, kind)


def test_resume_from_a_truncated_checkpoint_is_one_clear_error(tmp_path):
    folder = stopped_after(tmp_path / "run", 2)
    file = folder / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="half-written"):
        train("acmr", ACMR_SMALL, small_dataset(), quick(folder, resume=True))


def test_load_model_says_what_is_wrong(finished, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="expected a model file, this is a checkpoint file"):
        load_model(finished.path / "checkpoint.safetensors")
    with pytest.raises(InputError, match="has not ended"):
        load_model(stopped_after(tmp_path / "run", 2))
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_model(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="not written by cmr_fast"):
        load_model(tmp_path / "foreign.safetensors")


def test_a_saved_model_encodes_raw_features_as_before(finished, tmp_path):
    save_model(tmp_path / "m.safetensors", finished.model)
    again = load_model(tmp_path / "m.safetensors")
    data = small_dataset().query
    for modality, features in (("image", data.image), ("text", data.text)):
        assert torch.equal(encode_all(again, modality, features), encode_all(finished.model, modality, features))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Exploding(ACMR):
        def step(self, batch, optimizers, backward, progress):
            logged = super().step(batch, optimizers, backward, progress)
            if progress * self.config.epochs > 3:
                logged["imd_loss"] = torch.tensor(math.inf)
            return logged

    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match="imd_loss is no longer finite in epoch 4"):
        train(Exploding, ACMR_SMALL, small_dataset(), quick(folder))
    tensors, meta = checkpoint.load(folder / "checkpoint.safetensors", "checkpoint")
    assert meta["state"]["epoch"] == 3 and all(value.isfinite().all() for value in tensors.values())


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    class Broken(ACMR):
        def step(self, batch, optimizers, backward, progress):
            with torch.no_grad():
                self.image_labels.bias.fill_(math.nan)
            return {"loss": torch.tensor(0.0)}

    with pytest.raises(InputError, match=r"parameter image_labels\.bias is no longer finite in epoch 1"):
        train(Broken, ACMR_SMALL, small_dataset(), quick(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"patience": -1}, "patience"),
    ],
)
def test_run_config_refuses(change, message):
    with pytest.raises(InputError, match=message):
        RunConfig(**change)


def test_devices_that_are_not_there_are_refused(tmp_path):
    for device in ("tpu", "cpu:1", "cuda:x", "cuda:99"):
        with pytest.raises(InputError, match="device"):
            train("acmr", ACMR_SMALL, small_dataset(), quick(tmp_path / "run", device=device))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_precisions_train(tmp_path):
    for precision in ("64-true", "bf16-mixed"):
        run = train(
            "acmr", replace(ACMR_SMALL, epochs=2), small_dataset(), quick(tmp_path / precision, precision=precision)
        )
        assert math.isfinite(run.results["all"]["average"])


def test_codes_are_compared_by_hamming_distance(tmp_path):
    class Coding(ACMR):
        binary = True

    run = train(Coding, replace(ACMR_SMALL, epochs=2), small_dataset(), quick(tmp_path / "run"))
    data = small_dataset()
    bits = {m: encode_all(run.model, m, getattr(data.query, m)) >= 0 for m in ("image", "text")}
    distance = (bits["image"][:, None] != bits["text"][None]).sum(2)
    order = distance.argsort(dim=1, stable=True)
    hit = (data.query.labels[:, None] == data.query.labels[None]).gather(1, order).double()
    precision = hit.cumsum(1) / torch.arange(1, 46)
    assert run.results["all"]["i2t"] == pytest.approx(float(((precision * hit).sum(1) / hit.sum(1)).mean()))


def test_unknown_method_and_wrong_config_are_refused(tmp_path):
    with pytest.raises(
        InputError,
        match="unknown method 'acmrr', expected one of acmr, cmimh, dcmh, ssah, djsrh, clip, finetune, tecoa",
    ):
        METHODS["acmrr"]
    with pytest.raises(InputError, match="ACMRConfig"):
        train("acmr", {"epochs": 3}, small_dataset(), quick(tmp_path / "run"))
    assert list(METHODS) == [
        "acmr", "cmimh", "dcmh", "ssah", "djsrh", "clip", "finetune", "tecoa", "mat-img", "mat", "mmcoa", "fare",
        "leaf", "scatter", "madry", "plain", "random-targeted",
    ]  # fmt: skip


def test_grid_search_picks_by_validation_and_tells_of_no_test_score(tmp_path):
    found = grid_search(
        "acmr",
        replace(ACMR_SMALL, epochs=3),
        {"alpha": (0.01, 1.0), "terms": ("full", "imd")},
        small_dataset(),
        quick(tmp_path / "grid"),
    )
    assert len(found.rows) == 4
    best = max(found.rows, key=lambda row: row["valid_map"])
    assert (found.best.alpha, found.best.terms) == (best["alpha"], best["terms"])
    assert found.path == tmp_path / "grid" / best["run"] and load_model(found.path).config == found.best
    with open(tmp_path / "grid" / "grid.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) == {"alpha", "terms", "valid_map", "best_epoch", "train_seconds", "run"}
    assert f"**{best['valid_map']:.4g}**" in (tmp_path / "grid" / "grid.md").read_text()


def test_grid_search_refuses(tmp_path):
    data = small_dataset()
    for grid, changes, message in (
        ({"alfa": (1.0,)}, {}, "no setting 'alfa'"),
        ({"alpha": ()}, {}, "no values"),
        ({"alpha": (1.0,)}, {"valid_fraction": 0}, "validation split"),
    ):
        with pytest.raises(InputError, match=message):
            grid_search("acmr", ACMR_SMALL, grid, data, quick(tmp_path / "grid", **changes))


@dataclass(frozen=True)
class MinimalConfig:
    epochs: int = 2
    batch_size: int = 7


def test_a_minimal_method_runs(tmp_path):
    class Minimal(Retriever):
        name, Config = "minimal", MinimalConfig

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.image = torch.nn.Linear(self.image_dim, 3)
            self.text = torch.nn.Linear(self.text_dim, 3)

        def optimizers(self):
            return {"all": torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)}

        def step(self, batch, optimizers, backward, progress):
            assert 0 <= progress < 1 and len(batch) > 1
            loss = (self.image(batch.image) - self.text(batch.text)).square().mean()
            optimizers["all"].zero_grad()
            backward(loss)
            optimizers["all"].step()
            return {"loss": loss.detach()}

        def encode(self, modality, features):
            return getattr(self, modality)(features)

    for wrong in (MinimalConfig(epochs=0), MinimalConfig(batch_size=1)):
        with pytest.raises(InputError, match="at least 1 epoch and a batch of 2"):
            train(Minimal, wrong, small_dataset(), quick(tmp_path / "run"))
    run = train(Minimal, None, small_dataset(), quick(tmp_path / "run"))
    assert not run.model.training
    assert run.history[1]["loss"] < run.history[0]["loss"]


def test_quiet_is_quiet_from_the_first_import_on(tmp_path):
    code = (
        "from cmr_fast.data import load; from cmr_fast.methods.acmr import ACMRConfig; "
        "from cmr_fast.methods.loop import RunConfig, train; "
        f"run = RunConfig(out={str(tmp_path / 'run')!r}, quiet=True, precision='bf16-mixed', device='cpu'); "
        "train('acmr', ACMRConfig(epochs=1, dim=8, image_hidden=8, text_hidden=8), load('shapes', count=60), run)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
