"""Benchmarks: each script alternates contenders in one run, and writes ratios with their spread."""
