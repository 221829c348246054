import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmr_fast.attacks import PGD
from cmr_fast.cli import main
from cmr_fast.data import Images, load_images
from cmr_fast.errors import InputError
from cmr_fast.methods.loop import load_model
from cmr_fast.methods.scatter import Scatter
from cmr_fast.reports import robustness
from cmr_fast.reports.reproduce import scatter
from cmr_fast.reports.reproduce.scatter import MADRY, OURS, PLAIN, Job, Scale

SIZE = Scale(
    {"depth": 10, "width": 1, "schedule": "cosine", "epochs": 2, "batch_size": 20}, train=60, images=16, few=3,
    white=("clean", "pgd3x2"), transfers=("pgd20",), steps=5, starts=4, batch_sizes=(20, 40), smoothings=(0.0, 0.5),
)  # fmt: skip


def study_of(out, seeds=1):
    return scatter.Robustness("shapes", out, seeds, True, SIZE, 1)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    scatter.reproduce("shapes", folder, (), (), 1, True, scale=SIZE)
    return folder


@pytest.fixture(scope="module")
def sections(out):
    study = study_of(out)
    return {item.name: item.make(study)[0] for item in scatter.ITEMS}


def test_svhn_is_trained_on_without_augmentation(tmp_path, monkeypatch):
    digits = replace(load_images("shapes", train=80, test=24), name="svhn")
    monkeypatch.setattr(scatter, "load_images", lambda data: digits)
    study = study_of(tmp_path)
    assert not Job(OURS, 0).config(study.size).augment and Job(OURS, 0).config(SIZE).augment


def test_each_training_is_the_papers_but_for_the_scale():
    paper = scatter.SCALES["paper"]
    for row, config in scatter.ROWS.items():
        assert Job(row, 0).config(paper) == config, "the paper's scale changes nothing"
    small = Job(OURS, 1, (("smoothing", 0.2),)).config(scatter.SCALES["small"])
    assert (small.depth, small.epochs, small.smoothing, small.ot_grad) == (10, 12, 0.2, "unrolled")
    assert scatter.ROWS[scatter.ENVELOPE].ot_grad == "envelope"
    assert scatter.ROWS[scatter.IDENTITY].ot_solver == "identity"
    madry = scatter.ROWS[MADRY]
    assert (madry.perturb, madry.steps, madry.smoothing) == ("madry", 7, 0.0)
    assert madry.alpha == pytest.approx(2 / 255)


def test_every_part_is_in_one_report_with_the_papers_numbers(out, sections):
    assert list(sections) == ["Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Figure 1"]
    text = (out / "README.md").read_text()
    for number in ("89.0", "81.6", "49.9 / 48.5", "89.9", "58.7", "35.3", "46.1"):
        assert number in text
    assert "nan" not in text and "WRN-10-1, 2 epochs of 60 images" in text
    for name, section in sections.items():
        assert f"## {name}. {section.title}" in text and all(note in text for note in section.notes)
        assert all(len(row) == len(section.head) for row in section.rows)
    for name in ("loss-starts.png", "batch-size.png", "smoothing.png"):
        assert f"({name})" in text and (out / name).stat().st_size > 5000
    (file,) = out.glob("table-2*.csv")
    with open(file, newline="") as opened:
        assert list(csv.reader(opened)) == [list(sections["Table 2"].head), *map(list, sections["Table 2"].rows)]
    assert len(list((out / "runs").iterdir())) == 11, "six rows, two surrogates, a batch size, two smoothings"


def models(out, *jobs):
    return [load_model(out / "runs" / job.name) for job in jobs]


def test_white_box_has_the_lowest_run_and_max_less_min(out, sections):
    study = study_of(out)
    x, y = study.x, study.y
    assert len(x) == 16
    for row in (PLAIN, OURS):
        (model,) = models(out, Job(row, 0))
        right = []
        for seed in (0, 1):
            adv = PGD(model, 8 / 255, None, 3, seed=seed)(x, y, index=np.arange(16))
            right.append(float(((model(x).argmax(1) == y) & (model(adv).argmax(1) == y)).float().mean()))
        (cells,) = (r for r in sections["Table 2"].rows if r[0] == row)
        assert cells[1] == f"{100 * float((model(x).argmax(1) == y).float().mean()):.1f}"
        assert cells[2] == f"{100 * min(right):.1f} ({100 * (max(right) - min(right)):.1f})"


def test_black_box_is_crafted_on_networks_of_another_seed(out, sections):
    study = study_of(out)
    x, y = study.x, study.y
    assert len(x) == 16
    victim, undefended, siamese = models(out, Job(OURS, 0), Job(PLAIN, 1), Job(OURS, 1))
    assert (undefended.config.perturb, siamese.config) == ("none", victim.config)
    clean = victim(x).argmax(1) == y
    for surrogate, cells in ((undefended, sections["Table 1"].rows[0]), (siamese, sections["Table 1"].rows[2])):
        few = PGD(surrogate, 8 / 255, None, 20, seed=0)(x[clean], y[clean], index=clean.nonzero()[:, 0])
        left = (victim(few).argmax(1) == y[clean]).sum() / 16
        assert cells[1] == f"{100 * float(left):.1f}"
    assert [r[0] for r in sections["Table 1"].rows] == ["undefended", "undefended, paper", "siamese", "siamese, paper"]


def test_sweeps_train_what_they_change_and_share_the_rest(out, sections):
    (small, large) = models(out, Job(OURS, 0), Job(OURS, 0, (("batch_size", 40),)))
    assert (small.config.batch_size, large.config) == (20, replace(small.config, batch_size=40))
    (smoothed,) = models(out, Job(MADRY, 0, (("smoothing", 0.5),)))
    assert (smoothed.config.smoothing, smoothed.config.perturb) == (0.5, "madry")
    assert sections["Table 4"].rows[1] == ["paper, PGD-100", "", "58.7"]


def test_the_loss_plot_is_of_all_starts(out, sections):
    """Mean and deviation over starts of the loss before the last step."""
    study = study_of(out)
    for row, mean, deviation, _ in sections["Figure 1"].rows:
        ((job,), name) = study.victims(row), "pgd5x4"
        curves = np.array(study.attacked(job, [name])[name].curves)
        assert curves.shape == (4, 5)
        assert (mean, deviation) == (f"{curves[:, -1].mean():.3f}", f"{curves[:, -1].std(ddof=1):.4f}")
    assert sections["Figure 1"].rows


def test_the_local_search_is_the_footnotes_and_leaves_the_ball(out, sections):
    study = study_of(out)
    found = study.attacked(Job(PLAIN, 0), ["clean", "local-search-pixels"])
    cells = sections["Table 3"].rows[0]
    assert cells[:3] == [PLAIN, *(scatter.percent([float(o.right[:3].double().mean())]) for o in found.values())]
    assert not found["local-search-pixels"].in_ball and sections["Table 3"].rows[2][-1] == "89.9"


def test_a_study_goes_on_and_is_made_once(out, monkeypatch):
    before = (out / "README.md").read_text()
    monkeypatch.setattr(scatter, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(robustness, "_run", lambda *a: pytest.fail("attacked again"))
    scatter.reproduce("shapes", out, (), (), 1, True, scale=SIZE)
    assert (out / "README.md").read_text() == before
    with pytest.raises(InputError, match="holds another study, its data's crc32"):
        scatter.reproduce("shapes", out, (), (), 1, True, scale=replace(SIZE, train=59))


def test_a_study_is_described_by_all_its_images(tmp_path):
    before, study = study_of(tmp_path), study_of(tmp_path)
    assert before.described() == study.described()
    for part in ("train", "test"):
        images = getattr(before.images, part)
        study.images = replace(before.images, **{part: Images(images.image.flip(3), images.labels)})
        assert study.described() != before.described()


def test_nothing_is_held_out_and_the_last_weights_are_kept(out):
    run = json.loads((out / "runs" / Job(OURS, 0).name / "config.json").read_text())["run"]
    assert (run["valid_fraction"], run["patience"]) == (0.0, 0) == tuple(Scatter.protocol.values())
    results = json.loads((out / "runs" / Job(OURS, 0).name / "results.json").read_text())
    assert results["best_epoch"] == results["epochs"] == 2


def test_over_seeds_numbers_are_means_with_deviations(tmp_path):
    scatter.reproduce("shapes", tmp_path, (1,), (), 2, True, scale=SIZE)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "feature-scattering-seed0", "feature-scattering-seed1", "feature-scattering-seed2", "plain-seed2"
    }  # fmt: skip
    (section,) = scatter.black_box(study_of(tmp_path, seeds=2))
    assert "±" in section.rows[0][1] and "±" not in section.rows[1][1]
    assert scatter.percent([0.2, 0.4]) == "30.0 ± 14.1" and scatter.percent([0.25]) == "25.0"


def test_trainings_side_by_side_are_those_one_after_the_other(out, tmp_path):
    scatter.reproduce("shapes", tmp_path, (4,), (), 1, True, scale=SIZE, jobs=2)
    jobs = Job(OURS, 0), Job(OURS, 0, (("batch_size", 40),))
    for here, there in zip(models(out, *jobs), models(tmp_path, *jobs), strict=True):
        assert all(torch.allclose(v, there.state_dict()[n], atol=1e-3) for n, v in here.state_dict().items())


def test_attacks_side_by_side_are_those_one_after_the_other(out, tmp_path, monkeypatch):
    shutil.copytree(out / "runs", tmp_path / "runs")
    study = scatter.Robustness("shapes", tmp_path, 1, True, SIZE, 2)
    victims, surrogates, transfers = [Job(PLAIN, 0), Job(OURS, 0)], [Job(PLAIN, 1), Job(OURS, 1)], ["transfer-pgd20"]
    study.attack(victims, SIZE.white)
    study.attack([Job(OURS, 0)], transfers, surrogates)
    monkeypatch.setattr(robustness, "_run", lambda *a: pytest.fail("attacked again"))
    before = study_of(out)
    wanted = [(job, SIZE.white, None) for job in victims] + [(Job(OURS, 0), transfers, other) for other in surrogates]
    for job, names, other in wanted:
        ours, theirs = study.attacked(job, names, other), before.attacked(job, names, other)
        for name in names:
            assert torch.equal(ours[name].right, theirs[name].right) and ours[name].runs == theirs[name].runs


def test_the_loss_plot_attacks_its_first_images_and_quiet_says_nothing(out, tmp_path, monkeypatch):
    shutil.copytree(out / "runs", tmp_path / "runs")
    seen, said, attack, counting = [], [], scatter.attack_all, robustness.counting

    def attacked(model, x, y, *rest, **options):
        seen.append(x)
        return attack(model, x, y, *rest, **options)

    monkeypatch.setattr(scatter, "attack_all", attacked)
    monkeypatch.setattr(robustness, "counting", lambda total, what: said.append(what) or counting(total, what))
    monkeypatch.setattr(scatter, "PLOTTED", 5)
    study = study_of(tmp_path)
    (section,) = scatter.loss_plot(study)
    assert len(seen) == 3 and all(torch.equal(x, study.x[:5]) for x in seen)
    assert "over those of 5 images" in section.notes[0] and not said
    scatter.Robustness("shapes", tmp_path, 1, False, SIZE, 1).attacked(Job(PLAIN, 0), ["pgd3x2"])
    assert said == ["attacking plain-seed0"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scatter.SCALES, "tiny", SIZE)
    folder = tmp_path / "out"
    command = ["reproduce", "scatter", "--data", "shapes", "--table", "4", "--out", str(folder)]
    assert main(command) == 0
    assert "Report:" in capsys.readouterr().out and "Table 4" in (folder / "README.md").read_text()
    assert len(list((folder / "runs").iterdir())) == 2
    assert main(["reproduce", "acmr", "--data", "shapes", "--scale", "small", "--out", str(tmp_path / "acmr")]) == 2
    assert "--scale is for scatter" in capsys.readouterr().err
    assert not (tmp_path / "acmr").exists()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((), ()), {"scale": "huge"}, "scale must be one of tiny, small, paper, got 'huge'"),
        (((6,), ()), {}, "table 6 is not made here; expected some of Table 1"),
        (((), ()), {"jobs": 0}, "jobs must be 1 or more"),
    ],
)
def test_refuses(tmp_path, arguments, options, message):
    with pytest.raises(InputError, match=message):
        scatter.reproduce("shapes", tmp_path / "out", *arguments, 1, True, **options)
    assert not (tmp_path / "out").exists()
