"""asv benchmarks, one file per op. `python bench/peers.py` prints the same comparisons as a table."""
