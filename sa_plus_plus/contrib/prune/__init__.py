"""`python -m sa_plus_plus prune`: a published transformer in, the same files with pruned weights out."""
