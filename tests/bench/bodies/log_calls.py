"""Log a dict of five floats many times; tell the nanoseconds of each call. In a row, and with pauses as in training."""

import json
import time
from pathlib import Path

NUM_CALLS, NUM_PACED, PAUSE_S = 2000, 300, 0.002


def timed(log, num_calls, pause_s):
    spent = []
    for step in range(num_calls):
        values = {"loss": 2.5 / (step + 1), "lr": 3e-4, "grad_norm": 1.25, "tokens_per_s": 6100.5, "epoch": step / 1000}
        if pause_s:
            time.sleep(pause_s)
        begin = time.perf_counter_ns()
        log(values, step)
        spent.append(time.perf_counter_ns() - begin)
    return spent


told = {"tight": timed(LOG, NUM_CALLS, 0), "paced": timed(LOG, NUM_PACED, PAUSE_S)}  # noqa: F821  (the cell's)
Path(BENCH_FOLDER, "calls.json").write_text(json.dumps(told))  # noqa: F821
