"""What tests of methods on captions begin with: pictures of shapes, two small towers, a masked language model."""

import pytest
from small import ALPHA, EPS, STEPS

from cmr_fast.data import load_captions
from cmr_fast.methods import METHODS
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.methods.mat import PgdConfig


@pytest.fixture(scope="module")
def data():
    return load_captions("shapes", count=60)


@pytest.fixture(scope="module")
def start(tmp_path_factory, data):
    """A run of clip on two small towers, heads trained."""
    pytest.importorskip("transformers")
    import tiny_towers

    from cmr_fast.methods.clip import ClipConfig

    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    towers = tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels())
    config = ClipConfig(
        towers=towers, dim=8, hidden=8, dropout=0.0, epochs=5, head_epochs=5, batch_size=16, head_lr=1e-2, captions=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return train("clip", config, data, RunConfig(out=tmp_path_factory.mktemp("runs") / "clip", quiet=True)).path


@pytest.fixture(scope="module")
def mlm(tmp_path_factory, data):
    """A masked language model with random weights."""
    pytest.importorskip("transformers")
    from cmr_fast.models.mlm import MaskedLM

    folder = tmp_path_factory.mktemp("mlm")
    MaskedLM.scratch(data.train.captions()[0], vocabulary=200, width=32, layers=1).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_of(start, mlm):
    """Settings of a method, by its name."""

    def make(name, **changes):
        kind = METHODS[name]
        settings = {"start": str(start), "max_steps": 8, "batch_size": 12, "lr": 1e-2}
        if issubclass(kind.Config, PgdConfig):
            settings |= {"eps": EPS, "alpha": ALPHA, "steps": STEPS}
        words = {"mlm": mlm} if name in ("mat", "mmcoa") else {}
        return kind.completed(kind.Config(**settings | words | changes))

    return make
