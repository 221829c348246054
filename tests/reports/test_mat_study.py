"""MAT's study: every row trained and attacked once, resumed, told in words."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_towers
from torch.testing import assert_close

from cmr_fast.cli import main
from cmr_fast.data import load_captions
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.models.mlm import MaskedLM
from cmr_fast.reports import mat_study
from cmr_fast.reports.mat_study import Hits, Scale

DATA = ["--data", "shapes", "--options", "count=40"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of clip on two small towers, and a masked language model."""
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("begun")
    data = load_captions("shapes", count=40)
    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    config = ClipConfig(
        towers=tiny_towers.towers(place, words, data.train.pixels()), dim=8, hidden=8, epochs=2, head_epochs=2,
        batch_size=16, head_lr=1e-2,
    )  # fmt: skip
    MaskedLM.scratch(data.train.captions()[0], vocabulary=200, width=32, layers=1).save(place / "mlm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        train("clip", config, data, RunConfig(out=place / "clip", quiet=True, valid_fraction=0.0))
    return ["--start", str(place / "clip"), "--mlm", str(place / "mlm")]


@pytest.fixture(autouse=True)
def least(monkeypatch):
    monkeypatch.setitem(mat_study.SCALES, "tiny", Scale(2, 8, 1, 1 / 255, 1e-2, 4, 1))
    monkeypatch.setattr(mat_study, "ATTACKS", ("pgd2", "bert-attack", "co-attack", "sga"))
    monkeypatch.setattr(mat_study, "HEAD", ("trained by", *("clean", "worst") * 6))


def seen(page, folder):
    """What a browser without a network shows of a page: rows and findings in sight, figures, and those that failed."""
    asked = page.with_name("asked.html")
    asked.write_text(
        page.read_text()
        + """<script>
        const all = selector => [...document.querySelectorAll(selector)];
        const shown = item => item.getBoundingClientRect().height > 0;
        addEventListener("load", () => document.body.replaceChildren(JSON.stringify({
            rows: all("tr").filter(shown).length, findings: all("li").filter(shown).length, figures: all("img").length,
            "not shown": all("img").filter(image => image.naturalWidth < 100 || !shown(image)).map(image => image.src),
        })));
        </script>"""
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", asked.as_uri()]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    asked.unlink()
    return json.loads(dom[dom.index("<body>") + 6 : dom.index("</body>")])


def test_the_command_ends_with_a_report_and_goes_on_where_it_was(begun, tmp_path, capsys, monkeypatch):
    out = tmp_path / "study"
    command = ["study", "mat", *DATA, *begun, "--out", str(out), "--rows", "finetune", "MAT", "MA2T Human"]
    trained = []
    original = mat_study.train

    def dying(method, *arguments):
        trained.append(method)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(method, *arguments)

    monkeypatch.setattr(mat_study, "train", dying)
    assert main(command) == 130
    assert main(command) == 0
    assert trained == ["finetune", "mat", "mat", "mat"]
    said = capsys.readouterr().out
    assert "MAT over clean fine-tuning (Table 1): " in said and "narrow the gap" in said
    results = json.loads((out / "results.json").read_text())
    assert list(results["recalls"]) == ["start", "finetune", "MAT", "MA2T Human"] and results["images"] == 4
    assert len(results["findings"]) == 4
    for told in results["findings"]:
        assert told["low"] <= told["difference"] <= told["high"]
        assert told["verdict"].startswith(("holds", "the reverse holds", "cannot be told", "nothing to tell"))
    assert list(results["figures"]["densities"]["alignment"]) == ["Orig.", "EDA", "Human", "RandAug"]
    for file in ("index.html", "README.md", "results.csv", "recall.png", "figure-1.png", "figure-2.png"):
        assert (out / file).stat().st_size > 0
    if shutil.which("chromium"):
        assert seen(out / "index.html", tmp_path) == {"rows": 5, "findings": 6, "figures": 3, "not shown": []}
    before = (out / "README.md").read_text()
    assert main(command) == 0 and trained == ["finetune", "mat", "mat", "mat"]
    assert (out / "README.md").read_text() == before
    monkeypatch.setitem(mat_study.SCALES, "tiny", Scale(3, 8, 1, 1 / 255, 1e-2, 4, 1))
    assert main(command) == 2
    assert "a run of other settings" in capsys.readouterr().err


def test_nothing_is_told_of_a_training_that_broke_the_model():
    def row(clean, attacked):
        owner = np.repeat(np.arange(100), 2)
        ways = {"clean": clean, "co-attack": attacked, "sga": attacked}
        found = {
            name: {"tr": np.arange(100)[:, None] < count, "ir": np.arange(200)[:, None] < 2 * count}
            for name, count in ways.items()
        }
        return [{"test": mat_study.Hits(found, owner)}]

    hits = {"start": row(60, 0), "finetune": row(50, 0), "MAT": row(5, 5), "MAT_Img": row(20, 0)}
    told = {each["finding"]: each for each in mat_study._findings(hits)}
    verdicts = {words.split(":")[0]: each["verdict"] for words, each in told.items()}
    assert verdicts["Multimodal training defends"] == "nothing to tell, MAT finds next to nothing unattacked"
    assert told[mat_study.FINDINGS[0].words]["difference"] == pytest.approx(0.05)
    hits["MAT"] = row(40, 30)
    assert mat_study._findings(hits)[0]["verdict"] == "holds here"


def test_later_work_joins_where_it_is_asked_for(begun, tmp_path, capsys):
    out = tmp_path / "study"
    assert main(["study", "mat", *DATA, *begun, "--out", str(out), "--rows", "MAT", *mat_study.LATER]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["recalls"]) == ["start", "MAT", "MMCoA", "FARE", "LEAF"]
    configs = [
        json.loads((out / "runs" / f"{n}-seed0" / "config.json").read_text())["config"] for n in ("fare", "leaf")
    ]
    assert [c["lr"] for c in configs] == [1e-5, 1e-5] and configs[0]["steps"] == 1 and "mlm" not in configs[1]


def test_a_defence_at_test_time_is_attacked_through_and_trains_nothing(begun, tmp_path, monkeypatch):
    out = tmp_path / "study"
    through = []
    original = mat_study.examine_adaptive

    def watched(defended, *arguments, **options):
        through.append((defended.seed, arguments[1]))
        return original(defended, *arguments, **options)

    monkeypatch.setattr(mat_study, "examine_adaptive", watched)
    command = ["study", "mat", *DATA, *begun, "--out", str(out), "--rows", "TTC", "--seeds", "0", "3", "--quiet"]
    assert main(command) == 0 and main(command) == 0
    assert through == [(0, mat_study.ATTACKS), (3, mat_study.ATTACKS)]
    assert list(json.loads((out / "results.json").read_text())["recalls"]) == ["start", "TTC"]
    assert not (out / "runs").exists()


def test_hits_of_another_model_or_without_an_attack_are_refused(begun, tmp_path, capsys):
    place, out = Path(begun[1]), tmp_path / "study"
    start = tmp_path / "clip"
    shutil.copytree(place, start)
    command = ["study", "mat", *DATA, "--start", str(start), *begun[2:], "--out", str(out), "--rows", "TTC", "--quiet"]
    assert main(command) == 0
    for name in ("start", "ttc"):
        file = out / "hits" / f"{name}-seed0.npz"
        with np.load(file) as stored:
            before = dict(stored)
        np.savez(file, **{key: value for key, value in before.items() if not key.startswith("sga/")})
        capsys.readouterr()
        assert main(command) == 2
        assert f"{name}-seed0.npz: holds no hits of sga; remove it" in capsys.readouterr().err
        file.unlink()
        assert main(command) == 0
        with np.load(file) as stored:
            assert all(np.array_equal(stored[key], value) for key, value in before.items())
    data = load_captions("shapes", count=40)
    again = RunConfig(out=start, seed=1, quiet=True, valid_fraction=0.0)
    config = load_model(start).config
    shutil.rmtree(start)
    train("clip", config, data, again)
    for name in ("start", "ttc"):
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{name}-seed0.npz: hits of a model whose weights have checksum" in said
        (out / "hits" / f"{name}-seed0.npz").unlink()
    assert main(command) == 0


def test_another_data_set_or_masked_lm_is_refused_and_not_told_as_this_one(begun, tmp_path, capsys):
    mlm, rows = tmp_path / "mlm", ["--rows", "finetune", "--quiet"]
    shutil.copytree(begun[3], mlm)
    command = ["study", "mat", *DATA, *begun[:2], "--mlm", str(mlm), "--out", str(tmp_path / "study"), *rows]
    assert main(command) == 0
    before = (tmp_path / "study" / "README.md").read_text()
    other = [*command, "--options", "count=40", "seed=1"]
    assert main(other) == 2
    assert "start-seed0.npz: hits of images and captions that have checksum" in capsys.readouterr().err
    (tmp_path / "study" / "hits" / "start-seed0.npz").unlink()
    assert main(other) == 2  # the trained row is of the first data too
    assert "finetune-seed0: cannot be resumed, data crc32 was" in capsys.readouterr().err
    (tmp_path / "study" / "hits" / "start-seed0.npz").unlink()
    MaskedLM.scratch(["a red dog", "a blue cat"], vocabulary=60, width=32, layers=1).save(mlm)
    assert main(command) == 2
    assert "finetune-seed0.npz: hits of a masked language model whose weights" in capsys.readouterr().err
    assert (tmp_path / "study" / "README.md").read_text() == before


def test_figures_of_number_and_strength_are_trainings_that_go_on(begun, tmp_path, capsys, monkeypatch):
    out = tmp_path / "study"
    train_split = load_captions("shapes", count=40).train
    made = {str(n): [f"a {n} {k}" for k in range(5)] for n in train_split.labels.tolist()}
    (tmp_path / "rw.json").write_text(json.dumps(made))
    command = ["study", "mat", *DATA, *begun, "--out", str(out), "--rows", "MA2T LangRW"]
    command += ["--figures", "3b", "5", "--augment-text", f"LangRW={tmp_path / 'rw.json'}"]
    trained = []
    original = mat_study.train

    def dying(method, *arguments):
        trained.append(arguments[2].out.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return original(method, *arguments)

    monkeypatch.setattr(mat_study, "train", dying)
    assert main(command) == 130
    assert main(command) == 0
    names = [f"figure-human-random-count{n}-seed0" for n in range(1, 5)]
    names += [f"figure-texts-rw-{select}-count{n}-seed0" for select in ("top", "random") for n in range(1, 5)]
    names = ["ma2t-langrw-seed0", "mat-img-seed0", *names]
    assert trained == [*names[:4], *names[3:]]
    results = json.loads((out / "results.json").read_text())
    assert list(results["recalls"]) == ["start", "MA2T LangRW"]
    swept = results["figures"]["sweeps"]
    assert [point["x"] for point in swept["5"]["Top"]] == [0, 1, 2, 3, 4]
    with np.load(out / "hits" / "figure-texts-rw-top-count2-seed0.npz") as stored:
        assert swept["5"]["Top"][2]["sga"] == {way: float(stored[f"sga/{way}"][:, 0].mean()) for way in ("tr", "ir")}
        assert "pgd2/tr" not in stored
    with np.load(out / "hits" / "mat-img-seed0.npz") as stored:
        assert "pgd2/tr" in stored
    assert len((out / "sweeps.csv").read_text().splitlines()) == 1 + 2 * (5 + 10)
    page = (out / "index.html").read_text()
    for number in ("1", "2", "3b", "5"):
        assert (out / f"figure-{number}.png").stat().st_size > 0 and f"figure-{number}.png" in page
    before = (out / "README.md").read_text()
    assert main(command) == 0 and len(trained) == len(names) + 1 and (out / "README.md").read_text() == before
    capsys.readouterr()
    assert main([*command, "--figures", "3a"]) == 2
    assert "figure 3a is of SD: expected --augment-image SD=FILE" in capsys.readouterr().err


def test_what_is_not_there_is_refused(begun, tmp_path, capsys):
    command = ["study", "mat", *DATA, *begun, "--out", str(tmp_path / "study")]
    assert main([*command, "--rows", "PMG"]) == 2
    assert "rows must be of finetune, TeCoA" in capsys.readouterr().err
    assert main(["study", "mat", *DATA, "--start", str(tmp_path / "no"), "--mlm", str(tmp_path)]) == 2
    assert "no: no such file or folder" in capsys.readouterr().err


def hits(tr, ir, owner):
    return Hits({"clean": {"tr": np.array(tr)[:, None] > 0, "ir": np.array(ir)[:, None] > 0}}, np.array(owner))


def test_an_image_counts_with_its_captions_and_a_difference_with_its_interval():
    found = hits([1, 0], [1, 0, 1], [0, 0, 1])
    assert_close(mat_study._scores([found], ["clean"]), np.array([0.75, 0.5]))
    random = np.random.default_rng(1)
    a = random.random(200)
    difference, low, high = mat_study._interval([a + 0.5, -a])
    error = 1.96 * np.sqrt(2 * a.var() / 200)
    assert difference == pytest.approx(0.5) and abs(low - (0.5 - error)) < 0.01 and abs(high - (0.5 + error)) < 0.01
    for shift, verdict in ((0.5, "holds here"), (-0.5, "the reverse holds here"), (0.0, "cannot be told here")):
        assert mat_study._told("x", [a - a.mean() + shift])["verdict"] == verdict
