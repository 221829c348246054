import subprocess
import sys

import numpy as np
import pytest
import torch

from cmr_fast.data import PairedDataset, Pairs, load, save_pairs
from cmr_fast.errors import InputError


def same(a, b):
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.text, b.text) if isinstance(a.text, torch.Tensor) else a.text == b.text


@pytest.mark.parametrize("form", ["features", "raw"])
def test_a_saved_set_comes_back_equal(tmp_path, form):
    data = load("shapes", form=form, train=30, query=10, database=20).hold_out(0.2, seed=0)
    save_pairs(tmp_path / "mine.npz", data)
    back = load(tmp_path / "mine.npz")
    for split in ("train", "valid", "query", "database"):
        same(getattr(data, split), getattr(back, split))
    assert (back.name, back.class_names) == ("mine", data.class_names)


def test_queries_that_rank_each_other_are_saved_once(tmp_path):
    labels = torch.tensor([1, 2, 3])
    pairs = Pairs(torch.eye(3), torch.eye(3, 2), labels)
    test = Pairs(torch.eye(3), (("a", "b"), ("c",), ("d",)), labels)
    save_pairs(tmp_path / "mine.npz", PairedDataset("x", pairs, pairs, pairs))
    back = load(tmp_path / "mine.npz")
    assert back.query is back.database
    # ids are kept as they are, not moved to begin at 0
    assert back.train.labels.tolist() == [1, 2, 3]
    save_pairs(tmp_path / "mine.npz", PairedDataset("x", test, test, test))
    assert load(tmp_path / "mine.npz").query.text == test.text


@pytest.mark.parametrize("text", [torch.arange(6).reshape(3, 2), ("one", "a second", ""), (("a",), ("b", "c"), ("d",))])
def test_token_ids_and_captions_come_back_as_they_were(tmp_path, text):
    pairs = Pairs(torch.eye(3), text, torch.arange(3))
    save_pairs(tmp_path / "mine.npz", PairedDataset("x", pairs, pairs, pairs))
    same(load(tmp_path / "mine.npz").train, pairs)


def test_whole_numbers_of_the_own_format_are_features_where_it_does_not_say_more(tmp_path):
    parts = {f"{s}_{p}": np.eye(3, dtype=np.int64) for s in ("train", "query") for p in ("image", "text")}
    np.savez(tmp_path / "own.npz", **parts, train_labels=np.arange(3), query_labels=np.arange(3))
    assert load(tmp_path / "own.npz").train.text.dtype == torch.float32


def test_one_hot_rows_of_the_own_format_stay_several_labels(tmp_path):
    pairs = Pairs(torch.eye(3), torch.eye(3, 2), torch.eye(3, dtype=torch.uint8))
    save_pairs(tmp_path / "mine.npz", PairedDataset("x", pairs, pairs, pairs))
    same(load(tmp_path / "mine.npz").train, pairs)


def test_own_features_as_the_documentation_says(tmp_path):
    def split(name, count):
        rows = np.random.default_rng(0).random
        return {
            f"{name}_image": rows((count, 4)),
            f"{name}_text": rows((count, 3)),
            f"{name}_labels": np.arange(count) % 2,
        }

    np.savez(tmp_path / "own.npz", **split("train", 9), **split("query", 4), **split("database", 6))
    data = load(str(tmp_path / "own.npz"))
    assert [len(data.train), len(data.query), len(data.database)] == [9, 4, 6]
    assert data.train.image.dtype == torch.float32
    bad = split("train", 9) | split("query", 4)
    bad["query_labels"] = bad["query_labels"][:3]
    np.savez(tmp_path / "own.npz", **bad)
    with pytest.raises(InputError, match=r"own.npz: image, text and labels must have the same number of rows"):
        load(tmp_path / "own.npz")
    bad["query_labels"] = np.array([0.5, 1, 0, 1])
    np.savez(tmp_path / "own.npz", **bad)
    with pytest.raises(InputError, match=r"must be \(N,\) class ids or \(N, C\) of 0 and 1"):
        load(tmp_path / "own.npz")


def test_saving_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    pairs = Pairs(torch.eye(3), torch.eye(3, 2), torch.arange(3))
    data = PairedDataset("x", pairs, pairs, pairs)
    save_pairs(tmp_path / "mine.npz", data)
    before = (tmp_path / "mine.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pairs(tmp_path / "mine.npz", data)
    assert (tmp_path / "mine.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_bare_names_are_looked_up_under_the_data_folder(tmp_path, monkeypatch):
    save_pairs(tmp_path / "mine.npz", load("shapes", count=40))
    monkeypatch.setenv("CMR_FAST_DATA", str(tmp_path))
    monkeypatch.chdir("/")
    assert len(load("mine.npz").train) == 20
    with pytest.raises(InputError, match=rf"no data at other or {tmp_path}/other; the built-in set is named 'shapes'"):
        load("other")
    with pytest.raises(InputError, match="no data at /nowhere; the"):
        load("/nowhere")
    monkeypatch.delenv("CMR_FAST_DATA")
    with pytest.raises(InputError, match="set CMR_FAST_DATA"):
        load("mine.npz")


def test_folders_without_data(tmp_path):
    with pytest.raises(
        InputError, match=r"looked for raw_features.mat \(Wikipedia\) and files in .mat .* it holds nothing"
    ):
        load(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(InputError, match=r"it holds photo.jpg"):
        load(tmp_path)


def test_unknown_options_name_the_valid_ones(tmp_path):
    with pytest.raises(
        InputError, match="shapes take no option features; they take form, train, query, database, seed"
    ):
        load("shapes", features="lda")
    (tmp_path / "raw_features.mat").touch()
    with pytest.raises(InputError, match="Wikipedia take no option seed; they take features"):
        load(tmp_path, seed=1)
    with pytest.raises(InputError, match="they take image, text, database, query, train, seed"):
        load(__file__, splits=2)


def test_importing_costs_no_file_library():
    script = "import sys, cmr_fast.data; print([m for m in ('scipy', 'h5py', 'pandas', 'sklearn') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert found.strip() == "[]"


def test_an_empty_name_is_refused():
    with pytest.raises(InputError, match="got ''"):
        load("")
