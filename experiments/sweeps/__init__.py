"""Sweeps over algorithms, block sizes, sparsities and seeds: their cells, running them, and pages of results."""
