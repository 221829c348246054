"""Training over ranks: the losses of one process, whoever is killed, and refusals of what would not be that."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from pair_shards import write_shards
from rank_jobs import (
    FORMS,
    ON_CAPTIONS,
    ON_FEATURES,
    ON_STREAMS,
    SHARDED,
    crossed,
    crossing,
    curve,
    curves,
    killed,
    of_libraries,
    refused,
    resumed,
)

from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods._ranks import _replicas
from cmr_fast.methods.loop import RunConfig, load_model

HERE = Path(__file__).resolve().parent
WORLDS = (2, 4)
SMALL_CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
STREAMED = (*ON_STREAMS, "clip-stream+fsdp", "finetune-stream+fsdp")
BY_FOUR = ("clip", "finetune", "finetune-chunk+fsdp")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(function, world, *arguments):
    """Processes of `function`, all ended; an error of one is raised here, a kill is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]))
        started = mp.spawn(function, (world, free_port(), *arguments), nprocs=world, join=False)
    for process in started.processes:
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL), (process.exitcode, started.join(0))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A folder with every run on features, by every number of ranks."""
    place = tmp_path_factory.mktemp("features")
    for world in WORLDS:
        on_ranks(curves, world, str(place), ON_FEATURES)
    return place


@pytest.fixture(scope="module")
def captions(tmp_path_factory, start, mlm):
    """A folder with every run on captions, by two ranks, and a few by four."""
    place = tmp_path_factory.mktemp("captions")
    (place / "towers.txt").write_text(load_model(start).config.towers)
    (place / "start").symlink_to(start)
    (place / "mlm").symlink_to(mlm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forms = [f"{name}+{form}" for name in ("clip", "finetune") for form in FORMS]
        forms += [f"{name}+fsdp" for name in SHARDED]
        on_ranks(curves, 2, str(place), (*ON_CAPTIONS, *forms))
        on_ranks(curves, 4, str(place), BY_FOUR)
        yield place


@pytest.fixture(scope="module")
def streams(tmp_path_factory, start, data):
    """A folder with every run on shards, by two ranks; photos of three pairs are broken."""
    place = tmp_path_factory.mktemp("streams")
    (place / "towers.txt").write_text(load_model(start).config.towers)
    (place / "start").symlink_to(start)
    write_shards(place / "shards", data.train, (13, 20, 15), broken=(1, 7, 40))
    write_shards(place / "held", data.test, (12,))
    on_ranks(curves, 2, str(place), STREAMED)
    return place


def same_curve(name, place, world):
    alone = place / f"{name.partition('+')[0]} on 1"
    run = curve(name.partition("+")[0], place, alone, resume=alone.exists())
    history, results = torch.load(place / f"{name} on {world}, last rank.pt", weights_only=False)
    assert len(history) == len(run.history)
    for seen, expected in zip(history, run.history, strict=True):
        for key in expected.keys() - {"seconds"}:
            assert seen[key] == pytest.approx(expected[key], rel=2e-4, abs=2e-5), (key, seen["epoch"])
    return run, results


def losses_of(run):
    with (run / "metrics.csv").open() as rows:
        return [float(row["loss"]) for row in csv.DictReader(rows)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ON_FEATURES)
def test_features_have_the_curve_of_one_process(name, world, features):
    same_curve(name, features, world)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "world"), [*((name, 2) for name in ON_CAPTIONS), *((name, 4) for name in BY_FOUR)])
def test_captions_have_the_curve_of_one_process(name, world, captions):
    same_curve(name, captions, world)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STREAMED)
def test_streams_have_the_curve_of_one_process(name, streams):
    run, _ = same_curve(name, streams, 2)
    assert run.results["skipped"] >= 3, "what one rank cannot decode no rank trains on"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["clip", "finetune"])
def test_a_ring_is_exact_and_local_negatives_are_another_loss(name, captions):
    same_curve(f"{name}+ring", captions, 2)
    with pytest.raises(AssertionError):
        same_curve(f"{name}+local", captions, 2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_towers_have_the_curve_of_one_process_and_whole_tensors_on_disk(name, captions):
    run, results = same_curve(f"{name}+fsdp", captions, 2)
    assert results["rsum"] == pytest.approx(run.results["rsum"], abs=4)
    sharded = load_model(captions / f"{name}+fsdp on 2").state_dict()
    for key, value in run.model.state_dict().items():
        torch.testing.assert_close(sharded[key], value, rtol=0, atol=1e-3, msg=key)


@pytest.mark.timeout(900)
def test_a_run_goes_on_by_the_other_strategy_and_ranks_hold_half_of_the_towers(start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "towers.txt").write_text(load_model(start).config.towers)
    on_ranks(crossing, 2, tmp_path)
    assert "rank 0 of 2 has lost another rank" in (tmp_path / "lost 0.txt").read_text()
    for out in ("ddp", "fsdp"):
        with pytest.raises(InputError, match="has not ended"):
            load_model(tmp_path / out)
    for copy in ("ddp", "one"):
        shutil.copytree(tmp_path / "fsdp", tmp_path / f"fsdp to {copy}")
    on_ranks(crossed, 2, tmp_path)
    curve("clip", tmp_path, tmp_path / "fsdp to one", resume=True)

    expected = load_model(tmp_path / "undisturbed").state_dict()
    again = load_model(tmp_path / "fsdp").state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())
    losses = losses_of(tmp_path / "undisturbed")
    for out in ("ddp", "fsdp to ddp", "fsdp to one"):
        assert losses_of(tmp_path / out) == pytest.approx(losses, rel=2e-4), out

    held = [torch.load(tmp_path / f"held {rank}.pt") for rank in range(2)]
    (whole,) = {int(sums[0]) for sums in held}
    assert [int(sum(kept)) for kept in zip(*(sums[1:] for sums in held), strict=True)] == [whole] * 4
    assert all(0.45 * whole < kept < 0.55 * whole for sums in held for kept in sums[1:].tolist())


@pytest.mark.timeout(900)
def test_models_of_libraries_are_sharded_where_their_own_code_calls_them(tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    configs = {"plain": {}, "custom": {"custom_text": True}}
    for name, extra in configs.items():
        config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text} | extra
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    config = transformers.CLIPConfig(
        text_config=SMALL_CLIP, vision_config=SMALL_CLIP | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    on_ranks(of_libraries, 2, tmp_path)
    for rank in range(2):
        apart = torch.load(tmp_path / f"apart {rank}.pt")
        assert len(apart) == 3
        for name, (most, cut, parameters) in apart.items():
            assert most < 1e-5 and 0.75 * parameters < cut < parameters, (name, most, cut, parameters)


@pytest.mark.timeout(900)
def test_a_killed_rank_ends_the_run_which_then_goes_on(tmp_path):
    """On as many ranks to the same bits, on another number to rounding; rank 0 says what happened."""
    on_ranks(killed, 2, tmp_path)
    said = (tmp_path / "lost 0.txt").read_text()
    assert "rank 0 of 2 has lost another rank" in said and "resume goes on from the last checkpoint" in said
    with pytest.raises(InputError, match="has not ended"):
        load_model(tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    on_ranks(resumed, 2, tmp_path)
    expected = load_model(tmp_path / "undisturbed").state_dict()
    again = load_model(tmp_path / "killed").state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())
    alone = curve("acmr", tmp_path, tmp_path / "alone", resume=True).model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(alone[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.timeout(900)
def test_torchrun_by_hand_ends_with_the_curve_of_one_process(tmp_path):
    flags = {"data": "shapes", "epochs": 2, "inner-steps": 1, "device": "cpu", "threads": 1, "valid-fraction": 0}
    train = ["-m", "cmr_fast", "train", "acmr", "--quiet", *(x for n, v in flags.items() for x in (f"--{n}", str(v)))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for out, started_by in (("one", []), ("two", torchrun)):
        command = [sys.executable, *started_by, *train, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=paths)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / out / "metrics.csv").read_text().splitlines() for out in ("one", "two"))
    assert one[0] == two[0] and len(one) == len(two) == 3
    seconds = one[0].split(",").index("seconds")
    for mine, theirs in zip(one[1:], two[1:], strict=True):
        numbers = [[float(x or "nan") for i, x in enumerate(row.split(",")) if i != seconds] for row in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-4, abs=2e-5, nan_ok=True)


@pytest.mark.timeout(900)
def test_ranks_that_differ_and_what_is_not_of_ranks_are_refused_on_every_rank(tmp_path):
    on_ranks(refused, 2, tmp_path)
    wanted = {
        "config": "every rank must have the same training: config learning_rate is 0.01 on rank 0 and 0.02 on rank 1",
        "data": "data crc32 is",
        "seed": "run seed is 0 on rank 0 and 1 on rank 1",
        "fsdp": "strategy fsdp does not train acmr, expected ddp, a replica a rank: its networks are small",
        "dcmh": "dcmh is trained in one process, got 2 ranks: a batch is compared with",
        "used": "not empty and would be overwritten",
    }
    for case, text in wanted.items():
        assert {text in (tmp_path / f"{case} {rank}.txt").read_text() for rank in range(2)} == {True}, case
        assert case == "used" or not (tmp_path / case).exists()


def test_flags_of_ranks_are_checked(tmp_path):
    for changes, text in (
        ({"devices": 0}, "devices must be at least 1"),
        ({"strategy": "dp"}, "strategy must be one of auto, ddp, fsdp"),
        ({"contrastive": "all"}, "contrastive must be one of gather, ring, local"),
    ):
        with pytest.raises(InputError, match=text):
            RunConfig(out=tmp_path, **changes)
    with pytest.raises(InputError, match="contrastive ring is for methods that train by InfoNCE, got acmr"):
        curve("acmr", tmp_path, tmp_path / "ring", contrastive="ring")
    with pytest.raises(InputError, match="strategy fsdp does not train acmr"):
        curve("acmr", tmp_path, tmp_path / "fsdp", strategy="fsdp")
    assert {name for name in METHODS if not METHODS[name].replicas_only} == {"clip", "finetune"}
    by_info_nce = {name for name in METHODS if METHODS[name].contrasts}
    assert by_info_nce == {"clip", "finetune", "tecoa", "mat-img", "mat", "mmcoa"}
    refused_methods = {name for name in METHODS if METHODS[name].one_process}
    assert refused_methods == {"dcmh", "ssah", "scatter", "madry", "plain", "random-targeted"}


def test_ranks_are_not_started_of_a_program_that_has_no_file(tmp_path):
    """python -c: what Lightning would start is the file "-c", and the rank that waits for it would be killed."""
    lines = "from cmr_fast.methods._ranks import launched; from cmr_fast.methods.loop import RunConfig; "
    lines += f"launched(RunConfig(out={str(tmp_path)!r}, devices=2, device='cpu'))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "expected a script or a module to run, got '-c'" in done.stderr, done.stderr


def test_ranks_wait_longer_for_the_test_split_than_torch_does():
    """Torch ends a group after half an hour in which a rank was silent."""
    assert _replicas()._timeout == timedelta(days=1)
