"""The Triton side of the ops, one file an op."""
