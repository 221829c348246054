"""cmr_fast: fast, exact tools to train, search and measure cross-modal (image and text) retrieval models.

Names are imported when they are first used, so `import cmr_fast` costs nothing and each layer works without the
ones above it.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "InputError": "cmr_fast.errors",
    "pack_codes": "cmr_fast.ops",
    "unpack_codes": "cmr_fast.ops",
    "hamming_topk": "cmr_fast.ops",
    "hamming_range": "cmr_fast.ops",
    "hamming_distances": "cmr_fast.ops",
    "hamming_pairs": "cmr_fast.ops",
    "hamming_pair_blocks": "cmr_fast.ops",
    "explain": "cmr_fast.ops",
    "triplet_margin": "cmr_fast.ops",
    "pairwise_nll": "cmr_fast.ops",
    "pairwise_squared": "cmr_fast.ops",
    "info_nce": "cmr_fast.ops",
    "sinkhorn": "cmr_fast.ops",
    "ipot": "cmr_fast.ops",
    "acmr_triplet": "cmr_fast.losses",
    "near_duplicates": "cmr_fast.retrieval.duplicates",
    "HammingIndex": "cmr_fast.retrieval.index",
    "evaluate_codes": "cmr_fast.retrieval.metrics",
    "evaluate_embeddings": "cmr_fast.retrieval.metrics",
}
_MODULES = {
    **{
        name: f"cmr_fast.{name}"
        for name in ("ops", "losses", "retrieval", "data", "models", "attacks", "methods", "reports", "distributed")
    },
    "report": "cmr_fast.reports.retrieval",
    "robustness": "cmr_fast.reports.robustness",
}

__all__ = [*_WHERE, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'cmr_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
