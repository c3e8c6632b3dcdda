"""Batches per second from memory: 60,000 images of 28 x 28 bytes, batches of 128.

python -m benchmarks.batches
"""

import grain
import numpy as np
from absl import app

from benchmarks import timing
from experiments import data
from experiments.outputs import progress

EXAMPLES, BATCH = 60_000, 128


def main(argv: list[str]) -> None:
    del argv
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (EXAMPLES, 28, 28, 1), np.uint8)
    label = rng.integers(0, 10, EXAMPLES).astype(np.int32)
    stored = data.Arrays({"image": image, "label": label})
    floats = data.Arrays({"image": (image / 255).astype(np.float32), "label": label})
    records = [{"image": image[i], "label": label[i]} for i in range(EXAMPLES)]
    by_record = grain.MapDataset.source(records).shuffle(0).repeat().batch(BATCH)
    at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # threads would disturb the other contenders
    as_stored, as_stored_too, as_floats = (data.train_iterator(s, BATCH, 0) for s in (stored, stored, floats))
    one_by_one = iter(by_record.to_iter_dataset(at_once))
    calls = {
        "bytes as stored": lambda: next(as_stored),
        "bytes, made floats on the host": lambda: next(as_stored_too)["image"].astype(np.float32) / 255,
        "floats in memory": lambda: next(as_floats),
        "grain, record by record": lambda: next(one_by_one),
    }
    seconds = timing.alternate(calls, rounds=11)
    rows = [{"batches": name, "per_second": round(1 / float(np.median(s)))} for name, s in seconds.items()]
    progress.console().print(progress.table(f"Batches of {BATCH} from memory", rows))
    print(timing.save("batches", {"rows": rows, "examples": EXAMPLES, "batch_size": BATCH}))


if __name__ == "__main__":
    app.run(main)
