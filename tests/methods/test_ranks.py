"""Training over ranks: the losses of one process, whoever is killed, and refusals of what would not be that."""

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
from rank_jobs import FORMS, ON_CAPTIONS, ON_FEATURES, ON_STREAMS, curve, curves, killed, refused, resumed

from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods._ranks import _replicas
from cmr_fast.methods.loop import RunConfig, load_model

HERE = Path(__file__).resolve().parent
WORLDS = (2, 4)
BY_FOUR = ("clip", "finetune")


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
    on_ranks(curves, 2, str(place), ON_STREAMS)
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
@pytest.mark.parametrize("name", ON_STREAMS)
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
        "fsdp": "strategy fsdp trains no method yet",
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
