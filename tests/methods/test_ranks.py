"""Training over ranks: the losses of one process, whoever is killed, and refusals of what would not be that."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from rank_jobs import ON_FEATURES, curve, curves

HERE = Path(__file__).resolve().parent
WORLDS = (2, 4)
BY_FOUR = ("clip", "finetune", "finetune-chunk", "mat-img", "leaf")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(function, world, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]))
        mp.spawn(function, (world, free_port(), *arguments), nprocs=world)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A folder with every run on features, by every number of ranks."""
    place = tmp_path_factory.mktemp("features")
    for world in WORLDS:
        on_ranks(curves, world, str(place), ON_FEATURES)
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


@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ON_FEATURES)
def test_features_have_the_curve_of_one_process(name, world, features):
    same_curve(name, features, world)
