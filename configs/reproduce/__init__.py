"""The paper's tables as sweeps: a file each, of which `get_config(scale)` says what is run."""
