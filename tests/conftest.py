"""Settings of every test: few threads, and hypothesis runs that CI can repeat."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)  # two workers share two cores

# No deadline: the first call of a torch op is slow, and shared machines are noisy.
settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("repeatable" if os.environ.get("CI") == "true" else "local")
