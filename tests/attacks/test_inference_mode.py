"""Attacks where gradients are off: torch.inference_mode, no_grad, Lightning's validation; models made there."""

import copy

import pytest
import torch
from networks import samples
from torch import nn

import cmr_fast as cf
from cmr_fast.attacks import checks
from cmr_fast.errors import InputError
from cmr_fast.reports import robustness

attacks = cf.attacks
EPS = 8 / 255
MAKERS = {
    "PGD": lambda m: attacks.PGD(m, EPS, None, 4),
    "PGD L2": lambda m: attacks.PGD(m, 0.5, None, 4, norm="l2", momentum=0.5, restarts=2, early_stop=True),
    "PGD targeted": lambda m: attacks.PGD(m, EPS, None, 4, targeted="random"),
    "PGD normalised": lambda m: attacks.PGD(m, EPS, None, 4, normalize=(torch.full((3,), 0.4), torch.full((3,), 0.3))),
    "PGD values per sample": lambda m: attacks.PGD(m, torch.full((12,), EPS), torch.full((12,), EPS / 4), 4),
    "PGD channels_last": lambda m: attacks.PGD(m, EPS, None, 4, channels_last=True),
    "PGD fold": lambda m: attacks.PGD(m, EPS, None, 4, fold=True, channels_last=True),
    "PGD bf16": lambda m: attacks.PGD(m, EPS, None, 4, dtype=torch.bfloat16),
    "FGSM": lambda m: attacks.FGSM(m, EPS),
    "MIFGSM": lambda m: attacks.MIFGSM(m, EPS, None, 4),
    "CW": lambda m: attacks.CW(m, EPS, None, 4),
    "APGD": lambda m: attacks.APGD(m, EPS, 6, loss="dlr", restarts=2),
    "APGDT": lambda m: attacks.APGDT(m, EPS, 4, targets=2),
    "FeatureScatter": lambda m: attacks.FeatureScatter(m, steps=2, alpha=EPS / 4),
    "FeatureScatter unrolled": lambda m: attacks.FeatureScatter(m, ot_grad="unrolled", group=5),
    "FeatureScatter ipot": lambda m: attacks.FeatureScatter(m, solver="ipot", reg=1.0),
    "LocalSearch": lambda m: attacks.LocalSearch(m, EPS, 3),
}


def call(make, model, x, y, inference):
    """The attack, its inputs and its call, all inside inference mode or all outside."""
    with torch.inference_mode(inference):
        if inference:
            x, y = x.clone(), y.clone()
            assert x.is_inference()
        return make(model)(x, y, return_info=True)


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_bits_as_outside(model, name):
    """Modes, flags and weights as before; the result can be trained on."""
    model = copy.deepcopy(model).train()
    x, y = samples(12)
    (want, wanted), (adv, info) = (call(MAKERS[name], model, x, y, inference) for inference in (False, True))
    assert torch.equal(adv, want) and torch.equal(info.success, wanted.success)
    assert not adv.is_inference() and not torch.equal(adv, x)
    assert model.training and all(p.requires_grad for p in model.parameters())
    nn.functional.cross_entropy(model(adv), y).backward()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_a_model_made_there(model, name, inside):
    """autograd cannot save its weights, so the module's are copied; training them elsewhere is not our matter."""
    with torch.inference_mode():
        made = copy.deepcopy(model).train()
        made.load_state_dict({key: value.clone() for key, value in made.state_dict().items()})
        for holder in made.modules():
            for key, p in list(holder.named_parameters(recurse=False)):
                setattr(holder, key, nn.Parameter(p.clone(), requires_grad=False))
            for key, b in list(holder.named_buffers(recurse=False)):
                holder.register_buffer(key, b.clone())
    assert next(made.parameters()).is_inference() and made[1].running_mean.is_inference()
    x, y = samples(12)
    want = call(MAKERS[name], model, x, y, False)[0]
    assert torch.equal(call(MAKERS[name], made, x, y, inside)[0], want) and made.training


def test_a_function_that_holds_such_weights_is_named(model):
    x, y = samples(4)
    with torch.inference_mode():
        weight = torch.randn(192, 5)
    with pytest.raises(InputError, match=r"made under torch\.inference_mode.*pass the torch module itself"):
        attacks.PGD(lambda z: z.flatten(1) @ weight, EPS, None, 1)(x, y)


def test_transfer_rankings_checks_and_reports(model):
    x, y = samples(12)
    other = copy.deepcopy(model)
    other[7].weight.data.mul_(1.1)
    relevant = torch.eye(12, dtype=torch.bool)
    settings = robustness.Settings(images=12, few=4, batch=5)

    def everything():
        gallery = other.eval()(x).detach()
        ranked = attacks.recall_under_attack(
            model, x, gallery, relevant, k=(1,), eps=EPS, attacks=("pgd3", "apgd5-dlr", "noise2")
        )
        crafted, info = attacks.Transfer(model, other, eps=EPS, steps=2)(x, y, return_info=True)
        outcomes = robustness.attack_all(model, x, y, ["clean", "pgd3x2", "cw3", "transfer-pgd2"], settings,
                                         surrogate=other)  # fmt: skip
        found = (
            checks.zero_gradient(model, x, y),
            checks.black_box(model, x, y, steps=2),
            checks.plateau(model, x, y, steps=5),
        )
        return ranked, crafted, info, {n: o.right.tolist() for n, o in outcomes.items()}, found

    want = everything()
    with torch.inference_mode():
        x, y = x.clone(), y.clone()
        got = everything()
    assert got[0].by_attack == want[0].by_attack and torch.equal(got[1], want[1])
    assert torch.equal(got[2].success, want[2].success) and got[3:] == want[3:]


def test_torchattacks_attacks_there(model):
    pytest.importorskip("torchattacks")
    x, y = samples(6)
    for make in (lambda m: attacks.Square(m, 0.1, 20), lambda m: attacks.FAB(m, 0.1, 3)):
        (want, _), (adv, _) = (call(make, model, x, y, inference) for inference in (False, True))
        assert torch.equal(adv, want)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_in_lightnings_loops(model, stage):
    lightning = pytest.importorskip("lightning.pytorch")
    results = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model)

        def step(self, batch, number):
            assert torch.is_inference_mode_enabled()
            for name in ("PGD", "APGD", "FeatureScatter"):
                results.append(MAKERS[name](self.net)(*batch))
            return torch.zeros(())

        validation_step = test_step = predict_step = step

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples(8)), 4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)
    getattr(trainer, stage)(Module(), loader)
    assert len(results) == 6 and all(adv.shape == (4, 3, 8, 8) for adv in results)
