"""The research code: trains, prunes, compares and reports."""

import time

STARTED = time.perf_counter()  # before the heavy imports: the start of the start-up time
