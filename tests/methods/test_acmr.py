import math
from dataclasses import replace

import pytest
import torch
from small import ACMR_SMALL, small_dataset
from torch.nn import functional as F
from torch.testing import assert_close

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.acmr import ACMR, ACMRConfig, _Dropout, select
from cmr_fast.methods.evaluation import encode_all, validate
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.method import Retriever
from cmr_fast.methods.scaling import InputScaling

CALM = replace(ACMR_SMALL, dropout=0.0)


def acmr(**changes):
    torch.manual_seed(0)
    data = small_dataset(multi=changes.pop("multi", False))
    model = ACMR(replace(CALM, **changes), data.image_dim, data.text_dim, 3).double()
    batch = data.train.select(torch.arange(16))
    object.__setattr__(batch, "image", batch.image.double())
    object.__setattr__(batch, "text", batch.text.double())
    return model, batch


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


def plain_adversarial(model, image, text):
    """Eq. 1 written out, without a gradient reversal."""
    p_image = F.softmax(model.modality_classifier(image), dim=1)[:, 0]
    p_text = F.softmax(model.modality_classifier(text), dim=1)[:, 1]
    return -(p_image.log() + p_text.log()).mean()


def test_dropout_keeps_its_share_and_the_mean_and_does_nothing_in_evaluation():
    layer, x = _Dropout(0.3), torch.full((200, 500), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert abs(float(kept.double().mean()) - 0.7) < 0.01  # six deviations
    assert_close(y[kept], torch.full_like(y[kept], 2 / 0.7))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept) and not torch.equal(layer(x) != 0, kept)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.eval()(x), x) and torch.equal(_Dropout(0.0)(x), x)


def test_the_papers_networks_and_defaults():
    model = ACMR(ACMRConfig(), 128, 10, 10)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    assert shapes["image_projector.0.weight"] == (2000, 128) and shapes["image_projector.3.weight"] == (200, 2000)
    assert shapes["text_projector.0.weight"] == (500, 10) and shapes["text_projector.3.weight"] == (200, 500)
    assert shapes["modality_classifier.0.weight"] == (50, 200) and shapes["modality_classifier.2.weight"] == (2, 50)
    c = ACMRConfig()
    assert (c.epochs, c.batch_size, c.inner_steps, c.dim) == (200, 64, 5, 200)
    assert model.encode("image", torch.randn(3, 128)).abs().max() < 1


@pytest.mark.parametrize("side", ["image_projector", "text_projector"])
def test_the_adversarys_gradient_reaches_the_projectors(side):
    """Nonzero, and opposite to the classifier's own descent direction."""
    model, batch = acmr()
    projector = list(getattr(model, side).parameters())
    image, text = model.project(batch)
    want = gradients(plain_adversarial(model, image, text), projector)
    got = gradients(model.adversarial_loss(*model.project(batch), reversal=0.7), projector)
    for down, reversed_ in zip(want, got, strict=True):
        assert down.norm() > 0
        torch.testing.assert_close(reversed_, -0.7 * down)


def test_the_modality_classifiers_own_gradient_is_not_reversed():
    model, batch = acmr()
    image, text = model.project(batch)
    parameters = list(model.modality_classifier.parameters())
    want = gradients(plain_adversarial(model, image, text), parameters)
    for reversal in (0.0, 1.0):
        got = gradients(model.adversarial_loss(image, text, reversal), parameters)
        torch.testing.assert_close(got, want)


def embedding_parameters(model):
    return [value for name, value in model.named_parameters() if not name.startswith("modality_classifier")]


def record_step(model, batch):
    """One Algorithm 1 step with plain SGD; returns what each optimizer was asked to do, in order, with gradients."""
    calls = []
    optimizers = {
        "embedding": torch.optim.SGD(embedding_parameters(model), 0.01),
        "modality": torch.optim.SGD(model.modality_classifier.parameters(), 0.01),
    }
    for name, optimizer in optimizers.items():
        plain = optimizer.step

        def stepped(*args, _name=name, _plain=plain, **kwargs):
            before = {key: value.clone() for key, value in model.named_parameters()}
            grads = {key: None if value.grad is None else value.grad.clone() for key, value in model.named_parameters()}
            _plain(*args, **kwargs)
            moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
            calls.append((_name, moved, grads, before))

        optimizer.step = stepped
    logged = model.step(batch, optimizers, torch.Tensor.backward, 0.5)
    return calls, logged


def test_a_step_is_algorithm_1():
    """k updates of theta_V, theta_T and theta_imd alone, then one of theta_D alone."""
    model, batch = acmr(inner_steps=3, reg=0.01, label_head="each")
    names = {name for name, _ in model.named_parameters()}
    classifier = {name for name in names if name.startswith("modality_classifier")}
    calls, _ = record_step(model, batch)
    assert [name for name, *_ in calls] == ["embedding"] * 3 + ["modality"]
    for _, moved, _, _ in calls[:3]:
        assert moved == names - classifier
    assert calls[3][1] == classifier


def test_the_projectors_descend_emb_minus_adv():
    """Eq. 9 and lines 3-5: the gradient that the first inner step uses is that of L_emb - L_adv."""
    model, batch = acmr(inner_steps=1, adversary=1.0, reg=0.01)
    image, text = model.project(batch)
    loss = model.embedding_loss(image, text, batch.labels)[0] - plain_adversarial(model, image, text)
    names = [name for name, _ in model.named_parameters() if not name.startswith("modality_classifier")]
    want = gradients(loss, embedding_parameters(model))
    calls, _ = record_step(model, batch)
    for name, gradient in zip(names, want, strict=True):
        torch.testing.assert_close(calls[0][2][name], gradient)


def test_the_modality_classifier_descends_its_own_loss_on_the_updated_projections():
    model, batch = acmr(inner_steps=2)
    calls, logged = record_step(model, batch)
    twin, _ = acmr(inner_steps=2)
    twin.load_state_dict(calls[-1][3], strict=False)
    loss = plain_adversarial(twin, *twin.project(batch))
    torch.testing.assert_close(logged["adversarial_loss"], loss.detach())
    for name, gradient in zip(
        [n for n, _ in twin.modality_classifier.named_parameters()],
        gradients(loss, twin.modality_classifier.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(calls[-1][2][f"modality_classifier.{name}"], gradient)


@pytest.mark.parametrize("squared", [False, True])
def test_with_the_adversary_off_nothing_of_it_moves(squared):
    model, batch = acmr(adversary=0.0, inner_steps=2, reg_squared=squared, reg=0.3)
    image, text = model.project(batch)
    want = gradients(model.embedding_loss(image, text, batch.labels)[0], embedding_parameters(model))
    calls, logged = record_step(model, batch)
    assert [name for name, *_ in calls] == ["embedding"] * 2
    names = [name for name, _ in model.named_parameters() if not name.startswith("modality_classifier")]
    for name, gradient in zip(names, want, strict=True):
        torch.testing.assert_close(calls[0][2][name], gradient, rtol=1e-12, atol=1e-15)
    assert "adversarial_loss" not in logged
    image, text = model.project(batch)
    adversarial = gradients(model.adversarial_loss(image, text, 0.0), model.image_projector.parameters())
    assert all(gradient.abs().max() == 0 for gradient in adversarial)


@torch.no_grad()
def label_oracle(model, image, text, labels):
    """Eq. 2, item by item and class by class."""
    total = 0.0
    for i in range(len(labels)):
        y = torch.eye(3).double()[labels[i]] if labels.ndim == 1 else labels[i].double() / max(1, int(labels[i].sum()))
        for head, side in ((model.image_labels, image), (model.text_labels, text)):
            scores = (head.weight @ side[i] + head.bias).exp()
            for c in range(3):
                total -= float(y[c]) * math.log(float(scores[c] / scores.sum()))
    return total / len(labels)


@pytest.mark.parametrize("head", ["each", "shared"])
@pytest.mark.parametrize("multi", [False, True])
def test_label_loss_matches_the_loop(multi, head):
    model, batch = acmr(multi=multi, label_head=head)
    image, text = model.project(batch)
    labels = batch.labels.clone()
    if multi:
        labels[0] = 0
    got = float(model.label_loss(image, text, labels).detach())
    assert got == pytest.approx(label_oracle(model, image, text, labels))


def test_embedding_loss_weighs_its_terms():
    model, batch = acmr(alpha=0.3, beta=2.0, reg=0.05)
    image, text = model.project(batch)
    loss, terms = model.embedding_loss(image, text, batch.labels)
    assert float(loss.detach()) == pytest.approx(
        float((0.3 * terms["imi_loss"] + 2.0 * terms["imd_loss"] + 0.05 * terms["reg_loss"]).detach())
    )
    layers = [model.image_projector[0], model.image_projector[3], model.text_projector[0], model.text_projector[3]]
    assert terms["reg_loss"].item() == pytest.approx(
        sum(x.weight.detach().square().sum().sqrt().item() for x in layers)
    )


@pytest.mark.parametrize(("terms", "kept"), [("imi", "imi_loss"), ("imd", "imd_loss")])
def test_ablations_of_table_5(terms, kept):
    model, batch = acmr(terms=terms, reg=0.0)
    loss, named = model.embedding_loss(*model.project(batch), batch.labels)
    weight = {"imi_loss": CALM.alpha, "imd_loss": CALM.beta}[kept]
    assert list(named) == [kept] and float(loss) == pytest.approx(weight * float(named[kept]))


def test_ganin_schedule_scales_the_reversal():
    runs = {}
    for progress in (0.0, 0.5):
        model, batch = acmr(inner_steps=1, adversary=1.0, adversary_schedule="ganin")
        optimizers = model.optimizers()
        model.step(batch, optimizers, torch.Tensor.backward, progress)
        runs[progress] = [p.grad.clone() for p in model.image_projector.parameters()]
    model, batch = acmr(inner_steps=1, adversary=0.0)
    model.step(batch, model.optimizers(), torch.Tensor.backward, 0.0)
    off = [p.grad for p in model.image_projector.parameters()]
    torch.testing.assert_close(runs[0.0], off)
    assert any(not torch.allclose(a, b) for a, b in zip(runs[0.5], off, strict=True))


def test_select_follows_validation(tmp_path):
    found = select(
        small_dataset(),
        RunConfig(out=tmp_path / "grid", device="cpu", valid_fraction=0.3, threads=1, quiet=True),
        replace(ACMR_SMALL, epochs=2),
        alphas=(0.01, 0.1),
        betas=(1.0,),
        margin=(1.0, 2.0),
    )
    assert [(row["alpha"], row["margin"]) for row in found.rows] == [(0.01, 1.0), (0.01, 2.0), (0.1, 1.0), (0.1, 2.0)]
    assert found.best.beta == 1.0 and (tmp_path / "grid" / "grid.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"alpha": -1.0}, "alpha must be finite and at least 0, got -1.0"),
        ({"beta": math.nan}, "beta"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"terms": "none"}, "terms must be one of full, imi, imd, got 'none'"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(InputError, match=message):
        ACMRConfig(**change)


def test_scalings():
    torch.manual_seed(0)
    x = torch.rand(50, 4)
    x[:, 3] = 2.0
    for kind in ("standard", "hellinger", "chi2"):
        scaling = InputScaling(kind, 4)
        scaling.fit(x)
        y = scaling(x)
        constant = y.abs().amax(0) == 0
        torch.testing.assert_close(y.mean(0), torch.zeros(scaling.out_dim), atol=1e-5, rtol=0)
        torch.testing.assert_close(y[:, ~constant].std(0, correction=0), torch.ones(int((~constant).sum())))
        assert constant[3] and y.isfinite().all()
    raw = InputScaling("raw", 4)
    raw.fit(x)
    assert torch.equal(raw(x), x)


def test_chi2_map_approximates_the_kernel_as_scikit_learn_does():
    from sklearn.kernel_approximation import AdditiveChi2Sampler

    x = torch.rand(6, 4, dtype=torch.float64)
    x[0, 0] = 0
    ours = InputScaling("chi2", 4)._map(x)
    theirs = torch.from_numpy(AdditiveChi2Sampler(sample_steps=2, sample_interval=0.5).fit_transform(x.numpy()))
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T)


@pytest.mark.parametrize("kind", ["standard", "hellinger", "chi2"])
def test_scalings_have_finite_slopes_at_0(kind):
    x = torch.rand(50, 4)
    x[::2, 1] = 0
    scaling = InputScaling(kind, 4)
    scaling.fit(x)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(scaling(x).sum(), x)
    assert slope.isfinite().all()
    assert (slope[::2, 1] > 0).all()  # an attack may raise what is 0
    mapped = scaling._map(x.detach().double())
    assert (mapped[::2, 1::4] == 0).all()
    if kind == "hellinger":
        torch.testing.assert_close(mapped, x.detach().double().sqrt(), atol=1e-12, rtol=0)


def test_scalings_refuse():
    with pytest.raises(InputError, match="raw, standard, global, hellinger, chi2, got 'log'"):
        InputScaling("log", 3)
    with pytest.raises(InputError, match="at least 0"):
        InputScaling("chi2", 2).fit(torch.tensor([[0.1, -0.5]]))


@pytest.mark.parametrize("head", ["each", "shared"])
def test_every_parameter_has_one_optimizer(head):
    model, _ = acmr(label_head=head, text_rate=3.0, image_weight_decay=0.5)
    optimizers = model.optimizers()
    owned = [p for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(map(id, owned))) == len(list(model.parameters()))
    image, text = optimizers["embedding"].param_groups
    assert text["lr"] == pytest.approx(3 * image["lr"]) and (image["weight_decay"], text["weight_decay"]) == (0.5, 0.0)


def test_ranking_by_labels_compares_label_distributions():
    model, batch = acmr(similarity="labels")
    assert model.metric == "ip"
    image, text = model.project(batch)
    torch.testing.assert_close(model.encode("image", batch.image), F.softmax(model.image_labels(image), dim=1))
    torch.testing.assert_close(model.encode("text", batch.text), F.softmax(model.text_labels(text), dim=1))


def test_imi_trains_no_labels_to_rank_by():
    with pytest.raises(InputError, match="expected auto, cosine or ip"):
        ACMRConfig(terms="imi", similarity="labels")
    model, _ = acmr(terms="imi", similarity="auto")
    assert model.candidates == ("cosine", "ip")


def test_auto_ranks_by_what_validation_finds_best(tmp_path):
    run = train("acmr", replace(CALM, similarity="auto"), small_dataset(), RunConfig(out=tmp_path / "run", device="cpu",
        quiet=True, valid_fraction=0.4, patience=0))  # fmt: skip
    chosen = run.results["similarity"]
    valid = small_dataset().hold_out(0.4, 0).valid
    scores = {}
    for number, name in enumerate(run.model.candidates):
        run.model.ranking.fill_(number)
        scores[name] = validate(run.model, valid)["valid_map"]
    assert scores[chosen] == max(scores.values()) == pytest.approx(run.results["valid_map"])
    run.model.ranking.fill_(2)
    assert encode_all(run.model, "image", valid.image).shape[1] == 3
    assert encode_all(run.model, "image", valid.image, "subspace").shape[1] == CALM.dim  # codes are its signs
    restored = load_model(tmp_path / "run")
    assert restored.similarity == chosen and restored.metric == ("cosine" if chosen == "cosine" else "ip")


def test_a_refit_ranks_by_what_its_selection_chose(tmp_path, monkeypatch):
    """By cosine here, where a training without validation would rank by labels."""
    last = {"valid_i2t": 0.1, "valid_t2i": 0.1}
    monkeypatch.setattr(
        Retriever, "validate", lambda self, valid: {**last, "valid_map": 0.9 if self.similarity == "cosine" else 0.1}
    )
    run = train("acmr", replace(CALM, epochs=2, similarity="auto"), small_dataset(), RunConfig(out=tmp_path / "run",
        device="cpu", quiet=True, valid_fraction=0.4, refit=True))  # fmt: skip
    assert run.results["similarity"] == run.model.similarity == "cosine"
    assert load_model(tmp_path / "run" / "selection").config.similarity == "auto"


def test_epochs_are_not_chosen_by_the_modality_gap(tmp_path, monkeypatch):
    """Of epochs with one mAP the first is kept, though the gap of the second is larger; the gap is logged."""
    gaps = iter((0.6, 0.9, 0.8, 0.8))
    equal = dict.fromkeys(Retriever.monitor, 0.5)
    monkeypatch.setattr(Retriever, "validate", lambda self, valid: equal)
    monkeypatch.setattr(ACMR, "probe", lambda self, pairs: next(gaps))
    run = train("acmr", replace(CALM, epochs=3), small_dataset(), RunConfig(out=tmp_path / "run", device="cpu",
        quiet=True, valid_fraction=0.4))  # fmt: skip
    assert run.results["best_epoch"] == 1
    assert [row["probe_accuracy"] for row in run.history] == [0.6, 0.9, 0.8]


def test_a_probe_tells_a_gap_that_an_idle_classifier_does_not(tmp_path):
    """D at its random start is near chance on projections that a new classifier tells apart at once."""
    run = train("acmr", replace(CALM, classifier_rate=1e-6), small_dataset(), RunConfig(out=tmp_path / "run",
        device="cpu", quiet=True, valid_fraction=0.0))  # fmt: skip
    told = run.results["modality"]
    assert told["probe_accuracy"] > told["classifier_accuracy"]
    assert {"modality_accuracy", "adversarial_loss"} <= set(run.history[0])
    same = Pairs(torch.zeros(40, 7), torch.zeros(40, 5), torch.arange(40) % 3)
    for projector in (run.model.image_projector, run.model.text_projector):
        for value in projector.parameters():
            torch.nn.init.zeros_(value)
    assert run.model.probe(same) == 0.5  # nothing to tell them by


def test_the_discriminators_accuracy_is_the_share_it_has_right():
    model, batch = acmr()
    image, text = model.project(batch)
    logits = model.modality_classifier(torch.cat([image, text]))
    right = sum(int(row.argmax() == (i >= len(image))) for i, row in enumerate(logits))
    assert float(model._adversarial(image, text, 0.0)[1]) == pytest.approx(right / len(logits))
