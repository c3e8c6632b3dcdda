"""Small utilities for all of the research code."""
