"""The losses in the hands of those who know the originals: their habits, wrappers, miners and subclasses."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.losses import (
    ClipLoss,
    SigLipLoss,
    TripletMarginLoss,
    acmr_triplet,
    frobenius,
    gradient_reversal,
    triplet_margin,
    vse_plus_plus,
)


def embeddings(count=24, seed=0, width=8):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def class_ids(count=24, classes=5, seed=9):
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def value_and_gradients(compute, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = compute(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def both(compute, *leaves, **options):
    """compute(loss, *leaves) with that library's loss and with ours: the same value and gradients."""
    metric = pytest.importorskip("pytorch_metric_learning.losses")
    want, got = (
        value_and_gradients(lambda *x, make=make: compute(make(**options), *x), *leaves)
        for make in (metric.TripletMarginLoss, TripletMarginLoss)
    )
    torch.testing.assert_close(got, want)
    assert float(want[0]) > 0


def library_options(distance, reducer):
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    made = {
        "default": None,
        "squared": distances.LpDistance(power=2),
        "raw": distances.LpDistance(normalize_embeddings=False),
        "cosine": distances.CosineSimilarity(),
        "dot": distances.DotProductSimilarity(normalize_embeddings=False),
    }[distance]
    return {"margin": 0.2, "distance": made, "reducer": None if reducer is None else getattr(reducers, reducer)()}


@pytest.mark.parametrize("reducer", [None, "MeanReducer", "SumReducer"])
@pytest.mark.parametrize("distance", ["default", "squared", "raw", "cosine", "dot"])
def test_ref_labels_that_are_labels_leave_the_own_partner_out(distance, reducer):
    y = class_ids()
    options = library_options(distance, reducer)
    for reference in ({"ref_labels": y}, {"ref_labels": y.clone()}, {}):
        both(lambda loss, a, b, r=reference: loss(a, y, ref_emb=b, **r), embeddings(), embeddings(seed=1), **options)


def test_ref_emb_that_is_the_embeddings():
    y = class_ids()
    for reference in ({"ref_labels": y}, {"ref_labels": y.clone()}, {}):
        both(lambda loss, a, r=reference: loss(a, y, ref_emb=a, **r), embeddings())


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum"])
@pytest.mark.parametrize("mining", ["all", "hard", "hard_negative", "semihard"])
def test_without_partners_every_mining_is_that_of_one_modality(mining, reduction):
    # where the reference holds the same points, an item without its partner is an item without itself
    x, y = embeddings(), class_ids()
    loss = TripletMarginLoss(0.3, distance="euclidean", mining=mining, reducer=reduction)
    want = triplet_margin(x, y, 0.3, mining=mining, reduction=reduction)
    assert float(want) > 0
    torch.testing.assert_close(loss(x, y, ref_emb=x.clone(), ref_labels=y), want)
    hot = F.one_hot(y)
    torch.testing.assert_close(loss(x, hot, ref_emb=x.clone(), ref_labels=hot), want)
    alone = torch.zeros(24, dtype=torch.int64)
    assert float(loss(x, alone, ref_emb=x.clone(), ref_labels=alone)) == 0


MINERS = {
    "triplets": ("TripletMarginMiner", {"margin": 0.2}),
    "pairs": ("MultiSimilarityMiner", {}),
    "one pair an anchor": ("BatchEasyHardMiner", {}),
    "hard": ("BatchHardMiner", {}),
    "nothing": ("TripletMarginMiner", {"margin": -10.0}),
}


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("reducer", [None, "MeanReducer", "SumReducer"])
def test_a_miners_tuple(miner, reducer):
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    name, settings = MINERS[miner]
    mine = getattr(miners, name)(**settings)
    x, ref, y, ref_y = embeddings(), embeddings(30, seed=1), class_ids(), class_ids(30, seed=3)
    options = library_options("default", reducer)
    if miner == "nothing":
        listed = mine(x, y)
        assert all(len(part) == 0 for part in listed)
        value, gradient = value_and_gradients(lambda x: TripletMarginLoss(**options)(x, y, listed), x)
        assert float(value) == 0 and torch.equal(gradient, torch.zeros_like(x))
        return
    both(lambda loss, a: loss(a, y, mine(a, y)), x, **options)
    both(lambda loss, a: loss(a, indices_tuple=mine(a, y)), x, **options)
    if name != "BatchEasyHardMiner":
        both(lambda loss, a, b: loss(a, y, mine(a, y, b, ref_y), b, ref_y), x, ref, **options)


def test_pairs_that_are_listed_twice_count_twice():
    y = class_ids()
    utils = pytest.importorskip("pytorch_metric_learning.utils.loss_and_miner_utils")
    once = utils.get_all_pairs_indices(y)
    twice = tuple(torch.cat([part, part[:7]]) for part in once)
    both(lambda loss, a: loss(a, y, twice), embeddings(), reducer=library_options("default", "SumReducer")["reducer"])


def test_a_miner_beside_mining_is_refused():
    index = torch.tensor([0])
    with pytest.raises(InputError, match="mining must be 'all' beside it, got 'hard'"):
        TripletMarginLoss(mining="hard")(embeddings(), class_ids(), (index, index, index))


def test_cross_batch_memory():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    settings = {"plain": {}, "mined": {"miner": miners.MultiSimilarityMiner()}}
    for options in settings.values():
        memories = [
            losses.CrossBatchMemory(make(), 8, 40, **options) for make in (losses.TripletMarginLoss, TripletMarginLoss)
        ]
        for step in range(5):  # the memory is filled, and begins anew
            x, y = embeddings(12, seed=step), class_ids(12, seed=step)
            want, got = (value_and_gradients(lambda x, m=m, y=y: m(x, y), x) for m in memories)
            torch.testing.assert_close(got, want)
    want, got = (
        value_and_gradients(
            lambda x, make=make: losses.CrossBatchMemory(make(), 8, 40)(
                x, class_ids(), enqueue_mask=torch.arange(24) % 2 == 0
            ),
            embeddings(),
        )
        for make in (losses.TripletMarginLoss, TripletMarginLoss)
    )
    torch.testing.assert_close(got, want)
    assert float(want[0]) > 0


def test_the_other_wrappers():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    for symmetric in (True, False):
        both(
            lambda loss, a, b, s=symmetric: losses.SelfSupervisedLoss(loss, symmetric=s)(a, b),
            embeddings(),
            embeddings(seed=1),
        )
    both(lambda loss, a: losses.MultipleLosses([loss, loss], weights=[1, 0.5])(a, class_ids()), embeddings())


LABELS = {
    "list": lambda y: y.tolist(),
    "tuple": lambda y: tuple(y.tolist()),
    "int32": lambda y: y.numpy().astype(np.int32),
    "uint16": lambda y: y.numpy().astype(np.uint16),
    "uint64": lambda y: y.numpy().astype(np.uint64),
    "float": lambda y: y.double() / 3,
    "numpy float": lambda y: y.numpy().astype(np.float32) / 3,
    "big-endian": lambda y: y.numpy().astype(">i4"),
    "torch uint16": lambda y: y.to(torch.uint16),
    "backwards": lambda y: y.numpy()[::-1][::-1],
}


@pytest.mark.parametrize("form", LABELS)
def test_class_ids_in_every_form(form):
    x, other, y = embeddings(), embeddings(seed=1), class_ids()
    given = LABELS[form](y)
    loss = TripletMarginLoss()
    assert torch.equal(loss(x, given), loss(x, y))
    copied = LABELS[form](y.clone())
    assert torch.equal(
        loss(x, given, ref_emb=other, ref_labels=copied), loss(x, y, ref_emb=other, ref_labels=y.clone())
    )
    assert torch.equal(loss(x, given, ref_emb=other, ref_labels=given), loss(x, y, ref_emb=other, ref_labels=y))
    assert torch.equal(vse_plus_plus(x, other, labels=given), vse_plus_plus(x, other, labels=y))


def test_two_classes_as_bools():
    x, y = embeddings(), class_ids(classes=2)
    want = TripletMarginLoss()(x, y)
    for given in (y.bool(), y.bool().numpy(), y.bool().tolist()):
        assert torch.equal(TripletMarginLoss()(x, given), want)
    both(lambda loss, a: loss(a, y.bool()), embeddings())
    both(lambda loss, a: loss(a, y.double() - 0.5), embeddings())
    # ids of two kinds are equal where their values are
    loss = TripletMarginLoss()
    assert torch.equal(
        loss(x, y, ref_emb=x + 1, ref_labels=y.double()), loss(x, y, ref_emb=x + 1, ref_labels=y.clone())
    )


def test_labels_of_tables_and_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    x, y = embeddings(), class_ids()
    hot = F.one_hot(y)
    want = TripletMarginLoss()(x, y)
    for given in (hot, hot.numpy(), hot.tolist(), sparse.csr_matrix(hot.numpy()), hot.to_sparse(), hot.bool()):
        assert torch.equal(TripletMarginLoss()(x, given), want)
    pandas = pytest.importorskip("pandas")
    assert torch.equal(TripletMarginLoss()(x, pandas.Series(y.numpy(), index=range(100, 124))), want)


def library_classes(base):
    """open_clip's CoCaLoss and DistillClipLoss, as its file has them, on another ClipLoss."""
    theirs = pytest.importorskip("open_clip.loss")
    namespace = {**vars(theirs), "ClipLoss": base}
    for name in ("CoCaLoss", "DistillClipLoss"):
        exec(inspect.getsource(getattr(theirs, name)), namespace)
    return namespace["CoCaLoss"], namespace["DistillClipLoss"]


def clip_features(seed):
    return F.normalize(embeddings(seed=seed), dim=-1)


def test_coca_and_distillation_build_on_ours():
    theirs = pytest.importorskip("open_clip.loss")
    scale = torch.tensor(10.0, dtype=torch.float64)
    logits = embeddings(24, seed=5, width=7 * 6).reshape(24, 6, 7)
    words = torch.randint(0, 7, (24, 6), generator=torch.Generator().manual_seed(1))
    our_coca, our_distill = library_classes(ClipLoss)
    given = clip_features(0), clip_features(1), scale
    want, got = (
        value_and_gradients(lambda a, b, s, make=make: sum(make(2.0, 1.0)(a, b, logits, words, s)), *given)
        for make in (theirs.CoCaLoss, our_coca)
    )
    torch.testing.assert_close(got, want)
    teacher = clip_features(2), clip_features(3)
    want, got = (
        value_and_gradients(lambda a, b, s, make=make: sum(make()(a, b, s, *teacher, s * 2)), *given)
        for make in (theirs.DistillClipLoss, our_distill)
    )
    torch.testing.assert_close(got, want)


def features_and_scales():
    return clip_features(0), clip_features(1), *torch.tensor([10.0, -5.0], dtype=torch.float64)


def test_logits_and_ground_truth_are_open_clips():
    theirs = pytest.importorskip("open_clip.loss")
    given = features_and_scales()
    for bias in (None, given[3]):
        torch.testing.assert_close(
            ClipLoss().get_logits(*given[:3], bias), theirs.ClipLoss().get_logits(*given[:3], bias)
        )
        torch.testing.assert_close(
            SigLipLoss().get_logits(*given[:3], bias), theirs.SigLipLoss().get_logits(*given[:3], bias)
        )
    for keep in (False, True):
        ours, original = ClipLoss(cache_labels=keep), theirs.ClipLoss(cache_labels=keep)
        for count in (4, 4, 6, 4):
            assert torch.equal(ours.get_ground_truth("cpu", count), original.get_ground_truth("cpu", count))
    for negative in (False, True):
        arguments = (torch.device("cpu"), torch.float64, 4, negative)
        assert torch.equal(SigLipLoss().get_ground_truth(*arguments), theirs.SigLipLoss().get_ground_truth(*arguments))
        want = theirs.SigLipLoss()._loss(*given, negative_only=negative)
        torch.testing.assert_close(SigLipLoss()._loss(*given, negative_only=negative), want)


def halved(base):
    class Halved(base):
        def get_logits(self, *arguments, **options):
            logits = super().get_logits(*arguments, **options)
            return tuple(x / 2 for x in logits) if isinstance(logits, tuple) else logits / 2

    return Halved


def shifted(base):
    class Shifted(base):
        def get_ground_truth(self, *arguments, **options):
            return super().get_ground_truth(*arguments, **options).roll(1, 0)

    return Shifted


@pytest.mark.parametrize("change", [halved, shifted])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_what_a_subclass_overrides_is_listened_to(name, change):
    theirs = getattr(pytest.importorskip("open_clip.loss"), name)
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    given = features_and_scales()
    want = value_and_gradients(change(theirs)(), *given)
    torch.testing.assert_close(value_and_gradients(change(ours)(), *given), want)
    assert not torch.isclose(want[0], ours()(*given))


def test_a_method_put_on_the_object_is_listened_to():
    given = features_and_scales()
    loss = ClipLoss()
    plain = loss(*given)
    loss.get_ground_truth = lambda device, count: torch.arange(count).roll(1)
    assert not torch.isclose(loss(*given), plain)


def test_labels_kept_in_a_validation_serve_training():
    loss = ClipLoss(cache_labels=True)
    with torch.inference_mode():
        loss.get_ground_truth(torch.device("cpu"), 24)
    image = clip_features(0).requires_grad_()
    per_image, _ = loss.get_logits(image, clip_features(1), 10.0)
    F.cross_entropy(per_image, loss.get_ground_truth(torch.device("cpu"), 24)).backward()
    assert image.grad.abs().sum() > 0


x32, y32 = (F.normalize(embeddings(seed=seed), dim=-1).float() for seed in (0, 1))
INDICES = tuple(torch.tensor(part) for part in ([0, 1], [2, 3], [4, 5]))
COMPUTE = {
    "ClipLoss": lambda x, y: ClipLoss()(x, y, 10.0),
    "ClipLoss, overridden": lambda x, y: halved(ClipLoss)()(x, y, torch.tensor(10.0)),
    "SigLipLoss": lambda x, y: SigLipLoss()(x, y, 10.0, -5.0),
    "TripletMarginLoss": lambda x, y: TripletMarginLoss()(x, class_ids()),
    "TripletMarginLoss, references": lambda x, y: TripletMarginLoss()(
        x, class_ids(), ref_emb=y, ref_labels=class_ids()
    ),
    "TripletMarginLoss, partners": lambda x, y: TripletMarginLoss()(x, class_ids(), ref_emb=y),
    "TripletMarginLoss, listed": lambda x, y: TripletMarginLoss(2.0)(x, None, INDICES),
    "vse_plus_plus": lambda x, y: vse_plus_plus(x, y),
    "acmr_triplet": lambda x, y: acmr_triplet(x, y, class_ids(), 1.0, 1.0),
    "frobenius": lambda x, y: frobenius([x, y]),
    "gradient_reversal": lambda x, y: gradient_reversal(x).sum(),
}


@pytest.mark.parametrize("name", COMPUTE)
def test_losses_are_the_same_in_a_validation(name):
    want = COMPUTE[name](x32, y32)
    with torch.no_grad():
        torch.testing.assert_close(COMPUTE[name](x32, y32), want, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(COMPUTE[name](x32, y32), want, rtol=0, atol=0)
        inside = x32.clone(), y32.clone()
        torch.testing.assert_close(COMPUTE[name](*inside), want, rtol=0, atol=0)
    # what was made there may be measured outside
    torch.testing.assert_close(COMPUTE[name](*inside), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", COMPUTE)
def test_losses_under_another_default_type(name):
    def compute(x):
        return torch.autograd.grad(COMPUTE[name](x, y32), x)[0]

    want = compute(x32.clone().requires_grad_())
    torch.set_default_dtype(torch.float64)
    try:
        got = compute(x32.clone().requires_grad_())
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


SCALES = {
    "numpy": np.array(10.0),
    "numpy scalar": np.float32(10.0),
    "integer": 10,
    "integer tensor": torch.tensor(10),
    "one element": torch.tensor([10.0]),
}


@pytest.mark.parametrize("form", SCALES)
def test_scales_in_every_form(form):
    for loss in (ClipLoss(), SigLipLoss(), halved(ClipLoss)()):
        torch.testing.assert_close(loss(x32, y32, SCALES[form]), loss(x32, y32, 10.0))


@pytest.mark.parametrize("scale", ["20", [20.0], None, torch.ones(2), np.ones(2), 1j, torch.tensor(True), True])
def test_scales_that_are_none_are_refused(scale):
    for loss in (ClipLoss(), SigLipLoss(), halved(ClipLoss)(), halved(SigLipLoss)()):
        with pytest.raises(InputError, match="logit_scale must be a number or a tensor of one element, got"):
            loss(x32, y32, scale)
        if scale is not None:
            with pytest.raises(InputError, match="logit_bias must be a number or a tensor of one element, got"):
                loss(x32, y32, 1.0, scale)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipLoss(rank="0"), "rank must be an integer of 0 or more, got '0'"),
        (lambda: ClipLoss(world_size=None), "world_size must be an integer of 1 or more, got None"),
        (lambda: SigLipLoss(world_size=0), "world_size must be an integer of 1 or more, got 0"),
        (lambda: ClipLoss(threads="2"), "threads must be an integer of 1 or more, got '2'"),
        (lambda: SigLipLoss(threads=1.5), "threads must be an integer of 1 or more, got 1.5"),
        (lambda: SigLipLoss(chunk_size=-1), "chunk_size must be an integer of 0 or more, got -1"),
        (lambda: TripletMarginLoss("0.1"), "margin must be a finite number, got '0.1'"),
        (lambda: TripletMarginLoss(None), "margin must be a finite number, got None"),
        (lambda: TripletMarginLoss(float("nan")), "margin must be a finite number, got nan"),
        (lambda: TripletMarginLoss(mining="hardest"), "mining must be one of .*, got 'hardest'"),
        (lambda: vse_plus_plus(x32, y32, "0.2"), "margin must be a finite number, got '0.2'"),
        (lambda: vse_plus_plus(x32.numpy(), y32), "image must be a floating-point tensor .*, got ndarray"),
        (lambda: TripletMarginLoss()(x32.numpy(), class_ids()), "embeddings must be a floating-point .*, got ndarray"),
        (lambda: TripletMarginLoss()(x32[0], class_ids()), r"embeddings must be .*, got torch.float32 \(8,\)"),
        (lambda: TripletMarginLoss()(class_ids()[:, None], class_ids()), "embeddings must be .*, got torch.int64"),
        (lambda: ClipLoss()(x32.tolist(), y32, 1.0), "image_features must be a floating-point tensor .*, got list"),
        (lambda: ClipLoss()(x32, y32.long(), 1.0), "text_features must be a floating-point tensor .*, got torch.int64"),
        (lambda: SigLipLoss()(x32, y32.numpy(), 1.0), "text_features must be a floating-point .*, got ndarray"),
        (lambda: gradient_reversal(x32, "1"), "scale must be a finite number, got '1'"),
        (lambda: gradient_reversal(x32.numpy()), "x must be a floating-point tensor, got ndarray"),
        (lambda: frobenius([x32.long()]), "weights must be floating-point tensors, got torch.int64"),
        (lambda: frobenius([x32, None]), "weights must be floating-point tensors, got NoneType"),
    ],
)
def test_values_of_the_wrong_kind(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_frobenius_of_one_weight_is_not_that_of_its_rows():
    weight = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    assert float(frobenius(weight)) == pytest.approx(13.0)
    assert float(frobenius(nn.Linear(2, 2).requires_grad_(False).parameters())) > 0


def test_chunks_change_nothing():
    given = features_and_scales()
    assert torch.equal(SigLipLoss(False, 0, 1, None, 8)(*given), SigLipLoss()(*given))


def test_half_precision_lists_are_computed_in_float32():
    x, y = x32.half(), class_ids()
    loss = TripletMarginLoss()(x, y, ref_emb=y32.half(), ref_labels=y)
    want = TripletMarginLoss()(x.float(), y, ref_emb=y32.half().float(), ref_labels=y)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(want), rel=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = TripletMarginLoss(distance="dot")(x32, y, ref_emb=y32, ref_labels=y)
    assert torch.equal(inside, TripletMarginLoss(distance="dot")(x32, y, ref_emb=y32, ref_labels=y))
