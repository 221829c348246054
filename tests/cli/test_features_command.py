"""`cmr-fast features`: a file of deep features that trainings of pairs read."""

import pytest
import tiny_towers
from commands import refused

from cmr_fast.cli import main
from cmr_fast.data import deep, load, load_captions

DATA = ["--data", "shapes", "--options", "count=40"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    data = load_captions("shapes", count=40)
    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    return tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels())


def test_cmimh_trains_on_what_it_writes(towers, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep.npz"
    command = ["features", *DATA, "--towers", towers, "--out", str(out)]

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deep, "_shard", stopped)
        assert main(command) == 130
    assert "go on with the same command" in capsys.readouterr().err and not out.exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"labels by images; go on with: cmr-fast train cmimh --data {out}" in said
    pairs = load(out)
    assert (len(pairs.train), len(pairs.query), pairs.text_dim) == (32, 8, 16) and pairs.database is pairs.query
    small = ["--bits", "8", "--epochs", "1", "--pca-dim", "8", "--quiet", "--out", str(tmp_path / "run")]
    assert main(["train", "cmimh", "--data", str(out), *small]) == 0
    capsys.readouterr()
    assert "exists already; --force overwrites it" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "deep.csv", *DATA], "deep.csv: expected a name in .npz, got '.csv'"),
        (["--out", "deep.npz"], "expected --data, images with captions"),
        (["--out", "deep.npz", "--features", "lda", *DATA], "--features is for pairs; these are images with captions"),
        (["--out", "deep.npz", "--towers", "lite", *DATA], "towers must be IMAGE+TEXT"),
        (["--out", "deep.npz", "--towers", "torchvision/vgg16+minilm", *DATA], "or torchvision/NAME@FILE, got"),
    ],
)
def test_what_it_refuses(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "features", *arguments)
    assert not list(tmp_path.iterdir())
