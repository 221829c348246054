import json
from dataclasses import asdict

import pytest
import tiny_towers

from cmr_fast.cli import main
from cmr_fast.data import load_captions
from cmr_fast.methods import METHODS
from cmr_fast.methods.method import CaptionRetriever, Classifier
from cmr_fast.models.mlm import MaskedLM


@pytest.mark.parametrize("method", METHODS)
def test_preset_sets_the_defaults_and_flags_change_them(method, tmp_path):
    kind = METHODS[method]
    assert kind.presets, "every method brings the settings of its table"
    name, preset = next(iter(kind.presets.items()))
    out = tmp_path / "run"
    sizes = ["train=60", "test=20"] if issubclass(kind, Classifier) else ["count=200"]
    if issubclass(kind, CaptionRetriever):
        sizes = ["count=60"]
    length = "max_steps" if hasattr(preset, "max_steps") else "epochs"
    command = ["train", method, "--preset", name, "--options", *sizes, f"--{length.replace('_', '-')}", "1"]
    command += ["--batch-size", "20"]
    if issubclass(kind, CaptionRetriever):
        command += ["--towers", tiny_towers.towers(tmp_path, ["red"], load_captions("shapes", count=20).train.pixels())]
    if hasattr(preset, "mlm"):
        MaskedLM.scratch(["a red dog", "a red house"], vocabulary=60, width=32, layers=1).save(tmp_path / "mlm")
        command += ["--mlm", str(tmp_path / "mlm")]
    assert main([*command, "--out", str(out), "--quiet"]) == 0
    stored = json.loads((out / "config.json").read_text())["config"]
    chosen, paper = (json.loads(json.dumps(asdict(config))) for config in (preset, kind.Config()))
    changed = {key for key, value in stored.items() if value != chosen[key]}
    assert changed <= {length, "batch_size", "towers", "mlm"}
    assert stored != paper


def test_unknown_preset_is_refused_with_the_names(capsys):
    assert main(["train", "acmr", "--preset=nothing"]) == 2
    assert "paper, wikipedia" in capsys.readouterr().err
