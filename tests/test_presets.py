import json

import pytest

from cmr_fast.cli import main
from cmr_fast.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_preset_sets_the_defaults_and_flags_change_them(method, tmp_path):
    kind = METHODS[method]
    assert kind.presets, "every method brings the settings of its table"
    name, preset = next(iter(kind.presets.items()))
    out = tmp_path / "run"
    command = ["train", method, "--preset", name, "--options", "count=200", "--epochs", "1", "--batch-size", "20"]
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    stored = json.loads((out / "config.json").read_text())["config"]
    changed = {key for key, value in stored.items() if value != getattr(preset, key)}
    assert changed <= {"epochs", "batch_size"}
    assert stored != {key: getattr(kind.Config(), key) for key in stored}


def test_unknown_preset_is_refused_with_the_names(capsys):
    assert main(["train", "acmr", "--preset=nothing"]) == 2
    assert "paper, wikipedia" in capsys.readouterr().err
