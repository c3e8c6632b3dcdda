"""The research code: trains, prunes, compares and reports."""
