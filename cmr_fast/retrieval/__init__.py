"""Search and evaluation: HammingIndex, and retrieval metrics by named convention and tie rule."""

from cmr_fast.retrieval._codefiles import read_codes
from cmr_fast.retrieval._formats import index_kind
from cmr_fast.retrieval.captions import CaptionRetrieval, evaluate_captions
from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, convention_table, tie_table
from cmr_fast.retrieval.duplicates import Duplicates, near_duplicates
from cmr_fast.retrieval.index import HammingIndex
from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings
from cmr_fast.retrieval.result import RetrievalResult

__all__ = [
    "CONVENTIONS",
    "TIES",
    "CaptionRetrieval",
    "Duplicates",
    "HammingIndex",
    "RetrievalResult",
    "convention_table",
    "evaluate_captions",
    "evaluate_codes",
    "evaluate_embeddings",
    "index_kind",
    "near_duplicates",
    "read_codes",
    "tie_table",
]
