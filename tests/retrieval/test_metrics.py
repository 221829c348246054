"""Every convention against its own formula, every tie rule against the orders that it stands for."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.errors import InputError
from cmr_fast.ops import pack_codes
from cmr_fast.retrieval import _ties, metrics
from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, convention_table, tie_table
from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

NO_RANDOM_SKIP = [c for c in CONVENTIONS if c != "hits_skip"]


# one oracle per convention: relevance in rank order (list of 0 and 1), k -> AP, or None where the query is left out


def precisions(rel):
    return [Fraction(sum(rel[: i + 1]), i + 1) for i in range(len(rel))]


def total(rel, k):
    return sum((p for p, hit in zip(precisions(rel)[:k], rel, strict=False) if hit), Fraction(0))


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
    at_hits = [p for p, hit in zip(precisions(rel), rel, strict=True) if hit][:k]
    return sum(at_hits) / len(at_hits) if at_hits else Fraction(0)


def oracle_hits_skip(rel, k):
    return total(rel, k) / sum(rel[:k]) if sum(rel[:k]) else None


oracle_sephfamily = oracle_topk_R
ORACLES = {name: globals()[f"oracle_{name}"] for name in CONVENTIONS}


def orders(distances, rel, ties):
    """The relevance lists that a tie rule averages over: one, or every placement of relevant items in tied blocks."""
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
@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic"])
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
    result = evaluate_codes(q, db, ql, dl)
    np.testing.assert_array_equal(result.relevant, ((ql @ dl.T) > 0).sum(axis=1))


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
    "index, tie_aware, optimistic, pessimistic": {"ties": "random"},
    "pairs must be": {"pairs": np.array([0, 1, 3])},
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
