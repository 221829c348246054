"""The kernels' Python face: one file per op. Needs torch and numpy, nothing else."""

from cmr_fast.ops._dispatch import explain
from cmr_fast.ops.hamming import hamming_distances, hamming_range, hamming_topk, pack_codes, unpack_codes
from cmr_fast.ops.multi_index import SearchTables
from cmr_fast.ops.pairwise import CodeBuffer, dcmh_loss, pairwise_nll, pairwise_squared
from cmr_fast.ops.ranking import Ranking, ranking
from cmr_fast.ops.sinkhorn import Transport, ipot, sinkhorn

__all__ = [
    "CodeBuffer",
    "Ranking",
    "SearchTables",
    "Transport",
    "dcmh_loss",
    "explain",
    "hamming_distances",
    "hamming_range",
    "hamming_topk",
    "ipot",
    "pack_codes",
    "pairwise_nll",
    "pairwise_squared",
    "ranking",
    "sinkhorn",
    "unpack_codes",
]
