import math
from dataclasses import replace

import pytest
import torch
from small import small_dataset
from torch import nn
from torch.testing import assert_close

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.cmimh import (
    CMIMH,
    CMIMHConfig,
    balance,
    discriminator_loss,
    partners_first,
    permute_columns,
    sample_bernoulli,
    symmetrised_kl,
)
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.ops import js_critic

PRINTED = replace(CMIMH.presets["paper"], reconstruction="mean", inputs="standard", clip_norm=1.0)
SMALL = replace(PRINTED, bits=6, hidden=12, critic_hidden=8, critic_dim=5, epochs=2, batch_size=16)


def made(**changes):
    torch.manual_seed(0)
    data = small_dataset()
    model = CMIMH(replace(SMALL, **changes), data.image_dim, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    return model, data.train.select(torch.arange(16))


def random_logits(count=9, bits=5, seed=0, scale=2.0):
    return scale * torch.randn(2, count, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stepped(model, batch):
    optimizers = model.optimizers()
    return model.step(batch, optimizers, lambda loss: loss.backward(), 0.0)


def copies(network):
    return [p.detach().clone() for p in network.parameters()]


def changed(network, before):
    return any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


# Eq. 4


def test_samples_are_bits_with_the_right_means():
    torch.manual_seed(0)
    logits = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0]).repeat(20_000, 1)
    samples = sample_bernoulli(logits)
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    assert_close(samples.mean(dim=0), logits[0].sigmoid(), atol=0.012, rtol=0)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_samples_of_certain_bits_are_certain(logit):
    torch.manual_seed(0)
    assert torch.equal(sample_bernoulli(torch.full((1000,), logit)), torch.full((1000,), float(logit > 0)))


def test_straight_through_gradient_lands_on_the_logits_unchanged():
    logits = random_logits()[0].requires_grad_()
    weights = torch.arange(logits.numel(), dtype=torch.float64).view_as(logits)
    (sample_bernoulli(logits) * weights).sum().backward()
    assert torch.equal(logits.grad, weights)


def test_straight_through_the_means_has_the_sigmoids_slope():
    logits = random_logits()[0].requires_grad_()
    sample_bernoulli(logits, "means").sum().backward()
    m = logits.detach().sigmoid()
    assert_close(logits.grad, m * (1 - m))


# Eq. 5


def js_mutual_information(scores, marginals="all"):
    return js_critic(scores, torch.eye(len(scores), dtype=scores.dtype), marginals=marginals)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_js_bound_is_the_loop_over_equation_5(scale):
    scores = scale * torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def bar(t):  # Tbar = log 2 - log(1 + exp(-T))
        return math.log(2) - math.log1p(math.exp(-t))

    joint = [bar(float(scores[i, i])) for i in range(7)]
    marginal = [math.log(2 - math.exp(bar(float(scores[i, j])))) for i in range(7) for j in range(7) if i != j]
    expected = sum(joint) / 7 + sum(marginal) / 42
    assert float(js_mutual_information(scores)) == pytest.approx(expected, rel=1e-6)


def test_js_bound_never_passes_two_log_two_and_stays_finite():
    perfect = torch.full((5, 5), -1e4).fill_diagonal_(1e4)
    assert float(js_mutual_information(perfect)) == pytest.approx(2 * math.log(2))
    for scores in (perfect, -perfect, torch.zeros(5, 5)):
        scores.requires_grad_()
        bound = js_mutual_information(scores)
        bound.backward()
        assert bound <= 2 * math.log(2) + 1e-6 and torch.isfinite(bound) and torch.isfinite(scores.grad).all()
    assert float(js_mutual_information(torch.zeros(4, 4))) == pytest.approx(0.0, abs=1e-6)


def test_one_permutation_is_a_derangement_and_unbiased():
    torch.manual_seed(0)
    scores = torch.randn(6, 6, dtype=torch.float64)
    joint_only = torch.full((6, 6), -1e3).fill_diagonal_(1e3)
    assert float(js_mutual_information(joint_only, "permutation")) == pytest.approx(2 * math.log(2))
    drawn = torch.stack([js_mutual_information(scores, "permutation") for _ in range(4000)])
    assert float(drawn.std()) > 0.01
    assert float(drawn.mean()) == pytest.approx(float(js_mutual_information(scores)), abs=0.02)


# Eq. 6-7


def test_symmetrised_kl_is_the_log_form():
    image, text = random_logits()
    p, q = image.sigmoid(), text.sigmoid()

    def kl(p, q):
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(dim=1)

    assert_close(symmetrised_kl(image, text), (kl(p, q) + kl(q, p)).mean(), rtol=1e-10, atol=0)


def test_symmetrised_kl_gradient_and_extremes():
    image, text = random_logits().requires_grad_().unbind()
    (grad,) = torch.autograd.grad(symmetrised_kl(image, text), image)
    p, q = image.sigmoid(), text.sigmoid()
    assert_close(grad, (p * (1 - p) * (image - text) + p - q) / len(image))
    assert float(symmetrised_kl(image, image).detach()) == 0
    assert float(symmetrised_kl(torch.full((1, 1), 300.0), torch.full((1, 1), -300.0))) == pytest.approx(600.0)


# Eq. 11-12


def test_permuted_columns_keep_each_bits_marginal_and_lose_their_dependence():
    torch.manual_seed(0)
    one = torch.rand(3000, 1, dtype=torch.float64)
    means = one.repeat(1, 4)
    shuffled = permute_columns(means)
    for column in range(4):
        assert torch.equal(shuffled[:, column].sort().values, means[:, column].sort().values)
    # rows permuted as a whole would leave these correlations at 1
    assert (torch.corrcoef(shuffled.T) - torch.eye(4)).abs().max() < 0.08
    assert not torch.equal(shuffled, permute_columns(means))


def test_discriminator_loss_is_the_cross_entropy_of_real_and_permuted():
    bits = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = nn.Linear(3, 1).double()
    torch.manual_seed(5)
    loss = discriminator_loss(network, bits)
    torch.manual_seed(5)
    real, fake = network(bits).sigmoid(), network(permute_columns(bits)).sigmoid()
    assert_close(loss, -(real.log().mean() + (1 - fake).log().mean()) / 2)


def test_trained_discriminator_measures_total_correlation():
    """Two bits that always agree, each a coin: TC = log 2; m is 0 or 1, so D's best logit is log 2 on what is seen."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(400):
        means = (torch.rand(512, 1) > 0.5).float().repeat(1, 2)
        optimizer.zero_grad()
        discriminator_loss(network, means).backward()
        optimizer.step()
    assert float(network(means).mean().detach()) == pytest.approx(math.log(2), abs=0.1)


# Eq. 13


def test_balance_by_loops():
    means = random_logits()[0].sigmoid()
    expected = sum(abs(sum(float(means[j, b]) - 0.5 for j in range(9)) / 9) for b in range(5))
    assert float(balance(means)) == pytest.approx(expected)
    assert float(balance(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))) == 0


# Eq. 14 and the steps


@pytest.mark.parametrize("reconstruction", ["sum", "mean", "bits"])
@torch.no_grad()
def test_objective_is_equation_14(reconstruction):
    weights = {"lambda_mi": 0.7, "lambda_skl": 0.3, "lambda_ind": 0.2, "lambda_bal": 0.1}
    model, batch = made(reconstruction=reconstruction, reconstruction_weight=2.0, **weights)
    torch.manual_seed(3)
    terms, means = model.terms(batch.image, batch.text)
    torch.manual_seed(3)
    expected = 0.0
    for modality, features in (("image", batch.image), ("text", batch.text)):
        x = model.inputs[modality](features)
        logits = model.encoder[modality](x)
        decoded = model.decoder[modality](sample_bernoulli(logits))
        norms = ((decoded - x) ** 2).sum(dim=1)
        share = {"sum": 1, "mean": 1 / x.shape[1], "bits": 6 / x.shape[1]}[reconstruction]
        expected += 2.0 * float(norms.mean()) * share
        probability = model.discriminator[modality](logits.sigmoid()).sigmoid()
        expected += 0.2 * float((probability / (1 - probability)).log().mean())
        expected += 0.1 * float(balance(logits.sigmoid()))
        assert_close(means[modality], logits.sigmoid())
    logits = [model.encode(m, getattr(batch, m)) for m in ("image", "text")]
    scores = torch.tensor(
        [
            [float(model.critic["image"](a.sigmoid()) @ model.critic["text"](b.sigmoid())) for b in logits[1]]
            for a in logits[0]
        ]
    )
    expected += 0.3 * float(symmetrised_kl(*logits)) - 0.7 * float(js_mutual_information(scores))
    assert float(model.objective(terms)) == pytest.approx(expected, rel=1e-4)


def test_every_term_reaches_the_encoders_and_only_what_it_should():
    model, batch = made()
    terms, _ = model.terms(batch.image, batch.text)
    reached = {
        "reconstruction_image": {"encoder.image", "decoder.image"},
        "reconstruction_text": {"encoder.text", "decoder.text"},
        "mi": {"encoder.image", "encoder.text", "critic.image", "critic.text"},
        "skl": {"encoder.image", "encoder.text"},
        "ind": {"encoder.image", "encoder.text", "discriminator.image", "discriminator.text"},
        "bal": {"encoder.image", "encoder.text"},
    }
    assert set(terms) == set(reached)
    for term, expected in reached.items():
        model.zero_grad()
        terms[term].backward(retain_graph=True)
        touched = {
            ".".join(k.split(".")[:2]) for k, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert touched == expected, term


def test_the_model_step_freezes_the_discriminators_and_theirs_changes_only_them():
    model, batch = made()
    networks = [model.encoder, model.decoder, model.critic]
    optimizers = model.optimizers()
    discriminator_before = copies(model.discriminator)
    before = [copies(network) for network in networks]
    calls = []

    def backward(loss):
        loss.backward()
        calls.append(
            (
                any(p.grad is not None and p.grad.any() for p in model.discriminator.parameters()),
                changed(model.discriminator, discriminator_before),
                [changed(network, b) for network, b in zip(networks, before, strict=True)],
            )
        )
        if len(calls) == 2:
            calls.append([copies(network) for network in networks])

    model.step(batch, optimizers, backward, 0.0)
    first, second, at_second = calls
    assert first == (False, False, [False, False, False])
    assert second == (True, False, [True, True, True])
    assert changed(model.discriminator, discriminator_before)
    assert not any(changed(network, b) for network, b in zip(networks, at_second, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_learning_rates_by_network():
    model, _ = made(lr=0.5, decoder_lr=0.25)
    rates = {id(p): g["lr"] for o in model.optimizers().values() for g in o.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in model.decoder.parameters()} == {0.25}
    others = [model.encoder, model.critic, model.discriminator]
    assert {rates[id(p)] for network in others for p in network.parameters()} == {0.5}
    assert len(rates) == len(list(model.parameters()))


def test_clipping_bounds_each_group():
    model, batch = made(clip_norm=1e-3, momentum=0.0, weight_decay=0.0, lr=1.0, decoder_lr=1.0)
    networks = [model.encoder, model.decoder, model.critic, model.discriminator]
    before = [copies(network) for network in networks]
    stepped(model, batch)
    for network, b in zip(networks, before, strict=True):
        moved = torch.stack([(p.detach() - q).norm() for p, q in zip(network.parameters(), b, strict=True)]).norm()
        assert 0 < float(moved) <= 1.01e-3


def test_ablation_switches():
    model, batch = made(lambda_ind=0.0)
    before = copies(model.discriminator)
    log = stepped(model, batch)
    assert "discriminator" not in log and not changed(model.discriminator, before)
    model, batch = made(lambda_mi=0.0, weight_decay=0.0)
    before = copies(model.critic)
    stepped(model, batch)
    assert not changed(model.critic, before)


@torch.no_grad()
def test_critic_input_samples_differ_from_means():
    model, batch = made(critic_input="samples")
    model.zero_grad()
    first, second = (model.terms(batch.image, batch.text)[0]["mi"] for _ in range(2))
    assert float(first) != float(second)
    model, batch = made()
    first, second = (model.terms(batch.image, batch.text)[0]["mi"] for _ in range(2))
    assert float(first) == float(second)


@torch.no_grad()
def test_several_samples_are_the_mean_of_their_bounds():
    model, batch = made(critic_input="samples", critic_samples=3)
    torch.manual_seed(5)
    found = model.terms(batch.image, batch.text)[0]["mi"]
    torch.manual_seed(5)
    logits = {m: model.encode(m, getattr(batch, m)) for m in ("image", "text")}
    bounds = []
    for _ in range(3):
        seen = {m: model.critic[m](sample_bernoulli(a)) for m, a in logits.items()}
        bounds.append(float(js_critic(seen["image"], seen["text"])))
    assert float(found) == pytest.approx(sum(bounds) / 3, rel=1e-5)


def test_the_papers_networks_and_defaults():
    c = CMIMH.presets["paper"]
    model = CMIMH(c, 128, 10, 10)
    widths = {
        part: [module.out_features for module in getattr(model, part)["image"] if isinstance(module, nn.Linear)]
        for part in ("encoder", "decoder", "critic", "discriminator")
    }
    assert widths == {
        "encoder": [1024, 1024, 32],
        "decoder": [1024, 1024, 128],
        "critic": [512, 512, 512],
        "discriminator": [512, 512, 1],
    }
    activations = {
        part: {type(module) for module in getattr(model, part)["text"] if not isinstance(module, nn.Linear)}
        for part in widths
    }
    assert activations["encoder"] == activations["decoder"] == {nn.ReLU}
    assert activations["critic"] == activations["discriminator"] == {nn.LeakyReLU}
    assert (c.reconstruction, c.reconstruction_weight, c.straight_through, c.clip_norm) == ("sum", 1.0, "logits", 0.0)
    assert (c.pca_dim, c.text_pca_dim, c.critic_input) == (1024, 0, "means")
    assert (c.lambda_mi, c.lambda_skl, c.lambda_ind, c.lambda_bal) == (1.5, 1.0, 0.25, 0.01)
    assert (c.lr, c.decoder_lr, c.momentum, c.weight_decay, c.batch_size) == (0.01, 0.001, 0.9, 1e-4, 128)


def test_wide_inputs_are_reduced_by_pca_and_narrow_ones_are_not():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    data = Pairs(wide, torch.randn(40, 3, generator=generator), torch.arange(40) % 2)
    model = CMIMH(replace(SMALL, pca_dim=4), 9, 3, 2)
    model.fit_inputs(data)
    reduced = model.inputs["image"](wide)
    assert reduced.shape == (40, 4)
    standard = (wide - wide.mean(dim=0)) / wide.std(dim=0, correction=0)
    u, s, _ = torch.linalg.svd(standard, full_matrices=False)
    assert_close(reduced @ reduced.T, (u[:, :4] * s[:4] ** 2) @ u[:, :4].T, atol=1e-3, rtol=1e-3)
    assert model.inputs["text"](data.text).shape == (40, 3)
    assert CMIMH(replace(SMALL, pca_dim=0), 9, 3, 2).inputs["image"].out_dim == 9


def test_pca_is_of_images_alone_unless_texts_ask_for_it():
    model = CMIMH(replace(SMALL, pca_dim=4), 9, 9, 2)
    assert (model.inputs["image"].out_dim, model.inputs["text"].out_dim) == (4, 9)
    assert CMIMH(replace(SMALL, pca_dim=0, text_pca_dim=4), 9, 9, 2).inputs["text"].out_dim == 4
    assert CMIMH.read_config({"pca_dim": 4})["text_pca_dim"] == 4  # a run of before


def test_the_epoch_is_chosen_without_labels(tmp_path):
    data = replace(small_dataset(), valid=small_dataset(seed=1).train)
    assert data.valid is not None
    shuffled = replace(data, valid=replace(data.valid, labels=torch.arange(45) // 15))
    settings = {"device": "cpu", "quiet": True, "patience": 2}
    runs = [
        train("cmimh", SMALL, d, RunConfig(out=tmp_path / name, **settings))
        for name, d in (("a", data), ("b", shuffled))
    ]
    assert runs[0].results["best_epoch"] == runs[1].results["best_epoch"]
    assert [row["valid_pairs"] for row in runs[0].history] == [row["valid_pairs"] for row in runs[1].history]
    assert runs[0].results["valid_map"] != runs[1].results["valid_map"]
    best = max(row["valid_pairs"] for row in runs[0].history)
    assert runs[0].results["valid_pairs"] == best


def test_partners_first_by_loops():
    codes = [torch.randint(0, 2, (7, 4), generator=torch.Generator().manual_seed(s)).float() * 2 - 1 for s in (0, 1)]
    shares = []
    for asked, answered in (codes, codes[::-1]):
        for i in range(7):
            own = (asked[i] != answered[i]).sum()
            others = [(asked[i] != answered[j]).sum() for j in range(7) if j != i]
            shares.append(sum(1.0 if d > own else 0.5 if d == own else 0.0 for d in others) / 6)
    assert partners_first(*codes) == pytest.approx(sum(shares) / 14)
    assert (
        partners_first(codes[0][:3], codes[0][:3]) == 1.0 and partners_first(torch.ones(4, 2), torch.ones(4, 2)) == 0.5
    )


def test_trains_in_the_loop_and_its_checkpoint_encodes_raw_features(tmp_path):
    data = small_dataset()
    run = train("cmimh", SMALL, data, RunConfig(out=tmp_path / "run", device="cpu", quiet=True, valid_fraction=0.3))
    assert 0 < run.results["all"]["average"] <= 1
    restored = load_model(tmp_path / "run")
    with torch.no_grad():
        expected = run.model.eval().encode("text", data.query.text)
        assert torch.equal(restored.encode("text", data.query.text), expected)
    assert expected.shape == (45, 6)


def test_learns_to_pair_on_easy_data():
    """Ten steps' worth of epochs on pairs that share everything: paired codes become nearer than unpaired ones."""
    torch.manual_seed(0)
    shared = torch.randn(256, 4)
    data = Pairs(shared @ torch.randn(4, 7), shared @ torch.randn(4, 5), torch.arange(256) % 2)
    config = replace(SMALL, hidden=64, bits=8, lr=0.05, decoder_lr=0.05, reconstruction="mean", batch_size=64)
    model = CMIMH(config, 7, 5, 2)
    model.fit_inputs(data)
    optimizers = model.optimizers()
    for _ in range(60):
        for rows in torch.randperm(256).split(64):
            model.step(data.select(rows), optimizers, lambda loss: loss.backward(), 0.0)
    with torch.no_grad():
        image, text = (model.encode(m, getattr(data, m)) >= 0 for m in ("image", "text"))
    distance = (image[:, None] != text[None]).float().sum(dim=2)
    paired = distance.diagonal().mean()
    unpaired = (distance.sum() - distance.diagonal().sum()) / (256 * 255)
    assert paired < 0.7 * unpaired


@pytest.mark.parametrize(
    "field, value",
    [("bits", 0), ("batch_size", 1), ("lambda_skl", -1.0), ("marginals", "some"), ("inputs", "log"), ("epochs", 0)],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field} must be"):
        CMIMHConfig(**{field: value})


def test_bad_scores_are_refused():
    for image, text in (((4, 3), (3, 3)), ((1, 3), (1, 3))):
        with pytest.raises(InputError, match=r"must both be \(B, d\) with B >= 2"):
            js_critic(torch.zeros(image), torch.zeros(text))
    with pytest.raises(InputError, match="marginals must be"):
        js_mutual_information(torch.zeros(3, 3), "none")


def test_reconstruction_in_one_process_is_the_mean_of_all_errors_to_the_last_bit():
    """Of rows first and then of them it would round otherwise, and runs of before could not be made again."""
    data = small_dataset()
    model = CMIMH(replace(SMALL, reconstruction="mean"), data.image_dim, data.text_dim, data.num_classes)
    model.fit_inputs(data.train)
    inputs = {"image": model.inputs["image"](data.train.image), "text": model.inputs["text"](data.train.text)}
    torch.manual_seed(1)
    terms, _ = model.terms(data.train.image, data.train.text)
    torch.manual_seed(1)
    for modality, x in inputs.items():
        samples = sample_bernoulli(model.encoder[modality](x), SMALL.straight_through)
        expected = (model.decoder[modality](samples.to(x.dtype)) - x).square().mean()
        assert torch.equal(terms[f"reconstruction_{modality}"], expected)
