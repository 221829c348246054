import itertools
import math

import pytest
import torch
from small import small_dataset
from torch.testing import assert_close

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import (
    BASELINES,
    CCA,
    CCAITQ,
    CMFH,
    CVH,
    FSH,
    LinearHeads,
    PCASign,
    Random,
    SemanticMatching,
    itq,
)
from cmr_fast.methods.evaluation import averaged, evaluate_model

CORRELATIONS = (0.9, 0.6, 0.3)


def correlated(count=20_000, seed=0):
    """Pairs whose population canonical correlations are CORRELATIONS, then 0, behind two invertible mixings."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rho = torch.tensor([*CORRELATIONS, 0.0], dtype=torch.float64)
    image = normal(count, 4)
    text = rho * image + (1 - rho**2).sqrt() * normal(count, 4)
    text = torch.cat([text, normal(count, 2)], dim=1)
    image, text = image @ normal(4, 4) + 3, text @ normal(6, 6) - 2
    return Pairs(image.float(), text.float(), torch.arange(count) % 2)


def test_cca_finds_known_correlations():
    train = correlated()
    cca = CCA(dim=3, ridge=0.0).fit(train)
    assert_close(cca.correlations, torch.tensor(CORRELATIONS, dtype=torch.float64), atol=0.02, rtol=0)
    held_out = correlated(seed=0).select(torch.arange(5_000))
    image, text = cca.encode("image", held_out.image), cca.encode("text", held_out.text)
    both = torch.corrcoef(torch.cat([image, text], dim=1).T)
    assert_close(both[:3, 3:].diagonal(), torch.tensor(CORRELATIONS), atol=0.04, rtol=0)
    assert (both[:3, 3:] - both[:3, 3:].diagonal().diag()).abs().max() < 0.05


def test_cca_variates_are_white_on_the_training_split_and_weight_is_a_power_of_the_correlation():
    train = correlated(2_000)
    variates = CCA(dim=3, ridge=0.0).fit(train).encode("text", train.text)
    assert_close(variates.T @ variates / 2_000, torch.eye(3), atol=1e-4, rtol=0)
    weighted = CCA(dim=3, ridge=0.0, weight=2.0).fit(train)
    scale = (weighted.correlations**2).float()
    assert_close(weighted.encode("text", train.text), variates * scale, atol=1e-5, rtol=1e-4)


def test_cca_does_not_depend_on_the_units_of_a_feature():
    train = correlated(500)
    rescaled = Pairs(train.image * torch.tensor([1e-3, 1.0, 50.0, 7.0]), train.text, train.labels)
    before = CCA(dim=2).fit(train).encode("image", train.image)
    after = CCA(dim=2).fit(rescaled).encode("image", rescaled.image)
    assert_close(after, before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dim, bits", [(4, 4), (4, 11), (1, 3), (1, 1)])
def test_itq_rotation_is_orthonormal_and_lowers_the_quantisation_error(dim, bits):
    values = torch.randn(400, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def error(rotation):
        turned = values @ rotation
        return float((torch.where(turned >= 0, 1.0, -1.0) - turned).square().sum())

    rotation = itq(values, bits, 50, seed=3)
    assert rotation.shape == (dim, bits)
    assert_close(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64), atol=1e-9, rtol=0)
    assert error(rotation) <= error(itq(values, bits, 0, seed=3))


def test_itq_keeps_cosines_and_undoes_a_rotation_of_corners():
    corners = torch.tensor([[i >> b & 1 for b in range(3)] for i in range(8)], dtype=torch.float64) * 2 - 1
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    found = corners @ turn @ itq(corners @ turn, 3, 200, seed=0)
    assert_close(found.abs(), torch.ones(8, 3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [1, 3, 4, 16])
@pytest.mark.parametrize("name", ["cca-itq", "linear-heads-sign", "pca-sign", "random"])
def test_codes_have_the_bits_asked_for_and_repeat(name, bits):
    train = correlated(300)
    first, second = (BASELINES[name](bits=bits, seed=5).fit(train) for _ in range(2))
    assert (first.binary, first.metric, first.name) == (True, "hamming", name)
    for modality, features in (("image", train.image), ("text", train.text)):
        logits = first.encode(modality, features)
        assert logits.shape == (300, bits) and logits.dtype == torch.float32
        assert torch.equal(logits, second.encode(modality, features))
        halves = torch.cat([first.encode(modality, features[:7]), first.encode(modality, features[7:])])
        assert torch.equal(halves >= 0, logits >= 0)


def test_pairs_agree_in_cca_itq_codes_and_not_in_random_ones():
    train = correlated(2_000)

    def agreement(baseline):
        baseline.fit(train)
        bits = [baseline.encode(modality, getattr(train, modality)) >= 0 for modality in ("image", "text")]
        return float((bits[0] == bits[1]).float().mean())

    # for normal variables of correlation r, signs agree with probability 1 - arccos(r) / pi
    assert agreement(CCAITQ(8, ridge=0.0, dim=1)) == pytest.approx(1 - math.acos(0.9) / math.pi, abs=0.02)
    assert abs(agreement(Random(64)) - 0.5) < 0.02


def test_random_codes_are_balanced_and_tell_near_rows_apart():
    train = correlated(2_000)
    random = Random(32).fit(train)
    bits = (random.encode("text", train.text) >= 0).float()
    assert (bits.mean(dim=0) - 0.5).abs().max() < 0.06
    near = train.text + 0.01 * torch.randn(train.text.shape, generator=torch.Generator().manual_seed(1))
    moved = (random.encode("text", near) >= 0).float()
    assert abs(float((bits == moved).float().mean()) - 0.5) < 0.03


def test_pca_sign_aligns_the_sign_of_each_component():
    count = 1_000
    scale = torch.tensor([5.0, 2.0, 1.0])
    shared = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) * scale
    train = Pairs(shared, -shared, torch.arange(count) % 2)
    pca = PCASign(3, scale="global").fit(train)
    assert torch.equal(pca.encode("image", shared) >= 0, pca.encode("text", -shared) >= 0)


@pytest.mark.parametrize("name", list(BASELINES))
def test_evaluates_like_a_trained_method(name):
    train = correlated(60)
    model = BASELINES[name](**({"dim": 3} if name == "cca" else {"bits": 8})).fit(train)
    results = evaluate_model(model, PairedDataset("made up", train, train, train))
    assert all(0 < results[direction].map <= 1 for direction in ("i2t", "t2i"))


def test_linear_heads_bring_pairs_together_without_labels():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 8, generator=generator)
    image = torch.cat([shared, torch.randn(400, 8, generator=generator)], dim=1) @ torch.randn(
        16, 24, generator=generator
    )
    text = torch.cat([torch.randn(400, 8, generator=generator), shared], dim=1) @ torch.randn(
        16, 20, generator=generator
    )
    train, new = (Pairs(image[rows], text[rows], torch.zeros(len(image[rows]), dtype=torch.int64))
                  for rows in (slice(0, 300), slice(300, 400)))  # fmt: skip
    heads = LinearHeads(16, 200, seed=1).fit(train)
    sides = [torch.nn.functional.normalize(heads.encode(m, getattr(new, m)), dim=1) for m in ("image", "text")]
    found = (sides[0] @ sides[1].T).argmax(dim=1) == torch.arange(100)
    assert found.double().mean() > 0.5  # 0.01 at chance
    again = LinearHeads(16, 200, seed=1).fit(train).encode("image", new.image)
    assert torch.equal(again, heads.encode("image", new.image))
    assert (heads.encode("image", new.image) - LinearHeads(16, 200, seed=2).fit(train).encode("image", new.image)).any()


def test_refusals():
    train = correlated(50)
    for make, words in [
        (lambda: CCAITQ(0), "bits must be an integer of 1 or more and below 4097, got 0"),
        (lambda: CCA(0), "dim must be an integer of 1 or more, got 0"),
        (lambda: CCA(2.5), "dim must be an integer"),
        (lambda: CCA(3, ridge=-1.0), "ridge must be a finite number of 0 or more, got -1.0"),
        (lambda: CVH(3, ridge=torch.nan), "ridge must be a finite number of 0 or more, got nan"),
        (lambda: CCAITQ(3, ridge="1"), "ridge must be a finite number"),
        (lambda: CCAITQ(8, dim=9), "dim must be an integer of 1 or more and below 9, got 9"),
        *(
            (lambda kind=kind, bits=bits: kind(bits), "bits must be an integer of 1 or more and below 4097")
            for kind in (CCAITQ, CVH, CMFH, FSH, PCASign, Random)
            for bits in (2.5, "8", True, None, 5000)
        ),
        (lambda: CCAITQ(8, iterations=-1), "iterations"),
        (lambda: PCASign(8, scale="log"), "scale must be one of"),
        (lambda: CCA(5).fit(train), "4 canonical variates at most, dim=5"),
        (lambda: CCA(2).fit(train.select(torch.arange(1))), "at least 2 training pairs, got 1"),
        (lambda: CCA(2).encode("image", train.image), "not fitted"),
        (lambda: CCA(2).fit(train).encode("image", train.text), "image features must be 4 wide, got 6"),
        (lambda: CCA(2).fit(train).encode("sound", train.text), "modality must be one of"),
        (
            lambda: CCA(2).fit(Pairs(torch.zeros(9, 3, 4, 4, dtype=torch.uint8), torch.zeros(9, 2), torch.arange(9))),
            "shape",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            make()


def test_a_constant_feature_and_more_features_than_pairs_do_no_harm():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(10, 30, generator=generator)
    image[:, 3] = 2.0
    train = Pairs(image, torch.randn(10, 5, generator=generator), torch.arange(10) % 2)
    for baseline in (CCA(3, ridge=0.0), CCAITQ(16), FSH(16), PCASign(16), Random(4)):
        assert torch.isfinite(baseline.fit(train).encode("image", image)).all()


@pytest.mark.realdata
def test_wikipedia_cca_and_random(data_root):
    from cmr_fast.data import load

    data = load(data_root / "wikipedia")
    cca = evaluate_model(CCA(7, 1e-3).fit(data.train), data)
    assert cca["i2t"].map == pytest.approx(0.2465, abs=0.001)
    assert cca["t2i"].map == pytest.approx(0.2008, abs=0.001)
    chance = [evaluate_model(Random(32, seed=seed).fit(data.train), data)["i2t"].map for seed in range(5)]
    assert sum(chance) / 5 == pytest.approx(0.118, abs=0.002)


def test_cvh_is_the_sign_of_canonical_variates():
    data = small_dataset()
    cvh, cca = CVH(4).fit(data.train), CCA(4).fit(data.train)
    for name in ("image", "text"):
        assert_close(cvh.encode(name, getattr(data.query, name)), cca.encode(name, getattr(data.query, name)))
    assert CVH(12).fit(data.train).encode("image", data.query.image).shape == (45, 12)


def test_cmfh_never_rises_and_its_turns_are_minima():
    data = small_dataset()
    model = CMFH(6, iterations=30).fit(data.train)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(model.losses))
    assert model.losses[-1] < 0.99 * model.losses[0]


def test_cmfhs_turns_are_minima_of_its_objective():
    """The objective, written out, has slope 0 at what each turn solves for: U and P at the V before, V at these."""
    image, text = (torch.randn(20, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64) for d in (5, 4))
    lam, mu, gamma = 0.3, 2.0, 3.0
    model = CMFH(3, lam=lam, mu=mu, gamma=gamma, iterations=4)
    seen = []
    model._loss = lambda *args: seen.append(args) or 0.0
    maps = model.learn(image, text)
    (*_, before, _, _), (*_, after, factors, last) = seen[-2:]
    assert maps[0] is last[0] and maps[1] is last[1]

    def slopes(shared, which):
        parts = [x.clone().requires_grad_() for x in (*factors, *last, shared)]
        u_image, u_text, p_image, p_text, v = parts
        total = gamma * sum(part.square().sum() for part in parts)
        for weight, x, u, p in ((lam, image, u_image, p_image), (1 - lam, text, u_text, p_text)):
            total = total + weight * (x - v @ u).square().sum() + mu * (v - x @ p).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, [parts[i] for i in which])])

    for shared, which in ((before, range(4)), (after, [4])):
        assert float(slopes(shared, which).abs().max()) < 1e-10
    assert float(slopes(before, [4]).abs().max()) > 1e-3  # V has moved in its turn


def test_unsupervised_baselines_beat_random_codes():
    data = small_dataset()
    scores = {
        kind: averaged(evaluate_model(kind(16).fit(data.train), data))["average"] for kind in (CMFH, CVH, FSH, Random)
    }
    assert min(scores[CMFH], scores[CVH], scores[FSH]) > scores[Random] + 0.05


def test_cmfh_refuses_bad_settings():
    with pytest.raises(InputError, match="lam must lie"):
        CMFH(lam=1.0)
    with pytest.raises(InputError, match="mu must be a finite number above 0"):
        CMFH(mu=torch.inf)
    with pytest.raises(InputError, match="iterations must be an integer"):
        CMFH(iterations=2.5)
    with pytest.raises(InputError, match="bits must be an integer of 1 or more"):
        CMFH(0)


def fsh_similarities(image, text, image_anchors, text_anchors, count):
    """S_X and S_Y item by item and anchor by anchor."""

    def nearest(x, anchors):
        return sorted(range(len(anchors)), key=lambda j: (float((x - anchors[j]).norm()), j))[:count]

    def mean(one, other, points):
        return sum(math.exp(-float((points[a] - points[b]).norm()) / 2) for a in one for b in other) / count**2

    of_image = [nearest(x, image_anchors) for x in image], [nearest(x, image_anchors) for x in image_anchors]
    of_text = [nearest(x, text_anchors) for x in text], [nearest(x, text_anchors) for x in text_anchors]
    by_image = [[mean(i, j, image_anchors) for j in of_text[1]] for i in of_image[0]]
    by_text = [[mean(i, j, text_anchors) for j in of_image[1]] for i in of_text[0]]
    return torch.tensor(by_image, dtype=torch.float64), torch.tensor(by_text, dtype=torch.float64)


def test_fsh_joins_the_similarities_of_its_paper():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(12, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    model = FSH(4, anchors=5, neighbours=2)
    found = model._similarities((image, text), [image[:5], text[:5]])[1]
    for a, b in zip(found, fsh_similarities(image, text, image[:5], text[:5], 2), strict=True):
        assert_close(a, b)


def fsh_by_loops(image, text, bits, anchors, neighbours, lam, power, seed, iterations):
    """Projections, the objective around each iteration and w, one number at a time."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(image), generator=generator)[:anchors].tolist()
    maps = [torch.randn(x.shape[1], bits, generator=generator, dtype=torch.float64) for x in (image, text)]
    similar = fsh_similarities(image, text, image[chosen], text[chosen], neighbours)
    rows, columns, units = range(len(image)), range(anchors), range(bits)
    b = [[float(text[i] @ maps[1][:, k]) for k in units] for i in rows]
    b_s = [b[i] for i in chosen]

    def agreement(s):
        return sum(b[i][k] * b_s[j][k] * float(s[i][j]) for i in rows for j in columns for k in units)

    def objective(s):
        terms = (
            (b[i][k] - float(x[i] @ w[:, k])) ** 2
            for x, w in zip(sides, maps, strict=True)
            for i in rows
            for k in units
        )
        return lam * sum(terms) - agreement(s)

    sides, weights, losses = (image, text), [0.5], []
    for _ in range(iterations):
        s = weights[-1] * similar[0] + (1 - weights[-1]) * similar[1]
        before = objective(s)
        pull = [[sum(float(x[i] @ w[:, k]) for x, w in zip(sides, maps, strict=True)) for k in units] for i in rows]
        near = [[sum(float(s[i][j]) * b_s[j][k] for j in columns) for k in units] for i in rows]
        b = [[1.0 if near[i][k] + 2 * lam * pull[i][k] >= 0 else -1.0 for k in units] for i in rows]
        b_s = [[1.0 if sum(float(s[i][j]) * b[i][k] for i in rows) >= 0 else -1.0 for k in units] for j in columns]
        maps = [torch.linalg.lstsq(x, torch.tensor(b, dtype=torch.float64)).solution for x in sides]
        losses.append((before, objective(s)))
        # K has 1 on its diagonal: its trace is the number of anchors
        missed = [anchors - agreement(one) for one in similar]
        weights.append((missed[0] / sum(missed)) ** (1 / (1 - power)))
    return maps, losses, weights


@pytest.mark.parametrize("power", [0.5, 0.75])
def test_fsh_turns_as_its_equations_do(power):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    text = 0.3 * torch.randn(12, 2, generator=generator, dtype=torch.float64) + image[:, :2]
    settings = {"anchors": 5, "neighbours": 2, "lam": 0.1, "power": power, "seed": 1}
    maps, losses, weights = fsh_by_loops(image, text, 4, iterations=2, **settings)
    model = FSH(4, iterations=2, **settings)
    for a, b in zip(model.learn(image, text), maps, strict=True):
        assert_close(a, b)
    assert_close(torch.tensor(model.losses), torch.tensor(losses))
    assert_close(model.weights, weights)
    assert model.weights[1] == pytest.approx({0.5: 0.166317, 0.75: 0.027661}[power], abs=1e-6)
    assert model.weights[2] != model.weights[1]


def test_fsh_never_rises_within_an_iteration_and_rests_at_a_minimum():
    model = FSH(6, anchors=9, neighbours=3, lam=2.0).fit(small_dataset().train)
    assert all(after <= before + 1e-9 for before, after in model.losses[1:])  # at first codes are not yet signs
    assert 2 < len(model.losses) < 100
    before, after = model.losses[-1]
    assert before == pytest.approx(after, rel=1e-12)


def test_fsh_does_not_look_at_the_length_of_a_row():
    data = small_dataset()
    longer = Pairs(data.train.image * 3, data.train.text * torch.rand(45, 1).add(0.5), data.train.labels)
    codes = [FSH(16).fit(train).encode("text", data.query.text) for train in (data.train, longer)]
    assert_close(codes[0], codes[1], atol=1e-4, rtol=1e-4)


def test_fsh_refuses_bad_settings():
    for options, words in (
        ({"bits": 0}, "bits must be an integer of 1 or more"),
        ({"anchors": 0}, "anchors must be an integer of 1 or more"),
        ({"neighbours": 2.5}, "neighbours must be an integer of 1 or more"),
        ({"power": 1.0}, "power must be at least 0 and below 1"),
        ({"lam": 0.0}, "lam must be a finite number above 0"),
    ):
        with pytest.raises(InputError, match=words):
            FSH(**options)


@pytest.mark.parametrize("multi", [False, True])
def test_semantic_matching_is_at_the_minimum_of_its_regressions(multi):
    data = small_dataset(multi=multi)
    model = SemanticMatching(penalty=2.0).fit(data.train)
    labels = data.train.labels
    y = (
        torch.eye(3).double()[labels]
        if labels.ndim == 1
        else labels.double() / labels.sum(1, keepdim=True).clamp(min=1)
    )
    for modality in ("image", "text"):
        x = getattr(data.train, modality).double()
        x = (x - x.mean(0)) / x.std(0, correction=0)
        p = model.encode(modality, getattr(data.train, modality)).double()
        weight = model.projection[modality] * getattr(data.train, modality).double().std(0, correction=0)[:, None]
        slope = x.T @ (p * y.sum(1, keepdim=True) - y) + 2.0 * weight
        assert slope.abs().max() < 1e-3 and p.sum(1).sub(1).abs().max() < 1e-5


def test_semantic_matching_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    data = small_dataset()
    x = data.train.image.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    theirs = LogisticRegression(max_iter=1000, tol=1e-8).fit(
        ((x - mean) / deviation).numpy(), data.train.labels.numpy()
    )
    asked = ((data.query.image.double() - mean) / deviation).numpy()
    ours = SemanticMatching().fit(data.train).encode("image", data.query.image)
    assert abs(theirs.predict_proba(asked) - ours.numpy()).max() < 1e-3
