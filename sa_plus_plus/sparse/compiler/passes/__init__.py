"""Rewrites of a traced network, each from a list of steps to another that computes the same."""
