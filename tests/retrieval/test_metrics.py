"""Every convention against its own formula, every tie rule against the orders that it stands for."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.errors import InputError
from cmr_fast.losses import TripletMarginLoss
from cmr_fast.ops import pack_codes
from cmr_fast.retrieval import _ties, metrics
from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, convention_table, tie_table
from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

NO_RANDOM_SKIP = [c for c in CONVENTIONS if c != "hits_skip"]


# one oracle per convention: relevance in rank order (list of 0 and 1), k -> AP, or None where the query is left out


def precisions(rel):
    return [Fraction(sum(rel[: i + 1]), i + 1) for i in range(len(rel))]


def total(rel, k):
    return sum((p * hit for p, hit in zip(precisions(rel)[:k], rel, strict=False)), Fraction(0))


def oracle_all(rel, k):
    return total(rel, k) / sum(rel) if sum(rel) else Fraction(0)


def oracle_topk_hits(rel, k):
    return total(rel, k) / sum(rel[:k]) if sum(rel[:k]) else Fraction(0)


def oracle_topk_R(rel, k):
    return total(rel, k) / sum(rel) if sum(rel) else None


def oracle_topk_min(rel, k):
    return total(rel, k) / min(k, sum(rel)) if sum(rel) else Fraction(0)


def oracle_map_at_r(rel, k):
    return total(rel, min(k, sum(rel))) / sum(rel) if sum(rel) else None


def oracle_first_k_hits(rel, k):
    at_hits = [p for p, hits in zip(precisions(rel), rel, strict=True) for _ in range(hits)][:k]
    return sum(at_hits) / len(at_hits) if at_hits else Fraction(0)


def oracle_hits_skip(rel, k):
    return total(rel, k) / sum(rel[:k]) if sum(rel[:k]) else None


oracle_sephfamily = oracle_topk_R
ORACLES = {name: globals()[f"oracle_{name}"] for name in CONVENTIONS}


def orders(distances, rel, ties):
    """The relevance lists that a tie rule averages over: one, or every placement of relevant items in tied blocks.

    Of a threshold, the hits at each rank: all of a tied block at its last.
    """
    if ties == "threshold":
        last = [sum(x <= d for x in distances) for d in distances]
        return [[sum(r for r, end in zip(rel, last, strict=True) if end == at + 1) for at in range(len(rel))]]
    if ties == "tie_aware":
        blocks = []
        for d in sorted(set(distances)):
            inside = [r for r, x in zip(rel, distances, strict=True) if x == d]
            places = itertools.combinations(range(len(inside)), sum(inside))
            blocks.append([[int(i in chosen) for i in range(len(inside))] for chosen in places])
        return [list(itertools.chain(*parts)) for parts in itertools.product(*blocks)]
    second = {"index": lambda i: i, "optimistic": lambda i: -rel[i], "pessimistic": lambda i: rel[i]}[ties]
    return [[rel[i] for i in sorted(range(len(rel)), key=lambda i: (distances[i], second(i)))]]


def oracle_ap(distances, rel, convention, k, ties):
    values = [ORACLES[convention](order, k) for order in orders(distances, rel, ties)]
    return float("nan") if None in values else float(sum(values) / len(values))


def table(q, db):
    return (np.unpackbits(q[:, None] ^ db, axis=2)).sum(axis=2)


def share_a_label(ql, dl):
    return (ql[:, None, :] & dl[None]).any(axis=2).astype(int)


def problem(seed, queries=12, size=40, bits=5, classes=7):
    """Codes of few bits (many ties), sparse multi-hot labels; the first query has nothing to find."""
    rng = np.random.default_rng(seed)
    q, db = (pack_codes(rng.integers(0, 2, (n, bits))) for n in (queries, size))
    ql, dl = ((rng.random((n, classes)) < 0.15).astype(np.uint8) for n in (queries, size))
    ql[0] = 0
    return q, db, ql, dl


@pytest.mark.parametrize("k", [None, 1, 3, 10, 40, 100])
@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic", "threshold"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_convention_equals_its_formula(convention, ties, k):
    q, db, ql, dl = problem(seed=1)
    result = evaluate_codes(q, db, ql, dl, k=k, convention=convention, ties=ties, bits=5)
    rel = share_a_label(ql, dl)
    assert (rel.sum(axis=1) == 0).any() and (rel.sum(axis=1) > 0).any() and (rel.sum(axis=1) < 10).any()
    want = [oracle_ap(d, r, convention, k or 40, ties) for d, r in zip(table(q, db), rel.tolist(), strict=True)]
    np.testing.assert_allclose(result.ap, want, rtol=0, atol=1e-12)
    counted = [ap for ap in want if ap == ap]
    assert result.num_counted == len(counted)
    assert result.map == pytest.approx(np.mean(counted) if counted else np.nan, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("k", [None, 1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_tie_aware_equals_enumeration(convention, k):
    q, db, ql, dl = problem(seed=2, queries=10, size=11, bits=2, classes=4)
    if convention == "hits_skip" and k is not None and k < 11:
        with pytest.raises(InputError, match="no tie-aware value"):
            evaluate_codes(q, db, ql, dl, k=k, convention=convention, ties="tie_aware", bits=2)
        return
    result = evaluate_codes(q, db, ql, dl, k=k, convention=convention, ties="tie_aware", bits=2)
    rel = share_a_label(ql, dl).tolist()
    want = [oracle_ap(d, r, convention, k or 11, "tie_aware") for d, r in zip(table(q, db), rel, strict=True)]
    np.testing.assert_allclose(result.ap, want, rtol=0, atol=1e-12)


@st.composite
def tied_rankings(draw):
    size = draw(st.integers(1, 9))
    distances = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    rel = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return distances, rel, draw(st.integers(1, 10))


@settings(max_examples=150, deadline=None)
@given(tied_rankings(), st.sampled_from(NO_RANDOM_SKIP), st.sampled_from(TIES))
def test_any_tied_ranking_equals_enumeration(ranking, convention, ties):
    distances, rel, k = ranking
    codes = np.array([[0, 1, 3][d] for d in distances], dtype=np.uint8)[:, None]
    query = np.zeros((1, 1), dtype=np.uint8)
    result = evaluate_codes(query, codes, np.array([1]), np.array(rel), k=k, convention=convention, ties=ties)
    np.testing.assert_allclose(result.ap[0], oracle_ap(distances, rel, convention, k, ties), rtol=0, atol=1e-12)
    lists = orders(distances, rel, ties)
    for at in (1, k):
        assert result.precision_at(at) == pytest.approx(np.mean([sum(x[:at]) / at for x in lists]), abs=1e-12)
        assert result.recall_at(at) == pytest.approx(np.mean([sum(x[:at]) / max(sum(x), 1) for x in lists]), abs=1e-12)
        assert result.recall_one_at(at) == pytest.approx(np.mean([any(x[:at]) for x in lists]), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["all", "topk_R", "topk_min", "map_at_r", "sephfamily"]),
    st.integers(1, 60),
)
def test_bounds_enclose_the_expectation(seed, convention, k):
    q, db, ql, dl = problem(seed, bits=4)
    best, mean, index, worst = (
        evaluate_codes(q, db, ql, dl, k=k, convention=convention, ties=t, bits=4).ap
        for t in ("optimistic", "tie_aware", "index", "pessimistic")
    )
    counted = ~np.isnan(best)
    for middle in (mean, index):
        assert (best[counted] >= middle[counted] - 1e-12).all() and (middle[counted] >= worst[counted] - 1e-12).all()


def test_large_blocks_stay_exact():
    """A thousand items at one distance: rational arithmetic against the closed forms and the hypergeometric sums."""
    n, r, before, hits, m = 1000, 300, 500, 40, 700

    def block(m, x):  # expected sum of precisions at x hits spread over m places
        return sum(
            Fraction(x, m) * (hits + 1 + Fraction((i - 1) * (x - 1), m - 1)) / (before + i) for i in range(1, m + 1)
        )

    harmonic = _ties.harmonic_numbers(before + n)
    one = _ties.Groups(*(np.array([v]) for v in (0, n, r, before, hits)))
    assert _ties.precision_sums(one, np.array([n]), harmonic)[0] == pytest.approx(float(block(n, r)), rel=1e-13)
    chance = [Fraction(1)]  # of x hits, up to a factor, in the first m places
    for x in range(m - (n - r) + 1, r + 1):
        chance.append(chance[-1] * (r - x + 1) * (m - x + 1) / (x * (n - r - m + x)))
    low = m - (n - r)
    rank_sums = [
        sum(Fraction(1, before + i) for i in range(1, m + 1)),
        sum(Fraction(i - 1, before + i) for i in range(1, m + 1)),
    ]
    values = [
        Fraction(x, m) * ((hits + 1) * rank_sums[0] + Fraction(x - 1, m - 1) * rank_sums[1]) / (hits + x) if x else 0
        for x in range(low, r + 1)
    ]
    want = sum(c * v for c, v in zip(chance, values, strict=True)) / sum(chance)
    assert _ties.sum_over_hits(n, r, before, hits, m, 0.0, harmonic) == pytest.approx(float(want), rel=1e-12)


def test_first_hits_of_a_large_block():
    """E[sum of precisions at the first j hits] by the law of each hit's place, in rational arithmetic."""
    from math import comb

    n, r, before, hits, j = 60, 20, 7, 3, 9
    want = sum(
        Fraction(comb(p - 1, i - 1) * comb(n - p, r - i), comb(n, r)) * Fraction(hits + i, before + p)
        for i in range(1, j + 1)
        for p in range(i, n - r + i + 1)
    )
    assert _ties.sum_first_hits(n, r, before, hits, j) == pytest.approx(float(want), rel=1e-12)


def test_blocks_of_queries_change_nothing(monkeypatch):
    q, db, ql, dl = problem(seed=3, queries=30)
    whole = {t: evaluate_codes(q, db, ql, dl, ties=t) for t in TIES}
    monkeypatch.setattr(metrics, "_BLOCK", 100)
    for ties, result in whole.items():
        blocked = evaluate_codes(q, db, ql, dl, ties=ties)
        np.testing.assert_array_equal(result.ap, blocked.ap)
        np.testing.assert_allclose(result.precision_at(range(1, 41)), blocked.precision_at(range(1, 41)), atol=1e-13)


@pytest.mark.parametrize("classes", [1, 8, 24, 64, 70, 200])
def test_multi_label_relevance_of_any_width(classes):
    rng = np.random.default_rng(classes)
    q, db, _, _ = problem(seed=4)
    ql, dl = ((rng.random((n, classes)) < 1.5 / (classes + 3)).astype(np.float32) for n in (len(q), len(db)))
    want = ((ql @ dl.T) > 0).sum(axis=1)
    if classes == 1:  # a column of numbers may mean class ids
        ql, dl = ql.astype(bool), dl.astype(bool)
    result = evaluate_codes(q, db, ql, dl)
    np.testing.assert_array_equal(result.relevant, want)


@pytest.mark.parametrize("bits", [3, 8, 64, 300])
def test_code_lengths(bits):
    rng = np.random.default_rng(bits)
    q, db = (pack_codes(rng.integers(0, 2, (n, bits))) for n in (6, 50))
    ql, dl = rng.integers(0, 3, 6), rng.integers(0, 3, 50)
    result = evaluate_codes(q, db, ql, dl, bits=bits)
    rel = (ql[:, None] == dl).astype(int).tolist()
    want = [oracle_ap(d, r, "all", 50, "index") for d, r in zip(table(q, db), rel, strict=True)]
    np.testing.assert_allclose(result.ap, want, rtol=0, atol=1e-12)


def test_single_labels_equal_one_hot():
    q, db, _, _ = problem(seed=5)
    rng = np.random.default_rng(5)
    ql, dl = rng.integers(0, 4, len(q)), rng.integers(0, 4, len(db))
    eye = np.eye(4, dtype=bool)
    np.testing.assert_array_equal(evaluate_codes(q, db, ql, dl).ap, evaluate_codes(q, db, eye[ql], eye[dl]).ap)


def test_torch_and_numpy_give_the_same():
    q, db, ql, dl = problem(seed=6)
    a = evaluate_codes(q, db, ql, dl, ties="tie_aware")
    b = evaluate_codes(*(torch.from_numpy(x) for x in (q, db, ql, dl)), ties="tie-aware")
    np.testing.assert_array_equal(a.ap, b.ap)
    assert b.ties == "tie_aware"
    x, y = np.random.default_rng(6).standard_normal((2, 9, 4)).astype(np.float32)
    labels = np.arange(9) % 3
    c = evaluate_embeddings(x, y, labels, labels)
    d = evaluate_embeddings(
        torch.tensor(x, requires_grad=True), torch.tensor(y), torch.tensor(labels), torch.tensor(labels)
    )
    np.testing.assert_array_equal(c.ap, d.ap)


@pytest.mark.parametrize("ties", TIES)
def test_curves_of_many_queries(ties):
    q, db, ql, dl = problem(seed=7, queries=9, size=10, bits=2, classes=4)
    result = evaluate_codes(q, db, ql, dl, ties=ties, bits=2)
    rel = share_a_label(ql, dl).tolist()
    lists = [orders(d, r, ties) for d, r in zip(table(q, db), rel, strict=True)]
    findable = [x for x in lists if any(x[0])]
    assert 0 < len(findable) < len(lists)

    def mean(value, chosen):
        return np.mean([np.mean([value(order) for order in one]) for one in chosen])

    for k in (1, 2, 5, 9, 10, 13):
        for chosen, rule in ((lists, "zero"), (findable, "skip")):
            want = mean(lambda x, k=k: sum(x[:k]) / k, chosen)
            assert result.precision_at(k, zero_relevant=rule) == pytest.approx(want, abs=1e-12)
            want = mean(lambda x, k=k: sum(x[:k]) / max(sum(x), 1), chosen)
            assert result.recall_at([k], zero_relevant=rule)[0] == pytest.approx(want, abs=1e-12)
            want = mean(lambda x, k=k: any(x[:k]), chosen)
            assert result.recall_one_at(k, zero_relevant=rule) == pytest.approx(want, abs=1e-12)
    curve = result.precision_recall_by_rank()
    np.testing.assert_array_equal(curve.at, np.arange(1, 11))
    np.testing.assert_array_equal(curve.recall, result.recall_at(range(1, 11)))
    assert (np.diff(curve.recall) >= -1e-15).all()


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("empty", [0, 1, "skip"])
def test_precision_recall_by_radius(average, empty):
    q, db, ql, dl = problem(seed=8, size=6, bits=5)
    curve = evaluate_codes(q, db, ql, dl, bits=5).precision_recall_by_radius(average, empty)
    distances, rel = table(q, db), share_a_label(ql, dl)
    np.testing.assert_array_equal(curve.at, np.arange(6))
    instead = np.nan if empty == "skip" else empty
    for radius in range(6):
        near = distances <= radius
        items, hits, findable = near.sum(axis=1), (near & (rel == 1)).sum(axis=1), rel.sum(axis=1)
        if average == "micro":
            precision = hits.sum() / items.sum() if items.sum() else instead
            recall = hits.sum() / findable.sum()
        else:
            precision = np.nanmean([h / n if n else instead for h, n in zip(hits, items, strict=True)])
            recall = np.mean([h / max(r, 1) for h, r in zip(hits, findable, strict=True)])
        assert curve.precision[radius] == pytest.approx(precision, abs=1e-12, nan_ok=True)
        assert curve.recall[radius] == pytest.approx(recall, abs=1e-12)


def test_radius_zero_retrieves_nothing():
    far = np.full((3, 1), 255, dtype=np.uint8)
    result = evaluate_codes(np.zeros((2, 1), dtype=np.uint8), far, np.array([0, 1]), np.array([0, 1, 1]))
    for average in ("micro", "macro"):
        assert [result.precision_recall_by_radius(average, e).precision[0] for e in (0, 1)] == [0, 1]
        assert np.isnan(result.precision_recall_by_radius(average, "skip").precision[0])
        assert result.precision_recall_by_radius(average, 1).precision[8] == pytest.approx(0.5)


@pytest.mark.parametrize("ties", TIES)
def test_recall_one_of_the_partner(ties):
    q, db, ql, dl = problem(seed=9, queries=20, size=15, bits=3)
    partners = np.random.default_rng(9).integers(0, 15, 20)
    result = evaluate_codes(q, db, ql, dl, ties=ties, bits=3, pairs=partners)
    alone = np.arange(15)[None] == partners[:, None]
    for k in (1, 4, 15, 30):
        want = []
        for d, r in zip(table(q, db), alone.astype(int).tolist(), strict=True):
            want.append(np.mean([any(order[:k]) for order in orders(d, r, ties)]))
        assert result.recall_one_at(k, relevance="pair") == pytest.approx(np.mean(want), abs=1e-12)


def test_partners_are_row_by_row_where_the_sizes_agree():
    q, _, ql, _ = problem(seed=10, queries=16, bits=8)
    assert evaluate_codes(q, q, ql, ql, ties="optimistic").recall_one_at(1, relevance="pair") == 1
    with pytest.raises(InputError, match="pass pairs="):
        evaluate_codes(q[:5], q, ql[:5], ql).recall_one_at(1, relevance="pair")


def embedding_distances(x, y, metric):
    x, y = x.astype(np.float64), y.astype(np.float64)
    if metric == "l2":
        return ((x[:, None] - y) ** 2).sum(axis=2)
    if metric == "cosine":
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return -(x[:, None] * y).sum(axis=2)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("metric", metrics.METRICS)
def test_embeddings(metric, ties):
    """Rows repeat, so ties are real; far from the origin, so l2 cancels."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((8, 5)).astype(np.float32) + 3
    y = (rng.standard_normal((4, 5)).astype(np.float32) + 3)[np.arange(9) % 4]
    ql, dl = rng.integers(0, 3, 8), rng.integers(0, 3, 9)
    x[0] = y[0]
    result = evaluate_embeddings(x, y, ql, dl, metric=metric, k=5, convention="topk_min", ties=ties)
    distances = np.round(embedding_distances(x, y, metric), 9)
    rel = (ql[:, None] == dl).astype(int).tolist()
    want = [oracle_ap(d.tolist(), r, "topk_min", 5, ties) for d, r in zip(distances, rel, strict=True)]
    np.testing.assert_allclose(result.ap, want, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="packed codes"):
        result.precision_recall_by_radius()


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("metric", metrics.METRICS)
def test_signs_rank_like_their_codes(metric, ties):
    """For +-1 vectors the three metrics and the Hamming distance give one order, ties included."""
    rng = np.random.default_rng(12)
    x, y = rng.choice([-1.0, 1.0], (20, 12)), rng.choice([-1.0, 1.0], (300, 12))
    ql, dl = rng.integers(0, 4, 20), rng.integers(0, 4, 300)
    by_code = evaluate_codes(pack_codes(x), pack_codes(y), ql, dl, ties=ties, k=50, convention="topk_hits", bits=12)
    by_sign = evaluate_embeddings(x, y, ql, dl, metric=metric, ties=ties, k=50, convention="topk_hits")
    np.testing.assert_allclose(by_code.ap, by_sign.ap, rtol=0, atol=1e-13)
    np.testing.assert_allclose(by_code.precision_at(range(1, 301)), by_sign.precision_at(range(1, 301)), atol=1e-12)


def test_zero_vectors_and_nothing_to_find():
    labels = np.array([1, 1])
    result = evaluate_embeddings(np.zeros((2, 3)), np.zeros((2, 3)), labels, labels)
    assert result.map == 1
    nothing = evaluate_embeddings(np.ones((2, 3)), np.ones((2, 3)), labels, labels + 1, convention="map_at_r")
    assert np.isnan(nothing.map) and nothing.num_counted == 0


def test_torchmetrics_agrees():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    q, db, ql, dl = problem(seed=14, bits=64)
    distances, rel = table(q, db), share_a_label(ql, dl)
    assert all(len(set(d)) > 10 for d in distances)
    scores = 100.0 - distances - np.arange(40) / 100  # above 0, which it needs, and without ties
    for k in (5, 40):
        result = evaluate_codes(q, db, ql, dl, k=k, convention="topk_hits")
        for query in range(len(q)):
            preds, target = torch.tensor(scores[query]), torch.tensor(rel[query])
            want = float(retrieval.retrieval_average_precision(preds, target, top_k=k))
            assert result.ap[query] == pytest.approx(want, abs=1e-6)


def test_tables_name_everything():
    assert tuple(convention_table()) == CONVENTIONS and tuple(tie_table()) == TIES
    assert all(row.formula and row.used_by for row in convention_table().values())
    q, db, ql, dl = problem(seed=15)
    assert evaluate_codes(q, db, ql, dl, convention="map-at-R").convention == "map_at_r"


def rows_of_many_kinds(kind):
    rng = np.random.default_rng(31)
    x, y = rng.standard_normal((40, 9)), rng.standard_normal((300, 9))
    if kind == "repeated":
        y = y[rng.integers(0, 60, 300)]
    elif kind == "some repeated":
        y[[5, 200, 7]] = y[[100, 100, 0]]
        y[8], y[9] = 0.0, -0.0
    elif kind == "far":
        y[17] = 1e9
    elif kind == "near":
        y[::7] = y[0] + 1e-14 * rng.standard_normal((43, 9))
        x[3] = y[0]
    elif kind == "grid":
        x, y = np.rint(x), np.rint(y)
    elif kind == "zero":
        x[::2], y[::3] = 0, 0
    elif kind == "tiny":
        x, y = x * 1e-200, y * 1e-120
    elif kind == "large":
        x, y = x * 1e152, y * 1e152
    return x, y


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize(
    "kind", ["random", "repeated", "some repeated", "far", "near", "grid", "zero", "tiny", "large", "one"]
)
def test_the_quick_way_and_the_exact_one_give_the_same(monkeypatch, kind, metric, exclude):
    x, y = rows_of_many_kinds(kind)
    if kind == "one":
        x, y = x[:1], y[:2]
    ql, dl = np.arange(len(x)) % 4, np.arange(len(y)) % 4
    more = {"exclude_self": np.arange(len(x)) % len(y), "pairs": (np.arange(len(x)) + 1) % len(y)} if exclude else {}
    for ties in TIES:
        both = []
        for paying in (True, False):
            with monkeypatch.context() as patch:
                if not paying:
                    never = property(lambda self: False, lambda self, value: None)
                    patch.setattr(metrics.Scores, "paying", never, raising=False)
                both.append(evaluate_embeddings(x, y, ql, dl, metric=metric, ties=ties, **more))
        np.testing.assert_allclose(both[0].ap, both[1].ap, rtol=0, atol=1e-13)  # ranks apart differ by 1e-5
        np.testing.assert_allclose(both[0].precision_at([1, 7]), both[1].precision_at([1, 7]), rtol=0, atol=1e-14)
        if exclude:
            pair = [result.recall_one_at(3, relevance="pair") for result in both]
            assert pair[0] == pytest.approx(pair[1], abs=1e-14)


def test_most_rankings_need_no_second_look(monkeypatch):
    x, y = rows_of_many_kinds("random")
    looked = []
    monkeypatch.setattr(metrics.Scores, "exact", lambda self, rows: looked.append(rows))
    for metric in metrics.METRICS:
        evaluate_embeddings(x, y, np.arange(40), np.arange(300) % 4, metric=metric)
        evaluate_embeddings(x, y[np.arange(300) % 200], np.arange(40), np.arange(300) % 4, metric=metric)
    assert not looked


@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize("k", [None, 7])
def test_a_threshold_is_what_scikit_learn_computes(k, metric):
    sklearn = pytest.importorskip("sklearn.metrics")
    q, db, ql, dl = problem(seed=21, queries=20, size=60, bits=4)
    distances, rel = table(q, db), share_a_label(ql, dl)
    found = rel.any(axis=1)
    want = [
        sklearn.average_precision_score(r, -d.astype(float)) for d, r in zip(distances[found], rel[found], strict=True)
    ]
    result = evaluate_codes(q, db, ql, dl, ties="threshold", bits=4, convention="map-at-R" if k else "all", k=k)
    if k is None:
        np.testing.assert_allclose(result.ap[found], want, rtol=0, atol=1e-12)
        signs = [1.0 - 2 * np.unpackbits(x, axis=1, bitorder="little")[:, :4] for x in (q, db)]
        by_sign = evaluate_embeddings(*signs, ql, dl, metric=metric, ties="threshold")
        np.testing.assert_allclose(by_sign.ap[found], want, rtol=0, atol=1e-12)
    else:
        assert (result.ap[found] <= np.array(want) + 1e-12).all()


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("convention", NO_RANDOM_SKIP)
@pytest.mark.parametrize("k", [None, 6])
def test_a_query_that_is_in_the_database_leaves_itself_out(convention, k, ties):
    """The same as a database without the row, for every query alone."""
    _, db, _, dl = problem(seed=22, size=23, bits=4)
    db[3], dl[3] = db[9], dl[9]
    signs = 1.0 - 2 * np.unpackbits(db, axis=1, bitorder="little")[:, :4]
    settings = {"k": k, "convention": convention, "ties": ties}
    result = evaluate_codes(db, db, dl, dl, bits=4, exclude_self=True, **settings)
    by_sign = evaluate_embeddings(signs, signs, dl, dl, metric="l2", exclude_self=True, **settings)
    partners = (np.arange(23) + 5) % 23
    paired = evaluate_codes(db, db, dl, dl, bits=4, exclude_self=np.arange(23), pairs=partners, **settings)
    alone = []
    for i in range(23):
        rest = np.delete(np.arange(23), i)
        own_partner = np.flatnonzero(rest == partners[i])
        one = (db[i : i + 1], db[rest], dl[i : i + 1], dl[rest])
        alone.append(evaluate_codes(*one, bits=4, pairs=own_partner, **settings))
    want = [one.ap[0] for one in alone]
    for each in (result, by_sign, paired):
        np.testing.assert_allclose(each.ap, want, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(each.relevant, [one.relevant[0] for one in alone])
        for at in (1, 4, 22):
            assert each.precision_at(at) == pytest.approx(np.mean([one.precision_at(at) for one in alone]), abs=1e-12)
            assert each.recall_at(at) == pytest.approx(np.mean([one.recall_at(at) for one in alone]), abs=1e-12)
            one_at = np.mean([one.recall_one_at(at) for one in alone])
            assert each.recall_one_at(at) == pytest.approx(one_at, abs=1e-12)
        assert each.precision_recall_by_rank().at[-1] == each.num_database == 22
    pair = np.mean([one.recall_one_at(3, relevance="pair") for one in alone])
    assert paired.recall_one_at(3, relevance="pair") == pytest.approx(pair, abs=1e-12)
    radius = np.mean([one.precision_recall_by_radius("macro").precision for one in alone], axis=0)
    np.testing.assert_allclose(result.precision_recall_by_radius("macro").precision, radius, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="pass pairs="):
        result.recall_one_at(1, relevance="pair")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_some_queries_are_in_the_database(kind):
    q, db, ql, dl = (kind(x) for x in problem(seed=23, size=30, bits=4))
    rows = np.array([-1, 3, -1, 7, 7, 0, 29, -1, 1, 2, 3, 4])
    for ties in TIES:
        result = evaluate_codes(q, db, ql, dl, ties=ties, bits=4, exclude_self=kind(rows))
        for i, row in enumerate(rows):
            rest = np.delete(np.arange(30), row) if row >= 0 else np.arange(30)
            one = evaluate_codes(q[i : i + 1], db[rest], ql[i : i + 1], dl[rest], ties=ties, bits=4)
            assert result.ap[i] == pytest.approx(one.ap[0], abs=1e-12)
        assert result.num_database == 30


BAD_EXCLUSIONS = {
    "True takes query i for database row i, got 2 and 3 rows": {"q": slice(2), "exclude_self": True},
    r"\(3,\) database rows from 0 to 2 \(-1: none\), got int64 \(2,\)": {"exclude_self": np.arange(2)},
    "got int64": {"exclude_self": np.array([0, 1, 3])},
    "got float64": {"exclude_self": np.zeros(3)},
    "exclude_self must be True, False or": {"exclude_self": "yes"},
    "pairs must not be what exclude_self leaves out, got row 2 for query 2": {"exclude_self": True, "pairs": [1, 0, 2]},
}


@pytest.mark.parametrize("message", BAD_EXCLUSIONS)
def test_bad_exclusions_are_refused(message):
    more = dict(BAD_EXCLUSIONS[message])
    rows = more.pop("q", slice(3))
    with pytest.raises(InputError, match=message):
        evaluate_codes(CODES[rows], CODES, LABELS[rows], LABELS, **more)
    with pytest.raises(InputError, match=message):
        evaluate_embeddings(VECTORS[rows], VECTORS, LABELS[rows], LABELS, **more)
    with pytest.raises(InputError, match="more than the query itself"):
        evaluate_codes(CODES[:1], CODES[:1], LABELS[:1], LABELS[:1], exclude_self=True)


def test_labels_of_other_kinds():
    sparse = pytest.importorskip("scipy.sparse")
    q, db, ql, dl = problem(seed=24, bits=64)
    want = evaluate_codes(q, db, ql, dl).ap
    kinds = [sparse.csr_matrix, sparse.csc_array, sparse.coo_array, sparse.lil_matrix, np.ndarray.tolist]
    kinds += [lambda x: torch.from_numpy(x).to_sparse(), lambda x: torch.from_numpy(x).to(torch.bfloat16)]
    kinds += [lambda x: sparse.coo_array(x).astype(float), lambda x: torch.from_numpy(x).to_sparse_csr()]
    for kind in kinds:
        np.testing.assert_array_equal(evaluate_codes(q, db, kind(ql), kind(dl)).ap, want)
    np.testing.assert_array_equal(evaluate_codes(q, db, sparse.csr_matrix(ql), dl).ap, want)
    for wrong in (sparse.csr_matrix(dl * 2), sparse.csr_matrix(dl * 0.5)):
        with pytest.raises(InputError, match=r"db_labels must be multi-hot, .* got a sparse csr_matrix"):
            evaluate_codes(q, db, ql, wrong)
    twice = sparse.coo_array((np.ones(2), ([0, 0], [1, 1])), shape=dl.shape)  # 1 + 1
    with pytest.raises(InputError, match="sparse"):
        evaluate_codes(q, db, ql, twice)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_labels_in_tables(package):
    tables = pytest.importorskip(package)
    q, db, ql, dl = problem(seed=24, bits=64)
    np.testing.assert_array_equal(
        evaluate_codes(q, db, tables.DataFrame(ql), tables.DataFrame(dl)).ap, evaluate_codes(q, db, ql, dl).ap
    )
    a, b = ql.sum(axis=1).astype(int), dl.sum(axis=1).astype(int)
    series = evaluate_codes(q, db, tables.Series(a), tables.Series(b))
    np.testing.assert_array_equal(series.ap, evaluate_codes(q, db, a, b).ap)
    with pytest.raises(InputError, match=r"q_labels must be .*\(Series\)"):
        evaluate_codes(q, db, tables.Series(["a"] * 12), tables.Series(["b"] * 40))
    with pytest.raises(InputError, match=rf"got {package} DataFrame: expected x.to_numpy\(\)"):
        evaluate_embeddings(tables.DataFrame(ql.astype(float)), dl, a, b)
    with pytest.raises(InputError, match="q must be a numpy array or a torch tensor, got DataFrame"):
        evaluate_codes(tables.DataFrame(q), db, a, b)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_column_of_class_ids_is_not_taken_for_one_label(dtype, classes):
    q, db, _, _ = problem(seed=25)
    a, b = np.arange(12) % classes, np.arange(40) % classes
    for bad in ((a[:, None], b[:, None]), (a, b[:, None])):
        with pytest.raises(InputError, match=r"_labels\[:, 0\]"):
            evaluate_codes(q, db, *(x.astype(dtype) if x.ndim == 2 else x for x in bad))
    with pytest.raises(InputError, match=r"one row of 12 class ids goes in as q_labels\[0\]"):
        evaluate_codes(q, db, np.minimum(a, 1)[None], np.minimum(b, 1)[None])


def test_labels_that_are_refused():
    q, db, _, _ = problem(seed=25)
    a, b = np.arange(12), np.arange(40)
    for message, labels in {
        "must not be masked": np.ma.masked_array(a, a == 3),
        "must be labels, got list": [[1], [1, 2]],
        "below 2.63": np.full(12, 2**63, np.uint64),
        "got object": np.array([None] * 12),
        "got <U1": np.array(["a"] * 12),
    }.items():
        with pytest.raises(InputError, match=message):
            evaluate_codes(q, db, labels, b)


CODES, LABELS = np.zeros((3, 2), dtype=np.uint8), np.array([0, 1, 2])
VECTORS = np.ones((3, 4))
BAD_CODES = {
    "k must be an integer of 1 or more": {"k": 0},
    "got 2.5": {"k": 2.5},
    "same bits": {"q": np.zeros((3, 1), dtype=np.uint8)},
    "9 to 16 bits": {"bits": 17},
    "bits set beyond": {"db": np.full((3, 2), 255, dtype=np.uint8), "bits": 12},
    "q must hold at least one": {"q": CODES[:0], "q_labels": LABELS[:0]},
    "db must hold at least one": {"db": CODES[:0], "db_labels": LABELS[:0]},
    "uint8": {"q": CODES.astype(np.float32)},
    "got list": {"q": [[0, 1]]},
    "q_labels must have a row": {"q_labels": LABELS[:2]},
    "db_labels must have a row": {"db_labels": np.arange(4)},
    "of one C": {"q_labels": np.eye(3), "db_labels": np.ones((3, 4))},
    "both be": {"q_labels": np.eye(3)},
    "multi-hot": {"q_labels": np.full((3, 1), 2)},
    "integer class ids": {"q_labels": LABELS.astype(float)},
    "all, topk_hits, topk_R, topk_min, map_at_r, first_k_hits, hits_skip, sephfamily": {"convention": "mean"},
    "index, tie_aware, optimistic, pessimistic, threshold": {"ties": "random"},
    "pairs must be": {"pairs": np.array([0, 1, 3])},
    "pairs must be .*got <U1": {"pairs": ["a", "b", "c"]},
    "bits must be an integer": {"bits": "16"},
    "bits must be an integer .*got 12.0": {"bits": 12.0},
    "threads must be an integer": {"threads": "2"},
    "k must be an integer .*got '3'": {"k": "3"},
    "k must be an integer .*got True": {"k": True},
    "convention must be one of": {"convention": None},
    "must not be masked": {"q": np.ma.masked_array(CODES, CODES == 0)},
    "not packed yet": {"q": np.zeros((3, 64), np.uint8), "db": np.zeros((3, 64), np.uint8), "bits": 64},
    r"meant as x.view\(uint8\)": {"q": CODES.astype(np.int8)},
    "big-endian": {"db": np.full((3, 2), 255, dtype=np.uint8), "bits": 9},
}


@pytest.mark.parametrize("message", BAD_CODES)
def test_bad_codes_are_refused(message):
    arguments = {"q": CODES, "db": CODES, "q_labels": LABELS, "db_labels": LABELS} | BAD_CODES[message]
    with pytest.raises(InputError, match=message):
        evaluate_codes(**arguments)


BAD_VECTORS = {
    "cosine, l2, ip": {"metric": "hamming"},
    "query must be finite: 1 rows are not, the first is row 1": {"query": np.array([[1.0], [np.nan], [1.0]])},
    "database must be finite": {"database": np.full((3, 4), np.inf)},
    "one width": {"query": np.ones((3, 5))},
    "N and d of 1 or more": {"query": np.ones((0, 4)), "q_labels": LABELS[:0]},
    "real numbers": {"query": VECTORS * 1j},
    "dense array": {"query": torch.ones(3, 4).to_sparse()},
    "without a mask": {"query": np.ma.masked_array(VECTORS, VECTORS > 0)},
    "got list": {"query": VECTORS.tolist()},
    "must hold real numbers, got <U1": {"query": np.array([["a"] * 4] * 3)},
}


@pytest.mark.parametrize("message", BAD_VECTORS)
def test_bad_embeddings_are_refused(message):
    arguments = {"query": VECTORS, "database": VECTORS, "q_labels": LABELS, "db_labels": LABELS} | BAD_VECTORS[message]
    with pytest.raises(InputError, match=message):
        evaluate_embeddings(**arguments)


def test_bad_curve_arguments_are_refused():
    result = evaluate_codes(CODES, CODES, LABELS, LABELS)
    for call in (
        lambda: result.precision_at(0),
        lambda: result.recall_at([]),
        lambda: result.recall_at(1, zero_relevant="drop"),
        lambda: result.recall_one_at(1, relevance="caption"),
        lambda: result.precision_recall_by_radius("mean"),
        lambda: result.precision_recall_by_radius(empty=2),
    ):
        with pytest.raises(InputError, match="must be"):
            call()


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("ties", ["index", "tie_aware"])
def test_a_power_of_two_changes_nothing(metric, ties):
    """Not even where squares would underflow or overflow; other factors round, and change no order here either."""
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((30, 5)), rng.standard_normal((40, 5))
    y[3], y[7], y[8] = y[4], x[0], 0
    labels = rng.integers(0, 4, 30), rng.integers(0, 4, 40)
    want = evaluate_embeddings(x, y, *labels, metric=metric, ties=ties)
    for scale in (2.0**-1000, 2.0**-600, 2.0**-500, 2.0**500, 2.0**700, 2.0**1000, 1e-155, 1e-162, 1e-200, 1e200):
        got = evaluate_embeddings(x * scale, y * scale, *labels, metric=metric, ties=ties)
        assert got.map == pytest.approx(want.map, rel=0, abs=1e-12), scale
        np.testing.assert_allclose(got.ap, want.ap, rtol=0, atol=1e-12)
    if metric != "l2":
        assert evaluate_embeddings(x * 2.0**800, y * 2.0**-800, *labels, metric=metric, ties=ties).map == want.map


def test_nullable_columns_of_a_table_are_numbers():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(1)
    codes = pack_codes(rng.standard_normal((6, 16)))
    labels = rng.random((6, 4)) > 0.5
    want = evaluate_codes(codes, codes, labels, labels).map
    for table in (pd.DataFrame(labels), pd.DataFrame(labels.astype(int)), pd.DataFrame(labels.astype(float))):
        nullable = table.convert_dtypes()
        assert evaluate_codes(codes, codes, nullable, nullable).map == want
        loss = TripletMarginLoss()
        x = torch.from_numpy(rng.standard_normal((6, 3)))
        assert loss(x, nullable) == loss(x, labels)
        missing = nullable.copy()
        missing.iloc[2, 1] = pd.NA
        with pytest.raises(InputError, match=r"q_labels must be .*object \(6, 4\)"):
            evaluate_codes(codes, codes, missing, nullable)
        with pytest.raises(InputError, match="labels must be class ids"):
            loss(x, missing)
    ids = pd.DataFrame({"a": rng.integers(0, 3, 6)}).convert_dtypes()
    with pytest.raises(InputError, match="got one column"):
        evaluate_codes(codes, codes, ids, ids)
    assert (
        evaluate_codes(codes, codes, ids["a"], ids["a"]).map
        == evaluate_codes(*[codes] * 2, *[ids["a"].to_numpy()] * 2).map
    )


@pytest.mark.parametrize("kind", [np.float64, np.float32, "torch"])
def test_packed_codes_beside_embeddings_are_refused(kind):
    floats = torch.zeros(4, 8) if kind == "torch" else np.zeros((4, 8), kind)
    codes = torch.zeros(4, 8, dtype=torch.uint8) if kind == "torch" else np.zeros((4, 8), np.uint8)
    labels = np.arange(4) % 2
    with pytest.raises(InputError, match=r"database must be embeddings.*got uint8: are these packed codes"):
        evaluate_embeddings(floats, codes, labels, labels)
    with pytest.raises(InputError, match=r"query must be embeddings.*got uint8: are these packed codes"):
        evaluate_embeddings(codes, floats, labels, labels)
    assert (
        evaluate_embeddings(codes, codes, labels, labels).map == evaluate_embeddings(floats, floats, labels, labels).map
    )
