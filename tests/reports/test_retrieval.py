import csv
import json
import re
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import CCA, CCAITQ
from cmr_fast.reports import figures, retrieval
from cmr_fast.reports.retrieval import (
    Score,
    baselines_for,
    evaluate_many,
    loss_panels,
    read_history,
    score,
    write_report,
)


def dataset(name: str = "tiny", multi_label: bool = False, count: int = 40) -> PairedDataset:
    def pairs(seed: int) -> Pairs:
        labels = torch.arange(count) % 4
        generator = torch.Generator().manual_seed(seed)
        image, text = (2 * torch.eye(4, d)[labels] + torch.randn(count, d, generator=generator) for d in (6, 5))
        hot = torch.nn.functional.one_hot(labels, 4).to(torch.uint8)
        return Pairs(image, text, hot if multi_label else labels)

    return PairedDataset(name, pairs(0), pairs(1), pairs(2), class_names=("a", "b", "c", "d"))


class Tagged(CCAITQ):
    """A code model with what a trained one has beside encode."""

    class config:
        bits = 16


def run_folder(path, text="epoch,embedding_loss,adversarial_loss,valid_map\n1,3,0.7,0.2\n2,2,0.69,\n"):
    path.mkdir()
    (path / "metrics.csv").write_text(text)
    return path


def test_scores_are_those_of_the_library():
    data = dataset()
    model = CCA(4).fit(data.train)
    found = score("cca", model, data)
    from cmr_fast.methods.evaluation import evaluate_model

    i2t_all = evaluate_model(model, data)["i2t"].map
    t2i_top = evaluate_model(model, data, k=50, convention="topk_hits")["t2i"].map
    numbers = found.numbers()
    assert numbers[0] == i2t_all and numbers[4] == t2i_top
    assert numbers[2] == (numbers[0] + numbers[1]) / 2 and numbers[5] == (numbers[3] + numbers[4]) / 2


def test_a_setting_that_the_metrics_refuse_does_not_stop_the_others():
    data = dataset()
    found = evaluate_many(CCA(4).fit(data.train), data, [{"k": 0}, {"k": 5}])
    assert isinstance(found[0], InputError) and 0 < found[1]["i2t"].map <= 1


def test_baselines_match_the_models_they_stand_beside():
    data = dataset()
    names = [name for name, _ in baselines_for([Tagged(16).fit(data.train), CCA(4).fit(data.train)], data)]
    assert names == ["CCA, 5 dims", "CCA-ITQ, 16 bits", "semantic matching", "random, 16 bits"]
    assert [name for name, _ in baselines_for([CCA(4)], data)] == [
        "CCA, 5 dims",
        "semantic matching",
        "random, 64 bits",
    ]


def test_report_writes_the_figures_of_the_papers_and_an_index_of_them(tmp_path):
    data = dataset()
    runs = [
        (run_folder(tmp_path / "one"), CCA(4).fit(data.train), data),
        (run_folder(tmp_path / "two"), Tagged(16).fit(data.train), data),
    ]
    out = tmp_path / "report"
    scores = write_report(runs, out, tsne_points=20)
    images = {path.name for path in out.glob("*.png")}
    assert images == {
        "precision-scope.png",
        "precision-at-k.png",
        "precision-recall.png",
        "precision-recall-radius.png",
        *(f"{kind}-{name}.png" for kind in ("losses", "tsne") for name in ("cca", "cca-itq-16-bits")),
    }
    for image in images:
        pixels = matplotlib.image.imread(out / image)
        assert min(pixels.shape[:2]) > 300 and np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 50
    assert set(re.findall(r"\]\(([^)]+\.png)\)", (out / "README.md").read_text())) == images
    assert set(re.findall(r'src="([^"]+)"', (out / "index.html").read_text())) == images
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [s.name for s in scores]
    assert float(rows[0]["I2T mAP(all)"]) == pytest.approx(scores[0].numbers()[0], abs=5e-5)


def test_an_earlier_report_is_kept_unless_forced_and_other_files_always(tmp_path):
    data = dataset()
    runs = [(run_folder(tmp_path / "run"), CCA(4).fit(data.train), data)]
    write_report(runs, tmp_path / "out", tsne_points=0, with_baselines=False)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        write_report(runs, tmp_path / "out", tsne_points=0)
    write_report(runs, tmp_path / "out", tsne_points=0, force=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_data_sets_get_figures_of_their_own(tmp_path):
    runs = []
    for name, hot in (("first set", False), ("second", True)):
        data = dataset(name, hot)
        runs.append((run_folder(tmp_path / name), CCA(4).fit(data.train), data))
    scores = write_report(runs, tmp_path / "out", tsne_points=10, with_baselines=False)
    assert [(s.name, s.data) for s in scores] == [("CCA (first set)", "first set"), ("CCA (second)", "second")]
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"precision-scope-first-set.png", "precision-scope-second.png", "tsne-cca-second.png"} <= names


def test_runs_of_one_name_and_other_features_are_told_apart(tmp_path):
    data, runs = dataset(), []
    parts = {split: getattr(data, split) for split in ("train", "query", "database")}
    wider = replace(data, **{n: Pairs(part.image, part.text.repeat(1, 2), part.labels) for n, part in parts.items()})
    relabelled = replace(data, query=Pairs(data.query.image, data.query.text, data.query.labels.flip(0)))
    for study, data_of_run in (("a", data), ("b", data), ("c", wider), ("d", relabelled)):
        (tmp_path / study).mkdir()
        runs.append((run_folder(tmp_path / study / "run-seed0"), CCA(4).fit(data_of_run.train), data_of_run))
    scores = write_report(runs, tmp_path / "out", tsne_points=10)
    first, wide = "tiny, images of 6 and texts of 5 (1)", "tiny, images of 6 and texts of 10"
    assert [(s.name, s.data) for s in scores if "run" in s.name] == [
        ("CCA (a-run-seed0)", first), ("CCA (b-run-seed0)", first), ("CCA (c-run-seed0)", wide),
        ("CCA (d-run-seed0)", "tiny, images of 6 and texts of 5 (2)"),
    ]  # fmt: skip
    of_baseline = {s.data: s.numbers() for s in scores if s.name == "semantic matching"}
    assert len(set(of_baseline.values())) == 3, "of each data set its own"
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {f"tsne-cca-{study}-run-seed0.png" for study in "abcd"} <= names
    with open(tmp_path / "out" / "precision-scope-tiny-images-of-6-and-texts-of-5-1.csv", newline="") as file:
        assert {"CCA (a-run-seed0)", "CCA (b-run-seed0)"} <= {row["model"] for row in csv.DictReader(file)}


def test_history_keeps_gaps_and_refuses_what_is_no_number(tmp_path):
    history = read_history(run_folder(tmp_path / "run"))
    assert history["embedding_loss"].tolist() == [3, 2] and np.isnan(history["valid_map"][1])
    assert list(loss_panels(history))[:3] == ["embedding loss", "adversarial loss", "validation mAP(all)"]
    with pytest.raises(InputError, match=r"metrics\.csv"):
        read_history(run_folder(tmp_path / "bad", "epoch,loss\n1,much\n"))
    assert np.isnan(read_history(run_folder(tmp_path / "cut", "epoch,loss\n1,2\n2"))["loss"]).tolist() == [False, True]
    assert read_history(tmp_path) == {}


def test_terms_of_both_modalities_share_a_panel():
    values = np.zeros(2)
    panels = loss_panels({"epoch": values, "loss": values, "rec_image": values, "rec_text": values, "seconds": values})
    assert {title: list(lines) for title, lines in panels.items()} == {"loss": ["loss"], "rec": ["image", "text"]}


def test_a_name_looks_the_same_whichever_others_are_drawn(tmp_path, monkeypatch):
    drawn = {}
    real = figures._look
    monkeypatch.setattr(figures, "_look", lambda number: drawn.setdefault(number, real(number)))
    x = np.arange(1, 4)
    curves = {"b": {"i2t": (x, x / 4), "t2i": (x, x / 4)}}
    figures.plot_directions(tmp_path / "x.png", "t", curves, "x", "y", looks=["a", "b"])
    assert list(drawn) == [1]


def test_score_table_in_print(capsys):
    from cmr_fast.reports.retrieval import print_results

    data = dataset()
    scores: list[Score] = [score(name, model, data) for name, model in baselines_for([CCA(4)], data)]
    print_results(scores, title="Results")
    out = capsys.readouterr().out
    assert out.startswith("Results\n") and f"{scores[0].numbers()[0]:.3f}" in out and "random, 64 bits" in out


def test_runs_that_differ_in_the_seed_alone_get_a_row_of_their_mean(tmp_path):
    data, runs = dataset(), []
    for seed, ridge, k in ((0, 1e-3, 3), (1, 10.0, 3), (0, 1e-3, 4)):  # of the last the config is another
        folder = run_folder(tmp_path / f"run{len(runs)}")
        run = {"seed": seed, "valid_fraction": 0.1, "out": str(folder)}
        (folder / "config.json").write_text(json.dumps({"method": "cca", "config": {"k": k}, "run": run}))
        runs.append((folder, CCA(4, ridge).fit(data.train), data))
    scores = write_report(runs, tmp_path / "out", tsne_points=0, with_baselines=False)
    assert scores[0].name == "CCA, 2 seeds" and len(scores) == 4
    of_seeds = np.array([s.numbers() for s in scores[1:3]])
    assert scores[0].numbers() == pytest.approx(of_seeds.mean(0))
    assert scores[0].deviations == pytest.approx(of_seeds.std(0, ddof=1))
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert first["I2T mAP(all)"] == f"{of_seeds[:, 0].mean():.4f} ± {of_seeds[:, 0].std(ddof=1):.4f}"
    with open(tmp_path / "out" / "precision-at-k.csv", newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["model"] == scores[1].name and row["direction"] == "i2t"]
    ks = np.array([int(row["K (items shown)"]) for row in curve])
    assert [float(row["precision at K"]) for row in curve] == pytest.approx(
        scores[1].curves["i2t"].precision_at(ks), abs=1e-6
    )


FULL = {"name": "tiny", "crc32": 1, "train": 40, "image_dim": 6, "text_dim": 5}


@pytest.mark.parametrize(
    ("two", "means"),
    [
        ({"seed": 1}, 1),
        ({"seed": 1, "crc32": 2}, 1),  # held out by the seed
        ({"seed": 0}, 0),  # a copy
        ({"seed": 0, "crc32": 2, "train": 50}, 0),  # on adversarial samples as well
        ({"seed": 1, "train": 50}, 0),
        ({"seed": 1, "text_dim": 9}, 0),  # other features under one name
    ],
)
def test_runs_on_other_data_and_of_one_seed_are_not_averaged(tmp_path, monkeypatch, two, means):
    for drawing in ("draw_curves", "draw_run"):
        monkeypatch.setattr(retrieval, drawing, lambda *_, **__: [])
    data, runs = dataset(), []
    for number, changes in enumerate(({"seed": 0}, two)):
        folder = run_folder(tmp_path / f"run{number}")
        about = {name: changes.get(name, value) for name, value in FULL.items()}
        run = {"seed": changes["seed"], "valid_fraction": 0.1, "out": str(folder)}
        stored = {"method": "cca", "config": {"k": 3}, "run": run, "data": about}
        (folder / "config.json").write_text(json.dumps(stored))
        runs.append((folder, CCA(4).fit(data.train), data))
    scores = write_report(runs, tmp_path / "out", tsne_points=0, with_baselines=False)
    assert sum("seeds" in one.name for one in scores) == means == len(scores) - 2
