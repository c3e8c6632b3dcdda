"""all-MiniLM-L6-v2: quality and milliseconds of pruned networks, beside those of smaller dense ones."""
