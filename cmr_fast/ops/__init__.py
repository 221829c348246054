"""The kernels' Python face: one file per op. Needs torch and numpy, nothing else."""

from cmr_fast.ops._dispatch import explain
from cmr_fast.ops.hamming import hamming_distances, hamming_range, hamming_topk, pack_codes, unpack_codes
from cmr_fast.ops.multi_index import SearchTables
from cmr_fast.ops.pgd import pgd_noise, pgd_step_
from cmr_fast.ops.ranking import Ranking, ranking

__all__ = [
    "Ranking",
    "SearchTables",
    "explain",
    "hamming_distances",
    "hamming_range",
    "hamming_topk",
    "pack_codes",
    "pgd_noise",
    "pgd_step_",
    "ranking",
    "unpack_codes",
]
