"""Losses of cross-modal methods: pure functions of tensors, and modules with the signatures that others have.

`ClipLoss` and `SigLipLoss` take the place of open_clip's, `TripletMarginLoss` that of pytorch-metric-learning's.
"""

from cmr_fast.losses.contrastive import ClipLoss, SigLipLoss
from cmr_fast.losses.dcmh import CodeBuffer, dcmh_loss
from cmr_fast.losses.margin import TripletMarginLoss, vse_plus_plus
from cmr_fast.losses.regularize import frobenius, gradient_reversal
from cmr_fast.ops.info_nce import info_nce, sigmoid_loss
from cmr_fast.ops.triplet import acmr_triplet, triplet_margin

__all__ = [
    "ClipLoss",
    "CodeBuffer",
    "SigLipLoss",
    "TripletMarginLoss",
    "acmr_triplet",
    "dcmh_loss",
    "frobenius",
    "gradient_reversal",
    "info_nce",
    "sigmoid_loss",
    "triplet_margin",
    "vse_plus_plus",
]
