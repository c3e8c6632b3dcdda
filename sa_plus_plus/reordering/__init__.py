"""Blocks need not be neighbours: axes that may be permuted together, and an order in which few blocks hold most."""
