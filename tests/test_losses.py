import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from cmr_fast.errors import InputError
from cmr_fast.losses import TripletMarginLoss, acmr_triplet, frobenius, gradient_reversal, vse_plus_plus


def related(a, b):
    return bool((a * b).sum() > 0) if a.ndim else bool(a == b)


def triplet_sum(image, text, labels, margin, weight):
    """Eq. 4-6 as printed: a loop over every triplet."""
    total = 0.0
    for anchors, others in ((image, text), (text, image)):
        for i in range(len(labels)):
            for j in range(len(labels)):
                for k in range(len(labels)):
                    if related(labels[i], labels[j]) and not related(labels[i], labels[k]):
                        near = (anchors[i] - others[j]).norm()
                        far = (anchors[i] - others[k]).norm()
                        total += float(near + weight * max(0.0, margin - far))
    return total


def triplet_mean(image, text, labels, margin, weight):
    """Per anchor the mean over its triplets, then the mean over the anchors that have one, for both directions."""
    total = 0.0
    for anchors, others in ((image, text), (text, image)):
        per_anchor = []
        for i in range(len(labels)):
            triplets = [
                float((anchors[i] - others[j]).norm() + weight * max(0.0, margin - (anchors[i] - others[k]).norm()))
                for j in range(len(labels))
                for k in range(len(labels))
                if related(labels[i], labels[j]) and not related(labels[i], labels[k])
            ]
            if triplets:
                per_anchor.append(sum(triplets) / len(triplets))
        total += sum(per_anchor) / max(1, len(per_anchor))
    return total


ORACLES = {"sum": triplet_sum, "mean": triplet_mean}
LABELS = {
    "single": torch.tensor([0, 1, 1, 2, 0, 2, 1]),
    "multi": torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]).byte(),
    "one class": torch.zeros(7, dtype=torch.int64),
    "all different": torch.arange(7),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_triplet_matches_the_loop_over_all_triplets(labels, reduction):
    torch.manual_seed(0)
    image, text = torch.randn(2, 7, 5, dtype=torch.float64)
    got = acmr_triplet(image, text, labels, 2.5, 0.3, reduction)
    assert float(got) == pytest.approx(ORACLES[reduction](image, text, labels, 2.5, 0.3), rel=1e-10)


def test_triplet_in_float32_is_as_exact_far_from_the_origin():
    torch.manual_seed(0)
    image, text = torch.randn(2, 7, 5, dtype=torch.float64) * 0.1 + 30
    want = triplet_sum(image, text, LABELS["single"], 0.5, 1.0)
    got = acmr_triplet(image.float(), text.float(), LABELS["single"], 0.5, 1.0, "sum")
    assert float(got) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("labels", [LABELS["single"], LABELS["multi"]], ids=["single", "multi"])
def test_triplet_gradcheck(labels, reduction):
    torch.manual_seed(1)
    image, text = torch.randn(2, 7, 3, dtype=torch.float64)
    image.requires_grad_()
    text.requires_grad_()
    assert gradcheck(lambda a, b: acmr_triplet(a, b, labels, 2.0, 0.7, reduction), (image, text))


def test_triplet_gradient_is_finite_where_image_and_text_coincide():
    image = torch.randn(4, 3, requires_grad=True)
    text = image.detach().clone().requires_grad_()
    acmr_triplet(image, text, torch.tensor([0, 0, 1, 1]), 1.0, 1.0).backward()
    assert image.grad.isfinite().all() and text.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(4, 2)}, r"\(4, 3\) and \(4, 2\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "a row for each of the 4 rows of image"),
        ({"reduction": "none"}, "'none'"),
    ],
)
def test_triplet_refuses(change, message):
    good = {"image": torch.zeros(4, 3), "text": torch.zeros(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(InputError, match=message):
        acmr_triplet(**(good | {"margin": 1.0, "weight": 1.0} | change))


def test_gradient_reversal_turns_the_gradient_and_nothing_else():
    x = torch.randn(3, 4, requires_grad=True)
    y = gradient_reversal(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(x.grad, (-0.25 * torch.arange(4.0)).expand(3, 4))


def test_frobenius_is_the_sum_of_norms_not_squared():
    weights = [torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [12.0]])]
    assert float(frobenius(weights)) == pytest.approx(18.0)
    assert float(frobenius(weights, squared=True)) == pytest.approx(25.0 + 169.0)
    with pytest.raises(InputError, match="at least one"):
        frobenius([])


def test_frobenius_gradient():
    a, b = torch.randn(3, 4, dtype=torch.float64).requires_grad_(), torch.randn(2, 1, dtype=torch.float64)
    for squared in (False, True):
        assert gradcheck(lambda a, s=squared: 0.3 * frobenius([a, b], squared=s), (a,))
        assert gradgradcheck(lambda a, s=squared: 0.3 * frobenius([a, b], squared=s), (a,))
    nothing = torch.zeros(2, 2, requires_grad=True)
    frobenius([nothing, b]).backward()
    assert torch.equal(nothing.grad, torch.zeros(2, 2))


def embeddings(count=40, width=8, seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randint(0, classes, (count,), generator=generator)


def loss_and_gradients(loss, x, labels, ref=None, ref_labels=None):
    for value in (x, ref):
        if value is not None:
            value.grad = None
    extra = {} if ref is None else {"ref_emb": ref, "ref_labels": ref_labels}
    value = loss(x, labels, **extra)
    value.backward()
    return value.detach(), x.grad.clone(), None if ref is None else ref.grad.clone()


@pytest.mark.parametrize("reducer", [None, "AvgNonZeroReducer", "MeanReducer", "SumReducer"])
@pytest.mark.parametrize("distance", [None, "LpDistance", "raw", "squared", "CosineSimilarity", "DotProductSimilarity"])
@pytest.mark.parametrize("cross", [False, True])
def test_triplet_margin_loss_is_that_of_pytorch_metric_learning(reducer, distance, cross):
    pml = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    del pml
    lp = {"raw": {"normalize_embeddings": False}, "squared": {"power": 2}}
    theirs = None
    if distance is not None:
        theirs = getattr(distances, "LpDistance" if distance in lp else distance)(**lp.get(distance, {}))
    options = {
        "margin": 0.1,
        "distance": theirs,
        "reducer": None if reducer is None else getattr(reducers, reducer)(),
    }
    x, labels = embeddings()
    ref = embeddings(25, seed=1) if cross else ()
    want = loss_and_gradients(losses.TripletMarginLoss(**options), x, labels, *ref)
    got = loss_and_gradients(TripletMarginLoss(**options), x, labels, *ref)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_triplet_margin_loss_of_a_batch_without_triplets_is_zero():
    x, _ = embeddings(6)
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        value, gradient, _ = loss_and_gradients(TripletMarginLoss(), x, labels)
        assert float(value) == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap": True}, "swap=True needs every triplet"),
        ({"smooth_loss": True}, "smooth_loss=True"),
        ({"triplets_per_anchor": 100}, "must be 'all', got 100"),
        ({"embedding_regularizer": object()}, "got embedding_regularizer"),
        ({"distance": "manhattan"}, "got 'manhattan'"),
        ({"distance": nn.Identity()}, "got Identity"),
        ({"reducer": nn.Identity()}, "got Identity"),
    ],
)
def test_triplet_margin_loss_refuses(options, message):
    with pytest.raises(InputError, match=message):
        TripletMarginLoss(**options)


def test_triplet_margin_loss_refuses_calls():
    x, labels = embeddings(6)
    for arguments, message in (
        ({"labels": labels, "indices_tuple": (labels,) * 2}, "a miner's .* got tuple of 2"),
        ({"labels": labels, "indices_tuple": (labels, labels, labels[1:])}, r"got lengths \[6, 6, 5\]"),
        ({"labels": labels, "indices_tuple": (labels, labels + 6, labels)}, "6 anchors and 6 others, got"),
        ({"labels": labels, "indices_tuple": (labels.double(),) * 3}, "torch.float64 among them"),
        ({}, "labels must be given"),
        ({"labels": labels, "ref_labels": labels}, "together"),
        ({"labels": labels, "ref_emb": x[1:]}, r"labels of both must be \(6,\) and \(5,\)"),
        ({"labels": labels, "ref_emb": x[:, 1:]}, "agree in width"),
        ({"labels": labels[:, None]}, r"labels\[:, 0\]"),
        ({"labels": ["a"] * 6}, "must be class ids .* got list of <U1"),
        ({"labels": [0, [1]] * 3}, "must be class ids .* got list"),
        ({"labels": [0.0, float("nan")] * 3}, "got NaN"),
        ({"labels": [0, 1, 2]}, "a row for each of the 6"),
        ({"labels": np.ma.masked_equal(np.arange(6) % 2, 0)}, "got a masked array"),
    ):
        with pytest.raises(InputError, match=message):
            TripletMarginLoss()(x, **arguments)


def test_vse_plus_plus_is_the_max_of_hinges():
    image, _ = embeddings(9, seed=2)
    text, _ = embeddings(9, seed=3)
    scores = nn.functional.normalize(image) @ nn.functional.normalize(text).T
    own = scores.diagonal()
    hinges = [
        (0.2 + s - own[:, None]).clamp(min=0).masked_fill(torch.eye(9).bool(), 0).amax(1) for s in (scores, scores.T)
    ]
    want = torch.autograd.grad(sum(h.sum() for h in hinges), (image, text))
    got = vse_plus_plus(image, text)
    torch.testing.assert_close(got, sum(h.sum() for h in hinges))
    torch.testing.assert_close(torch.autograd.grad(got, (image, text)), want)


def test_acmr_helpers_inside_of_torch_func():
    weights = [torch.randn(3, 4), torch.zeros(5)]
    norms = torch.func.grad(lambda w: frobenius([w, weights[1]]))(weights[0])
    assert torch.allclose(norms, weights[0] / weights[0].norm())
    assert torch.equal(torch.func.grad(frobenius)(weights[1]), weights[1])
    stacked = torch.func.vmap(torch.func.grad(frobenius))(weights[0])
    assert torch.allclose(stacked, torch.nn.functional.normalize(weights[0]))
    turned = torch.func.grad(lambda x: gradient_reversal(x, 3).square().sum())
    assert torch.equal(turned(weights[0]), -6 * weights[0])
    assert torch.equal(torch.func.vmap(turned)(weights[0]), -6 * weights[0])
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.jvp(gradient_reversal, (weights[0],), (weights[0],))
    for wrong in (3, None, object()):
        with pytest.raises(InputError, match="weights must be a tensor or an iterable"):
            frobenius(wrong)
