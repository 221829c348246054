"""`cmr-fast dedup`: what stays, and going on after a kill."""

import numpy as np
import pytest
from commands import refused

import cmr_fast as cf
from cmr_fast.cli import main
from cmr_fast.retrieval import duplicates

pytest.importorskip("scipy")


@pytest.fixture
def codes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 8), dtype=np.uint8)[rng.integers(0, 100, 400)]
    x ^= np.packbits(rng.random((400, 64)) < 0.01, axis=1)
    np.save("codes.npy", x)
    return x


def test_rows_that_stay_are_written(codes, capsys):
    assert main(["dedup", "codes.npy", "--radius", "2", "--out", "keep.npy", "--groups", "groups.npy"]) == 0
    found = cf.near_duplicates(codes, 2)
    np.testing.assert_array_equal(np.load("keep.npy"), found.kept)
    np.testing.assert_array_equal(np.load("groups.npy"), found.groups)
    assert f"{len(found.kept)} of 400 rows stay" in capsys.readouterr().out
    assert "exists already" in refused(capsys, "dedup", "codes.npy", "--radius", "2", "--out", "keep.npy")
    assert main(["dedup", "codes.npy", "--radius", "2", "--out", "keep.npy", "--keep", "last", "--force"]) == 0
    np.testing.assert_array_equal(np.load("keep.npy"), cf.near_duplicates(codes, 2, "last").kept)


def test_an_index_file_has_rows_too(codes, capsys):
    assert main(["index", "codes.npy", "--out", "x.cmrx"]) == 0
    assert main(["dedup", "x.cmrx", "--radius", "0", "--out", "keep.npy"]) == 0
    assert len(np.load("keep.npy")) == len(np.unique(codes, axis=0))


def test_the_same_command_goes_on_where_it_was_stopped(codes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "_SAVED", 0.0)
    write, calls = duplicates._write_state, []

    def interrupted(*args):
        write(*args)
        calls.append(args[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(duplicates, "_write_state", interrupted)
    argv = ["dedup", "codes.npy", "--radius", "2", "--out", "keep.npy"]
    assert main(argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "keep.npy.state").exists() and not (tmp_path / "keep.npy").exists()
    monkeypatch.setattr(duplicates, "_write_state", write)
    starts, join = [], duplicates.join
    monkeypatch.setattr(
        duplicates, "join", lambda *args, start, **kw: starts.append(start) or join(*args, start=start, **kw)
    )
    assert main(argv) == 0
    assert starts == [calls[-1]] and starts[0] > 0
    np.testing.assert_array_equal(np.load("keep.npy"), cf.near_duplicates(codes, 2).kept)
    assert not (tmp_path / "keep.npy.state").exists()


def test_bad_input_is_one_line(codes, capsys):
    for argv, message in (
        (("codes.npy", "--radius", "-1", "--out", "k.npy"), "--radius must be 0 or more, got -1"),
        (("codes.npy", "--radius", "1", "--out", "k.txt"), "expected a name in .npy"),
        (("codes.npy", "--radius", "1", "--out", "codes.npy", "--force"), "is an input"),
        (("none.npy", "--radius", "1", "--out", "k.npy"), "no such file"),
        (("codes.npy", "--radius", "1", "--out", "k.npy", "--groups", "k.npy"), "another file for --groups"),
    ):
        assert message in refused(capsys, "dedup", *argv)
    np.save("floats.npy", np.zeros((3, 4)))
    assert "expected packed codes" in refused(capsys, "dedup", "floats.npy", "--radius", "1", "--out", "k.npy")


def test_both_files_are_written_or_none(codes, tmp_path, monkeypatch):
    from cmr_fast.cli import common

    aside, seen = common.write_aside, []

    def full(path):
        seen.append(path)
        if len(seen) == 2:
            raise OSError(28, "No space left on device", str(path))
        return aside(path)

    monkeypatch.setattr(common, "write_aside", full)
    keep, groups = tmp_path / "keep.npy", tmp_path / "groups.npy"
    command = ["dedup", "codes.npy", "--radius", "2", "--out", str(keep), "--groups", str(groups)]
    assert main(command) != 0
    assert not keep.exists() and not groups.exists()
    monkeypatch.setattr(common, "write_aside", aside)
    assert main(command) == 0 and keep.exists() and groups.exists()
