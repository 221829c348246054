"""asv benchmarks, one file per op. `python bench/compare.py` prints the same comparisons as a table."""
