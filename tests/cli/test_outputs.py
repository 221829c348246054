"""No output goes over what a command reads, or over what a run is made of, whatever --force says."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import refused

from cmr_fast.cli.main import main


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", np.random.default_rng(0).integers(0, 256, (30, 8), dtype=np.uint8))
    np.save("labels.npy", np.arange(30) % 3)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FILES = ["--query-codes", "codes.npy", "--database-codes", "codes.npy"]
FILES += ["--query-labels", "labels.npy", "--database-labels", "labels.npy"]


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", *FILES, "--out", "codes.npy"],
        ["evaluate", *FILES, "--out", "labels.npy"],
        ["evaluate", *FILES, "--out", "link"],
        ["evaluate", "run", "--data", "data.npz", "--out", "data.npz"],
        ["encode", "run", "--data", "folder", "--modality", "text", "--out", "folder/train_image.npy"],
        ["attack", "run", "--data", "data.npz", "--save", "data.npz"],
        ["index", "codes.npy", "--out", "codes.npy"],
        ["index", "codes.npy", "--out", "labels.npy", "--ids", "labels.npy"],
        ["search", "codes.npy", "data.npz", "--out", "data.npz"],
    ],
    ids=lambda argv: " ".join(argv[:1] + argv[-1:]),
)
def test_an_input_is_no_output(here, capsys, argv):
    os.symlink("codes.npy", "link")
    Path("folder").mkdir()
    for name, values in np.load("data.npz").items():
        np.save(f"folder/{name}.npy", values)
    before = contents(here)
    assert f"{argv[argv.index('--out' if '--out' in argv else '--save') + 1]}: is an input" in refused(
        capsys, *argv, "--force"
    )
    assert contents(here) == before


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "checkpoint.safetensors", "config.json", "data.json", "results.json", "metrics.csv", "link"],
)
def test_what_a_run_is_made_of_is_no_output(here, capsys, name):
    os.symlink("config.json", "run/link")
    before = contents(here)
    for argv in (
        ["evaluate", "run"],
        ["evaluate", *FILES],
        ["index", "codes.npy"],
        ["evaluate", "run/model.safetensors"],
    ):
        said = refused(capsys, *argv, "--out", f"run/{name}", "--force")
        assert f"run/{name}: is " in said and ("for the run" in said or "an input" in said)
    assert "expected a name in .npy" in refused(
        capsys, "encode", "run", "--modality", "text", "--out", f"run/{name}", "--force"
    )
    assert contents(here) == before


def test_a_report_is_not_written_among_a_runs_files(here, capsys):
    before = contents(here)
    for command in ("report", "attack"):
        assert "run: is a run folder" in refused(capsys, command, "run", "--out", "run", "--force")
    assert contents(here) == before


def test_other_files_in_a_run_folder_are_outputs(here):
    for _ in range(2):
        argv = ["encode", "run", "--modality", "text", "--split", "query", "--out", "run/texts.npy", "--force"]
        assert main(argv) == 0
    assert len(np.load("run/texts.npy")) == 12
    assert main(["evaluate", "run", "--out", "run/table.json", "--force"]) == 0
    os.mkdir("elsewhere")
    assert main(["evaluate", "run", "--out", "elsewhere/results.json"]) == 0
