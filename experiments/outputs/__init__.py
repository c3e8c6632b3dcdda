"""The output of a run: files and live progress."""
