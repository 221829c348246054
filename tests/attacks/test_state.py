"""What attacks keep between calls, and what they look at: tests of the right value where it once was another."""

import threading

import pytest
import torch
from torch import nn

from cmr_fast import attacks
from cmr_fast.attacks import checks, registry
from cmr_fast.attacks.codes import Budget, Perturbation
from cmr_fast.attacks.victim import Victim
from cmr_fast.errors import InputError
from cmr_fast.reports.robustness import Settings, attack_all


def test_recall_is_measured_on_normalised_queries():
    encode, (mean, std) = nn.Linear(6, 4), (0.4, 0.2)
    x = torch.rand(10, 6, generator=torch.Generator().manual_seed(0))
    gallery = encode((x - mean) / std).detach()
    report = attacks.recall_under_attack(
        encode, x, gallery, torch.eye(10).bool(), eps=1e-6, k=(1,), attacks=["pgd1"], normalize=(mean, std)
    )
    assert report.clean == {1: 1.0}


def test_a_ranking_has_the_loss_of_its_attack():
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match="the loss of pgd3 is in its name"):
        registry.make("pgd3", model, eps=0.1, loss="ce")


def test_kept_outcomes_are_those_of_the_same_function(tmp_path):
    x, y = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64)

    def right(x):
        return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    settings = Settings(images=8, few=4)
    for function, accuracy in ((right, 1.0), (lambda x: -right(x), 0.0), (right, 1.0)):
        assert attack_all(function, x, y, ["clean"], settings, keep=tmp_path)["clean"].accuracy == accuracy


def test_kept_outcomes_of_a_16_bit_model(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).bfloat16()
    x, y = torch.rand(8, 3, 4, 4).bfloat16(), torch.zeros(8, dtype=torch.int64)
    attack_all(model, x, y, ["clean"], Settings(images=8, few=4), keep=tmp_path)


class _Centre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        return x - self.mean


def test_a_folded_copy_is_of_the_model_of_now():
    torch.manual_seed(0)
    model = nn.Sequential(
        _Centre(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    x, y = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 0])
    atk = attacks.PGD(model, eps=0.1, steps=2, fold=True, random_start=False)
    atk(x, y)
    model[0].mean = torch.full((1,), 5.0)
    fresh = attacks.PGD(model, eps=0.1, steps=2, fold=True, random_start=False)
    assert torch.equal(atk(x, y), fresh(x, y))


def test_running_statistics_are_put_back_by_the_last_of_two_attacks():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    victim, x = Victim(model), torch.rand(6, 3)
    victim.training = (True, True, False)
    before = model[0].running_mean.clone()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with victim.prepare(x) as call:
            call.outputs(x)
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with victim.prepare(x) as call:
        call.outputs(x)
        leave.set()
        thread.join()
    assert torch.equal(model[0].running_mean, before)


def test_a_black_box_check_names_every_attack():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(16, 3, 2, 2)
    y = model(x).argmax(1)
    strong, weak = (attacks.PGD(model, eps=eps, steps=3) for eps in (0.9, 0.0))
    finding = checks.black_box(model, x, y, eps=1e-6, attacks=[strong, weak])
    assert finding.suspicious and finding.numbers["PGD 1"] < finding.numbers["PGD 2"] == finding.numbers["PGD"] == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_perturbations_of_codes_stay_in_their_budget_whatever_rounds(norm, dtype):
    clean = torch.full((2, 1000), 0.75)
    ulp = 2.0**-24
    for eps in (0.03, 0.99 * 1000 * ulp, 1.5 * ulp, 0.0):
        run = Perturbation(clean, Budget(eps, norm, (0.0, 1.0), 1.0), 1, "sign", one_sided=False)
        run.noise = torch.full_like(clean, 0.99 * ulp if eps < 0.03 else 0.02)
        out = run.result(dtype)
        assert torch.equal(out, out.to(dtype).float())
        moved = out.double() - clean.double()
        assert bool((torch.linalg.vector_norm(moved, float(norm[1:] if norm != "linf" else "inf"), 1) <= eps).all())


def test_16_bit_inputs_of_cmla_come_back_within_their_budgets():
    torch.manual_seed(0)
    image, text, labels = torch.rand(6, 8).half(), torch.rand(6, 5).half(), torch.arange(6) % 2
    model = nn.Linear(8, 16), nn.Linear(5, 16)
    result = attacks.CMLA(model, steps=20, optimizer="sign")(image, text, labels)
    for moved, clean, eps in ((result.image, image, 10 / 255), (result.text, text, 0.01)):
        assert moved.dtype == torch.float16
        assert 0 < float((moved.double() - clean.double()).abs().max()) <= eps


@pytest.mark.parametrize(
    ("attack", "odd"),
    [
        ("CMLA", {"steps": 1.5}),
        ("CMLA", {"single_modal": "no"}),
        ("CMLA", {"image_eps": "3"}),
        ("CMLA", {"image_bounds": 3}),
        ("CMLA", {"intra": "1"}),
        ("CMLA", {"batch": 0}),
        ("CodeAttack", {"steps": -1}),
        ("CodeAttack", {"away": "no"}),
        ("CodeAttack", {"batch": True}),
        ("CodeAttack", {"lr": 0}),
    ],
)
def test_settings_of_attacks_on_codes_are_checked(attack, odd):
    (name,) = odd
    with pytest.raises(InputError, match=name):
        getattr(attacks, attack)((nn.Linear(8, 16), nn.Linear(5, 16)), **odd)
