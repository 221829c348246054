"""Files that an earlier version wrote are read, resumed and answered from as they were then.

`v0.1.0` was written at fadb72c: an index with ids of its own and rows removed, a pairs .npz, finished runs of three
methods, and two runs that were stopped in their third epoch. `expected.json` holds what that version said of them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cmr_fast as cf
from cmr_fast.data import load, load_images
from cmr_fast.methods import METHODS
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.loop import RunConfig, load_model, train

FILES = Path(__file__).parent / "v0.1.0"
EXPECTED = json.loads((FILES / "expected.json").read_text())


def config(method):
    """As the run that was stopped began: defaults have changed since."""
    kind, stored = METHODS[method], json.loads((FILES / f"{method}-stopped" / "config.json").read_text())["config"]
    return kind.Config(**kind.read_config(stored))


def settings(out, **changes):
    values = {"quiet": True, "checkpoint_seconds": 0, "valid_fraction": 0.2, "threads": 1}
    return RunConfig(out=out, **(values | changes))


@pytest.mark.parametrize("mmap", [False, True])
def test_an_index_answers_as_before(mmap):
    index = cf.HammingIndex.load(FILES / "index.cmrx", mmap=mmap)
    codes = np.random.default_rng(0).integers(0, 256, (300, 8), dtype=np.uint8)
    distances, ids = index.search(codes[:5], 4)
    assert index.ntotal == 296
    assert np.asarray(distances).tolist() == EXPECTED["search"]["distances"]
    assert np.asarray(ids).tolist() == EXPECTED["search"]["ids"]


def test_pairs_are_read():
    dataset = load(str(FILES / "golden.npz"))
    assert [len(split) for split in (dataset.train, dataset.query, dataset.database)] == [48, 15, 24]
    assert (dataset.image_dim, dataset.text_dim, dataset.num_classes) == (8, 6, 3)


@pytest.mark.parametrize("method", ["acmr", "cmimh"])
def test_a_model_encodes_as_before(method):
    model = load_model(FILES / f"{method}-run")
    image = encode_all(model, "image", load(str(FILES / "golden.npz")).query.image[:3])
    torch.testing.assert_close(image, torch.tensor(EXPECTED[method]["image"]), rtol=1e-5, atol=1e-6)


def test_a_classifier_is_read():
    state = load_model(FILES / "scatter-run").state_dict()
    expected = EXPECTED["scatter"]["state"]
    assert set(state) == set(expected)
    for name, total in expected.items():
        assert float(state[name].double().sum()) == pytest.approx(total, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("method", ["acmr", "cmimh"])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(method, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(FILES / f"{method}-stopped", folder)
    run = train(method, config(method), load(str(FILES / "golden.npz")), settings(folder, resume=True))
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
    expected = EXPECTED[method]["results"]
    assert run.results["best_epoch"] == expected["best_epoch"]
    assert run.results["all"] == pytest.approx(expected["all"], abs=1e-6)
    finished = load_model(FILES / f"{method}-run").state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, finished[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_of_before_is_not_resumed_on_other_data(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(FILES / "acmr-stopped", folder)
    dataset = load(str(FILES / "golden.npz"))
    other = load(str(FILES / "golden.npz"))
    other.train.image[0, 0] += 1.0
    with pytest.raises(cf.InputError, match="crc32"):
        train("acmr", config("acmr"), other, settings(folder, resume=True))
    train("acmr", config("acmr"), dataset, settings(folder, resume=True))


def test_images_of_before_are_the_images_of_now():
    """The scatter run's record of its data still fits the data set built in."""
    stored = json.loads((FILES / "scatter-run" / "config.json").read_text())["data"]
    images = load_images("shapes", train=60, test=20)
    assert stored["num_classes"] == images.num_classes and stored["test"] == len(images.test)
