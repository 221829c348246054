"""What the system is asked for and does not give, and words that are no values: one line, exit code 2, nothing lost."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import refused

from cmr_fast.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", np.random.default_rng(0).integers(0, 256, (30, 8), dtype=np.uint8))
    return tmp_path


def in_a_process(*argv: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, "-m", "cmr_fast", *argv], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("name", ["data.mat", "data.npz", "data.h5", "data"])
def test_a_fifo_is_not_waited_for(here, capsys, name):
    os.mkfifo(here / name)
    said = refused(capsys, "train", "acmr", "--data", name, "--out", "run")
    assert name in said and "FIFO" in said and not Path("run").exists()


def test_outputs_are_never_devices_or_fifos(here, capsys):
    os.mkfifo(here / "pipe")
    for force in ([], ["--force"]):
        assert "pipe" in refused(capsys, "index", "codes.npy", "--out", "pipe", *force)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert "pipe" in refused(capsys, "index", "pipe", "--out", "x.cmrx")


@pytest.mark.parametrize("out", ["codes.npy/x.cmrx", "y" * 300, "/proc/x.cmrx"])
def test_a_place_that_cannot_be_written_is_named(here, capsys, out):
    said = refused(capsys, "index", "codes.npy", "--out", out)
    assert out.removesuffix("/x.cmrx")[:40] in said and sorted(p.name for p in here.iterdir()) == ["codes.npy"]


def test_a_file_where_a_run_is_to_be(here, capsys):
    said = refused(capsys, "train", "acmr", "--data", "shapes", "--options", "count=60", "--out", "codes.npy")
    assert "codes.npy" in said and len(np.load("codes.npy")) == 30


def test_an_index_is_not_written_over_its_input(here, capsys):
    before = Path("codes.npy").read_bytes()
    os.symlink("codes.npy", "link.npy")
    for out in ("codes.npy", "link.npy"):
        assert out in refused(capsys, "index", "codes.npy", "--out", out, "--force")
    assert Path("codes.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("count=-1", ["count", "at least 1", "-1"]),
        ("count=many", ["count", "integer", "'many'"]),
        ("nonsense=1", ["nonsense"]),
        ("count", ["name=value", "'count'"]),
    ],
)
def test_options_of_a_loader_are_checked(capsys, option, words):
    said = refused(capsys, "train", "acmr", "--data", "shapes", "--options", option, "--out", "run")
    assert all(word in said for word in words) and not Path("run").exists()


def test_labelled_images_take_three_options(capsys):
    flags = ["train", "scatter", "--preset", "small", "--epochs", 1, "--out", "run", "--options"]
    assert "no option 'count'" in refused(capsys, *flags, "count=5")
    assert "train" in refused(capsys, *flags, "train=-1")
    assert not Path("run").exists()


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "9" * 20])
def test_a_wrong_number_of_threads_is_named_by_its_variable(capsys, monkeypatch, value):
    assert main(["index", "codes.npy", "--out", "db.cmrx"]) == 0
    monkeypatch.setenv("CMR_FAST_THREADS", value)
    said = refused(capsys, "search", "db.cmrx", "codes.npy")
    assert "CMR_FAST_THREADS" in said and value in said
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "CMR_FAST_THREADS" in report["wrong_variables"] and report["environment"]["CMR_FAST_THREADS"] == value
    assert main(["doctor"]) == 0
    assert "not valid" in capsys.readouterr().out


def test_an_unknown_backend_is_shown_by_doctor(capsys, monkeypatch):
    monkeypatch.setenv("CMR_FAST_BACKEND", "fastest")
    assert main(["doctor", "--json"]) == 0
    assert "cpp" in json.loads(capsys.readouterr().out)["wrong_variables"]["CMR_FAST_BACKEND"]


def test_output_without_utf8(capsys):
    assert main(["index", "codes.npy", "--out", "db.cmrx"]) == 0
    for argv in (["search", "db.cmrx", "codes.npy", "--k", "9", "--show", "1"], ["--help"], ["doctor"]):
        done = in_a_process(*argv, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and not done.stderr and done.stdout.isascii()


def test_search_says_how_much_it_does_not_print(capsys):
    assert main(["index", "codes.npy", "--out", "db.cmrx"]) == 0
    capsys.readouterr()
    assert main(["search", "db.cmrx", "codes.npy", "--k", "20", "--show", "1"]) == 0
    assert "20" in capsys.readouterr().out
    said = ""
    for show in ("-1", "0"):
        code = main(["search", "db.cmrx", "codes.npy", "--k", "2", "--show", show])
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert code in (0, 2) and "31 more" not in said
    assert "30 more queries" in said


def test_a_full_disk_ends_training_in_one_line_and_it_goes_on(capsys, monkeypatch):
    import cmr_fast._files as files

    argv = [
        "train",
        "cmimh",
        "--data",
        "shapes",
        "--options",
        "count=60",
        "--bits",
        "8",
        "--hidden",
        "8",
        "--seed",
        "3",
    ]
    argv += ["--critic-hidden", "8", "--critic-dim", "4", "--batch-size", "16", "--out", "run"]
    assert main([*argv, "--epochs", "1"]) == 0
    before = Path("run/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert "No space left on device" in refused(capsys, *argv, "--epochs", "3", "--resume")
    assert Path("run/model.safetensors").read_bytes() == before
    assert main([*argv, "--epochs", "3", "--resume"]) == 0
    assert Path("run/model.safetensors").read_bytes() != before


def full(*_: object) -> None:
    raise OSError(28, "No space left on device", "run/checkpoint")


def test_a_disk_without_room_for_an_array_is_named(here):
    rows = np.arange(20_000, dtype=np.uint32)
    np.save("many.npy", rows.view(np.uint8).reshape(-1, 4))
    limited = (
        "import resource, sys; from cmr_fast.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", limited, "dedup", "many.npy", "--radius", "0", "--out", "keep.npy"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: keep.npy: File too large"
    assert sorted(p.name for p in here.iterdir()) == ["codes.npy", "many.npy"]
