"""The name of info_nce.py before 0.2."""

from cmr_fast.ops.info_nce import info_nce, js_critic, sigmoid_loss

__all__ = ["info_nce", "js_critic", "sigmoid_loss"]
