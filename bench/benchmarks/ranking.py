"""mAP of packed codes, one thread, 2,000 queries x 184,577 items, against the loop of hashing repositories."""

import numpy as np

import cmr_fast as cf

from .common import QUICK, Comparison, cost
from .hamming import limit

QUERIES, ITEMS, BITS, CLASSES = 2000, 20_000 if QUICK else 184_577, 64, 24
LOOP_QUERIES = 40  # the loop runs on these, its time is scaled


def problem(queries: int, items: int, bits: int = BITS) -> tuple[np.ndarray, ...]:
    """Codes that lie nearer to those of similar labels, and multi-hot labels of 3.6 classes an item."""
    rng = np.random.default_rng(bits)
    directions = rng.standard_normal((CLASSES, bits)).astype(np.float32)
    out = []
    for count in (queries, items):
        labels = rng.random((count, CLASSES), dtype=np.float32) < 0.15
        noise = 2 * rng.standard_normal((count, bits), dtype=np.float32)
        out += [cf.pack_codes(labels @ directions + noise), labels]
    q, ql, db, dl = out
    return q, db, ql, dl


def signs(codes: np.ndarray, bits: int) -> np.ndarray:
    return cf.unpack_codes(codes, bits).astype(np.float32) * 2 - 1


def numpy_map(q: np.ndarray, db: np.ndarray, ql: np.ndarray, dl: np.ndarray, kind: str | None) -> float:
    """The loop, on +-1 codes and labels in float32: label product, code product, argsort, AP, query by query."""
    total = 0.0
    for code, label in zip(q, ql, strict=True):
        relevant = (label @ dl.T > 0).astype(np.float32)
        found = int(relevant.sum())
        if found == 0:
            continue
        distances = 0.5 * (db.shape[1] - code @ db.T)
        relevant = relevant[np.argsort(distances, kind=kind)]
        ranks = np.flatnonzero(relevant == 1) + 1.0
        total += float(np.mean(np.linspace(1, found, found) / ranks))
    return total / len(q)


def bound(bits: int) -> float:
    """G pairs a second of xor, popcount and add alone on the words of the code and then on one word of labels."""
    return 1 / (1 / limit(bits) + 1 / limit(32))


def loop(kind: str | None, queries: int = QUERIES, items: int = ITEMS, ties: str = "index") -> Comparison:
    q, db, ql, dl = problem(queries, items)
    some = min(LOOP_QUERIES, queries)
    slow = signs(q[:some], BITS), signs(db, BITS), ql[:some].astype(np.float32), dl.astype(np.float32)

    def check() -> None:
        ours = cf.evaluate_codes(q[:some], db, ql[:some], dl, threads=1).map
        theirs = numpy_map(*slow, "stable")
        assert abs(ours - theirs) <= 1e-12, f"mAP {ours!r}, the loop has {theirs!r}"

    return Comparison(
        name=f"mAP(all) {BITS} bits, {CLASSES} labels, {queries:,} x {items:,}, ties={ties}",
        alternative=f"numpy loop, argsort {kind or 'default'}, {some} queries scaled",
        ours=lambda: cf.evaluate_codes(q, db, ql, dl, ties=ties, threads=1),
        theirs=lambda: numpy_map(*slow, kind),
        check=check,
        work=queries * items / 1e9,
        unit="G pairs",
        limit=lambda: bound(BITS),
        share=some / queries,
    )


def torchmetrics(queries: int = 50, items: int = 5000) -> Comparison:
    import torch
    from torchmetrics.retrieval import RetrievalMAP

    q, db, ql, dl = problem(queries, items)
    distances = torch.from_numpy(cf.hamming_distances(q, db))
    # above 0, which it needs, and the lower index first
    scores = (BITS + 1 - distances - torch.arange(items) / (2 * items)).flatten()
    target = torch.from_numpy(ql.astype(np.float32) @ dl.T.astype(np.float32) > 0).flatten()
    which = torch.arange(queries).repeat_interleave(items)

    def theirs() -> float:
        metric = RetrievalMAP()
        metric.update(scores, target, indexes=which)
        return float(metric.compute())

    def check() -> None:
        ours = cf.evaluate_codes(q, db, ql, dl, threads=1).map
        assert abs(ours - theirs()) <= 1e-6, f"mAP {ours}, torchmetrics has {theirs()}"

    return Comparison(
        name=f"mAP(all) {BITS} bits, {CLASSES} labels, {queries:,} x {items:,}",
        alternative="torchmetrics RetrievalMAP, distances and relevance given",
        ours=lambda: cf.evaluate_codes(q, db, ql, dl, threads=1),
        theirs=theirs,
        check=check,
        work=queries * items / 1e9,
        unit="G pairs",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [loop("stable", queries=100, items=20_000)]
    return [loop("stable"), loop(None), loop("stable", ties="tie_aware"), torchmetrics()]


class MeanAveragePrecision:
    """Lower is better: seconds, and our time as a share of the loop's."""

    version = "1"
    params = (("index", "tie_aware"),)
    param_names = ("ties",)
    timeout = 600

    def setup(self, ties: str) -> None:
        self.problem = problem(200, ITEMS)

    def time_map(self, ties: str) -> None:
        cf.evaluate_codes(*self.problem, ties=ties, threads=1)

    def track_time_over_numpy(self, ties: str) -> float:
        return cost(lambda: loop("stable", queries=200, ties=ties))

    track_time_over_numpy.unit = "ours / numpy loop"
