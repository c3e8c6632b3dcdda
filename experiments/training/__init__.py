"""A run: its parts from a config, its compiled step, the loop around it, its checkpoints."""
