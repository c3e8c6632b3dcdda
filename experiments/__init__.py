"""The research code: trains, prunes, compares and reports."""

import time

STARTED = time.perf_counter()  # before the heavy imports: what start-up is counted from
