"""Log a number of values as fast as possible and be killed the moment the last call has returned."""

import os
import signal

for step in range(NUM_VALUES):  # noqa: F821  (the cell's)
    LOG({"loss": 2.5 / (step + 1), "lr": 3e-4, "grad_norm": 1.25, "tokens_per_s": 6100.5, "epoch": 0.1}, step)  # noqa: F821
os.kill(os.getpid(), signal.SIGKILL)
