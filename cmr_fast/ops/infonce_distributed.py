"""The name of info_nce_distributed.py before 0.2."""

from cmr_fast.ops.info_nce_distributed import distributed_info_nce, distributed_sigmoid_loss

__all__ = ["distributed_info_nce", "distributed_sigmoid_loss"]
