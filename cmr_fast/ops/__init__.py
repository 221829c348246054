"""The kernels' Python face: one file per op. Needs torch and numpy, nothing else."""

from cmr_fast.ops._dispatch import explain
from cmr_fast.ops.hamming import hamming_distances, hamming_range, hamming_topk, pack_codes, unpack_codes
from cmr_fast.ops.infonce import info_nce, js_critic, sigmoid_loss
from cmr_fast.ops.multi_index import SearchTables
from cmr_fast.ops.ranking import Ranking, ranking

__all__ = [
    "Ranking",
    "SearchTables",
    "explain",
    "hamming_distances",
    "hamming_range",
    "hamming_topk",
    "info_nce",
    "js_critic",
    "pack_codes",
    "ranking",
    "sigmoid_loss",
    "unpack_codes",
]
