"""The kernels' Python face: one file per op. Needs torch and numpy, nothing else."""

import importlib

from cmr_fast.ops._dispatch import explain
from cmr_fast.ops.hamming import hamming_distances, hamming_range, hamming_topk, pack_codes, unpack_codes
from cmr_fast.ops.hamming_pairs import PairBlock, hamming_pair_blocks, hamming_pairs
from cmr_fast.ops.info_nce import info_nce, js_critic, sigmoid_loss
from cmr_fast.ops.multi_index import SearchTables
from cmr_fast.ops.pairwise import pairwise_nll, pairwise_squared
from cmr_fast.ops.pgd import pgd_noise, pgd_step_
from cmr_fast.ops.ranking import Ranking, ranking
from cmr_fast.ops.sinkhorn import Transport, ipot, sinkhorn
from cmr_fast.ops.triplet import acmr_triplet, triplet_margin

__all__ = [
    "PairBlock",
    "Ranking",
    "SearchTables",
    "Transport",
    "acmr_triplet",
    "explain",
    "hamming_distances",
    "hamming_pair_blocks",
    "hamming_pairs",
    "hamming_range",
    "hamming_topk",
    "info_nce",
    "ipot",
    "js_critic",
    "pack_codes",
    "pairwise_nll",
    "pairwise_squared",
    "pgd_noise",
    "pgd_step_",
    "ranking",
    "sigmoid_loss",
    "sinkhorn",
    "triplet_margin",
    "unpack_codes",
]


def __getattr__(name: str) -> object:
    if name in ("CodeBuffer", "dcmh_loss"):  # they moved up, to cmr_fast.losses
        return getattr(importlib.import_module("cmr_fast.losses.dcmh"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
