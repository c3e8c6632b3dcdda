"""Measurements: each script compares contenders in one run, alternating, and writes ratios with their spread."""
