"""Statistics of Hamming rankings: histograms, precision sums and curves, without a sort or a queries x database array.

The order is (distance, index). Distance, label relevance and statistics come from one pass over the database per
group of queries; of a ranking only one bit a rank is ever held, and of those a few queries at a time (all queries of
the call for the curves). Results do not depend on the instruction set or on the number of threads.
"""

from typing import Generic, Literal, NamedTuple

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import register
from cmr_fast.ops._tensors import Array, as_codes, as_integer, as_tensor, like_input
from cmr_fast.ops.cuda import hamming as hamming_cuda
from cmr_fast.ops.hamming import _torch_blocks
from cmr_fast.ops.labels import share_bit

Cut = Literal["rank", "relevant", "hits"]
CUTS = ("rank", "relevant", "hits")
MAX_CODES = 2**31 - 128


class Ranking(NamedTuple, Generic[Array]):
    """What `ranking` returns; numpy or torch as the codes were. R is a query's number of relevant items.

    Without order=True only the histograms have rows; without partners and curves theirs are empty as well.

    Attributes
    ----------
    items, relevant
        int64 (Q, 8 * nbytes + 1): items and relevant items at each distance.
    sums, hits
        float64 and int64 (Q,): sum over the hits inside the cut of the precision at their rank, and how many hits
        these are.
    first
        int64 (Q,): rank of the first hit, from 1; 0 where there is none.
    tied_before
        int64 (Q,): items as near as the query's partner, with a lower index.
    hit_steps, recall_steps
        int64 and float64 (N,): queries with a hit at each rank, and the sum of their 1 / R.
    """

    items: Array
    relevant: Array
    sums: Array
    hits: Array
    first: Array
    tied_before: Array
    hit_steps: Array
    recall_steps: Array


def ranking(
    q: Array,
    db: Array,
    q_labels: Array,
    db_labels: Array,
    *,
    k: int | None = None,
    cut: Cut = "rank",
    order: bool = True,
    curves: bool = False,
    partners: Array | None = None,
    backend: str | None = None,
    threads: int | None = None,
) -> Ranking[Array]:
    """Rank a database of packed codes by (Hamming distance, index) to each query and count what is relevant.

    Parameters
    ----------
    q, db : Tensor or numpy.ndarray
        uint8 (Q, nbytes) and (N, nbytes), see `pack_codes`.
    q_labels, db_labels : Tensor or numpy.ndarray
        uint8 (Q, L) and (N, L) packed multi-hot labels (`pack_codes` of them): relevant where a bit is shared; or int32
        (Q,) and (N,) class ids: relevant where equal.
    k : int, optional
        Of the cut; None is N.
    cut : {"rank", "relevant", "hits"}
        Which hits `sums` adds up: those of the first k ranks, of the first min(k, R) ranks, or the first min(k, R) of
        them.
    order : bool
        False leaves the histograms alone: enough for every tie rule but the index.
    curves : bool
        Also count hits rank by rank; takes N / 8 bytes a query.
    partners : Tensor or numpy.ndarray, optional
        int64 (Q,) database rows whose place among equally distant items is wanted.
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    Ranking
        Of the kind that went in.

    Raises
    ------
    InputError
        On shapes, dtypes, devices and values that do not fit.
    """
    queries, database, was_numpy = as_codes(q, db)
    labels = [as_tensor(x, name)[0] for x, name in ((q_labels, "q_labels"), (db_labels, "db_labels"))]
    for x, codes, name in ((labels[0], queries, "q_labels"), (labels[1], database, "db_labels")):
        packed = x.dtype == torch.uint8 and x.ndim == 2 and x.shape[1] > 0
        if not packed and not (x.dtype == torch.int32 and x.ndim == 1):
            raise InputError(f"{name} must be uint8 (N, L) packed labels or int32 (N,), got {x.dtype} {tuple(x.shape)}")
        if len(x) != len(codes) or x.device != codes.device:
            raise InputError(
                f"{name} must have a row for each of {len(codes)} codes on {codes.device}, got {len(x)} on {x.device}"
            )
    if labels[0].dtype != labels[1].dtype or labels[0].shape[1:] != labels[1].shape[1:]:
        raise InputError(f"the labels must be of one kind and width, got {labels[0].shape} and {labels[1].shape}")
    if len(database) > MAX_CODES:
        raise InputError(f"db must hold at most {MAX_CODES} codes, got {len(database)}")
    depth = len(database) if k is None else min(as_integer(k, "k", 1, also=", or None"), len(database))
    if cut not in CUTS:
        raise InputError(f"cut must be one of {', '.join(CUTS)}, got {cut!r}")
    if (curves or partners is not None) and not order:
        raise InputError("curves and partners need order=True")
    rows = None
    if partners is not None:
        rows = as_tensor(partners, "partners")[0]
        if rows.dtype != torch.int64 or rows.shape != (len(queries),) or rows.device != queries.device:
            raise InputError(f"partners must be int64 ({len(queries)},), got {rows.dtype} {tuple(rows.shape)}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(database):
            raise InputError(f"partners must be database rows from 0 to {len(database) - 1}, got others")
    outputs = torch.ops.cmr_fast.ranking(
        queries, database, *labels, rows, depth, cut, order, curves, *_dispatch.how(backend, threads)
    )
    return Ranking(*(like_input(x, was_numpy) for x in outputs))


def _outputs(q: Tensor, db: Tensor, partners: Tensor | None, order: bool, curves: bool) -> list[Tensor]:
    queries, levels = q.shape[0], 8 * q.shape[1] + 1
    ranked, paired, steps = queries if order else 0, 0 if partners is None else queries, db.shape[0] if curves else 0
    return [
        q.new_empty((queries, levels), dtype=torch.int64),
        q.new_empty((queries, levels), dtype=torch.int64),
        q.new_empty(ranked, dtype=torch.float64),
        q.new_empty(ranked, dtype=torch.int64),
        q.new_empty(ranked, dtype=torch.int64),
        q.new_empty(paired, dtype=torch.int64),
        q.new_empty(steps, dtype=torch.int64),
        q.new_empty(steps, dtype=torch.float64),
    ]


def _ranking(
    q: Tensor,
    db: Tensor,
    q_labels: Tensor,
    db_labels: Tensor,
    partners: Tensor | None,
    k: int,
    cut: str,
    order: bool,
    curves: bool,
    backend: str | None,
    threads: int | None,
) -> list[Tensor]:
    out = _outputs(q, db, partners, order, curves)
    chosen = _dispatch.choose_backend("ranking", q.device.type, backend, _unfit(order))
    if chosen == "cuda":
        hamming_cuda.histograms(q, db, q_labels, db_labels, out[0], out[1])
        return out
    if chosen == "cpp":
        q, db, q_labels, db_labels = (x.contiguous() for x in (q, db, q_labels, db_labels))
        partners = None if partners is None else partners.contiguous()
        native, isa = _dispatch.native(), _dispatch.choose_isa()
        classes = db_labels.ndim == 1
        shape = (
            len(q), len(db), db.shape[1], 4 if classes else db_labels.shape[1], classes, order, curves, k,
            CUTS.index(cut),            _dispatch.choose_threads(threads),
        )  # fmt: skip
        workspace = torch.empty(native.ranking_workspace(*shape), dtype=torch.uint8, device="cpu")
        inputs = (q, db, q_labels, db_labels)
        native.ranking(
            isa, *shape, *(x.data_ptr() for x in inputs), 0 if partners is None else partners.data_ptr(),
            *(x.data_ptr() for x in out), workspace.data_ptr(),
        )  # fmt: skip
        return out
    for x in out:
        x.zero_()
    for start, distances in _torch_blocks(q, db):
        rows = slice(start, start + len(distances))
        relevant = share_bit(q_labels[rows], db_labels)
        _torch_block(distances, relevant, None if partners is None else partners[rows], k, cut, order, rows, out)
    return out


def _unfit(order: bool) -> dict[str, str]:
    return {"cuda": "it counts histograms only, which order=False asks for"} if order else {}


def _torch_block(
    distances: Tensor, relevant: Tensor, partners: Tensor | None, k: int, cut: str, order: bool, rows: slice,
    out: list[Tensor],
) -> None:  # fmt: skip
    """One block of queries, (B, N) int32 distances and bool relevance, into the outputs."""
    items, relevant_items, sums, hits, first, tied_before, hit_steps, recall_steps = out
    level = distances.long()
    items[rows].scatter_add_(1, level, torch.ones_like(level))
    relevant_items[rows].scatter_add_(1, level, relevant.long())
    if not order:
        return
    ranked = relevant.gather(1, torch.sort(distances, dim=1, stable=True).indices)
    hit = ranked.cumsum(dim=1)
    total = hit[:, -1:]
    rank = torch.arange(1, distances.shape[1] + 1, dtype=torch.int64, device=distances.device)
    if cut == "hits":
        kept = ranked & (hit <= total.clamp(max=k))
    else:
        kept = ranked & (rank <= (total.clamp(max=k) if cut == "relevant" else k))
    sums[rows] = torch.where(kept, hit.double() / rank, 0.0).sum(dim=1)
    hits[rows] = kept.sum(dim=1)
    first[rows] = torch.where(ranked.any(dim=1), ranked.int().argmax(dim=1) + 1, 0)
    if partners is not None:
        own = distances.gather(1, partners[:, None])
        tied_before[rows] = ((distances == own) & (rank <= partners[:, None])).sum(dim=1)
    if len(hit_steps):
        hit_steps += ranked.sum(dim=0)
        recall_steps += (ranked / total.clamp(min=1).double()).sum(dim=0)


register(
    "ranking(Tensor q, Tensor db, Tensor q_labels, Tensor db_labels, Tensor? partners, int k, str cut, bool order, "
    "bool curves, str? backend, int? threads) -> Tensor[]",
    _ranking,
    lambda q, db, q_labels, db_labels, partners, k, cut, order, curves, backend, threads: _outputs(
        q, db, partners, order, curves
    ),
)
