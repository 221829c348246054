"""Run folders: longer runs, locks, errors of the disk, class ids with gaps, steps as the unit, equal bytes."""

import errno
from dataclasses import dataclass, replace

import pytest
import torch
from small import ACMR_SMALL, small_dataset

from cmr_fast.data import load_images
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS, _runfolder, checkpoint, loop
from cmr_fast.methods.acmr import ACMR, ACMRConfig
from cmr_fast.methods.cmimh import CMIMH, CMIMHConfig
from cmr_fast.methods.dcmh import DCMH
from cmr_fast.methods.loop import RunConfig, load_model, train

SHORT = replace(ACMR_SMALL, epochs=2)
CODES = replace(
    CMIMH.presets["paper"], reconstruction="mean", inputs="standard", clip_norm=1.0, bits=8, hidden=16,
    critic_hidden=16, critic_dim=8, batch_size=16, epochs=4,
)  # fmt: skip


def quick(out, **changes):
    settings = {"device": "cpu", "valid_fraction": 0.3, "threads": 1, "quiet": True, "checkpoint_seconds": 0}
    return RunConfig(out=out, **(settings | changes))


def test_a_finished_run_goes_on_to_more_epochs_and_equals_the_longer_one(tmp_path):
    train("acmr", SHORT, small_dataset(), quick(tmp_path / "run"))
    longer = replace(SHORT, epochs=4)
    on = train("acmr", longer, small_dataset(), quick(tmp_path / "run", resume=True))
    whole = train("acmr", longer, small_dataset(), quick(tmp_path / "whole"))
    assert [row["epoch"] for row in on.history] == [1, 2, 3, 4]
    assert all(torch.equal(v, on.model.state_dict()[n]) for n, v in whole.model.state_dict().items())
    with pytest.raises(InputError, match="config epochs was 4 and is now 3"):
        train("acmr", replace(SHORT, epochs=3), small_dataset(), quick(tmp_path / "run", resume=True))


def test_a_run_folder_in_use_is_refused_and_its_holder_named(tmp_path):
    in_use = pytest.raises(InputError, match=r"in use, process \d+ on .* trains in it")
    with _runfolder.held(tmp_path / "run"), in_use:
        train("acmr", SHORT, small_dataset(), quick(tmp_path / "run", resume=True))
    train("acmr", SHORT, small_dataset(), quick(tmp_path / "run", resume=True))
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_full_disk_is_one_error_with_the_folder_and_the_run_goes_on(tmp_path, monkeypatch):
    real, calls = loop._save, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(loop, "_save", full)
    with pytest.raises(OSError, match="No space left on device; resume goes on from its last checkpoint") as caught:
        train("acmr", SHORT, small_dataset(), quick(tmp_path / "run"))
    assert caught.value.filename == str(tmp_path / "run")
    assert train("acmr", SHORT, small_dataset(), quick(tmp_path / "run", resume=True)).results["epochs"] == 2


def test_class_ids_with_gaps_train_the_same_heads_as_ids_without(tmp_path):
    data = small_dataset()
    wide = {n: replace(getattr(data, n), labels=getattr(data, n).labels * 5000) for n in ("train", "query", "database")}
    plain = train("acmr", SHORT, data, quick(tmp_path / "plain"))
    gaps = train("acmr", SHORT, replace(data, **wide), quick(tmp_path / "gaps"))
    assert gaps.model.num_classes == 3 and gaps.results["all"] == plain.results["all"]


def test_equal_runs_write_equal_models_and_files_of_before_are_read(tmp_path):
    paths = [train("acmr", SHORT, small_dataset(), quick(tmp_path / n)).path / "model.safetensors" for n in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3.0)}
    header = {
        "format": "cmr_fast/1",
        "kind": "model",
        "meta": "{}",
        "digest": checkpoint._digest("model", "{}", tensors),
    }
    save_file(tensors, tmp_path / "old", metadata=header)
    assert torch.equal(checkpoint.load(tmp_path / "old", "model")[0]["a"], tensors["a"])


def test_two_pairs_say_what_validation_took(tmp_path):
    data = small_dataset()
    data = replace(data, train=data.train.select(torch.arange(2)))
    with pytest.raises(InputError, match="got 2, of which the validation split took 1"):
        train("acmr", SHORT, data, quick(tmp_path / "run"))


@dataclass(frozen=True)
class StepsConfig(ACMRConfig):
    """ACMR's settings, its length in steps."""

    max_steps: int = 7


def test_steps_are_a_unit_and_a_resumed_run_equals_a_whole_one(tmp_path):
    class Steps(ACMR):
        Config = StepsConfig

    class Stop(Exception):
        pass

    class Stopping(Steps):
        def step(self, batch, optimizers, backward, progress):
            if progress > 0.6:
                raise Stop
            return super().step(batch, optimizers, backward, progress)

    config = StepsConfig(**{n: getattr(ACMR_SMALL, n) for n in ACMR_SMALL.__dataclass_fields__})
    whole = train(Steps, config, small_dataset(), quick(tmp_path / "whole", round_steps=2))
    assert len(whole.history) == 4  # 2 + 2 + 2 + 1
    with pytest.raises(Stop):
        train(Stopping, config, small_dataset(), quick(tmp_path / "run", round_steps=2))
    again = train(Steps, config, small_dataset(), quick(tmp_path / "run", round_steps=2, resume=True))
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in whole.model.state_dict().items())


def test_codes_that_die_are_said_in_the_results(tmp_path):
    class Dead(CMIMH):
        def encode(self, modality, features):
            return super().encode(modality, features).abs()

        def step(self, batch, optimizers, backward, progress):
            return super().step(batch, optimizers, backward, progress) | {"constant_bits_text": torch.tensor(8.0)}

    run = train(Dead, CODES, small_dataset(), quick(tmp_path / "run", patience=0))
    assert run.results["codes"]["constant_bits"] == {"image": 8, "text": 8}
    assert "8 of 8 bits are the same" in run.results["warnings"][0]
    rows = [{"constant_bits_image": 0.0, "constant_bits_text": 0.0, "mi": mi} for mi in (0.3, 0.4, 0.5)]
    assert run.model.trouble(rows) is None
    assert "mutual information" in run.model.trouble([row | {"mi": 1e-5} for row in rows])
    learning = [row | {"mi": 1e-5, "valid_map": score} for row, score in zip(rows, (0.15, 0.16, 0.2), strict=True)]
    assert run.model.trouble(learning) is None  # the other losses teach it all the same
    assert "mutual information" in run.model.trouble([row | {"valid_map": 0.15} for row in learning])


def test_hellinger_refuses_negative_features(tmp_path):
    with pytest.raises(InputError, match="hellinger input scaling needs features of at least 0"):
        train("cmimh", replace(CODES, inputs="hellinger"), small_dataset(), quick(tmp_path / "run"))


def test_cmimh_trains_in_bfloat16(tmp_path):
    run = train("cmimh", CODES, small_dataset(), quick(tmp_path / "run", precision="bf16-true"))
    assert run.results["epochs"] >= 1 and all(row["loss"] == row["loss"] for row in run.history)


@pytest.mark.parametrize(
    ("method", "perturb"), [("madry", "madry"), ("plain", "none"), ("random-targeted", "random_targeted")]
)
def test_trainers_are_called_what_they_are(tmp_path, method, perturb):
    config = replace(METHODS[method].presets["small"], epochs=1, batch_size=32, valid_images=4, valid_steps=1, steps=1)
    run = train(method, config, load_images("shapes", train=40, test=10), quick(tmp_path / "run"))
    assert load_model(run.path).config.perturb == perturb and run.results["method"] == method
    with pytest.raises(InputError, match="scatter takes any"):
        METHODS[method](replace(config, perturb="scatter"), 8)


@pytest.mark.parametrize("change", [{"epochs": "2"}, {"epochs": 2.5}, {"bits": None}, {"lr": "fast"}, {"init": 3}])
def test_settings_of_the_wrong_kind_are_refused(change):
    with pytest.raises(InputError, match=f"{next(iter(change))} must be"):
        CMIMHConfig(**change)


def test_a_preset_of_other_data_is_said_and_one_that_holds_another_is_not():
    said = loop._preset_of_other_data
    assert said(DCMH, DCMH.presets["wikipedia"], "wikipedia") is None
    assert said(DCMH, DCMH.presets["flickr8k"], "flickr8k") is None
    assert said(DCMH, DCMH.Config(), "wikipedia") is None
    assert "made for flickr8k" in said(DCMH, DCMH.presets["flickr8k"], "wikipedia")
    assert "on own" in said(DCMH, DCMH.presets["wikipedia"], "own")
