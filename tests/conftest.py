"""Settings of every test: few threads, and hypothesis runs that CI can repeat."""

import os

import torch
from hypothesis import settings

WORKER = bool(os.environ.get("PYTEST_XDIST_WORKER"))  # one of two, who share two cores
torch.set_num_threads(1 if WORKER else 2)
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

# No deadline: the first call of a torch op is slow, and shared machines are noisy.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("repeatable" if os.environ.get("CI") == "true" else "local")
