"""Sweeps over algorithms, block sizes, sparsities and seeds: their cells, the work on them, and pages of results."""
