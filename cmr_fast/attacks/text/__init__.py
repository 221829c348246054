"""Attacks on captions: words swapped for those of a masked language model, characters for others, in flat batches."""
