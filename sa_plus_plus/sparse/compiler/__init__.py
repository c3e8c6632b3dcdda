"""From a function to a network of planned steps: trace, rewrite in passes, infer blocks, lower, run."""
