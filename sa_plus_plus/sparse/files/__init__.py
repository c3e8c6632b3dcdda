"""Files of pruned parameters and of specialised networks."""
