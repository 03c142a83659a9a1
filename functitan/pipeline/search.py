"""A search for a schedule: greedy list scheduling, then local search, for given costs and a memory cap.

Invariant: what is found is valid and keeps the cap; the same arguments find the same schedule.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from functitan.errors import ScheduleError, report
from functitan.pipeline.actions import Action, Orders, StageRank, before
from functitan.pipeline.clock import Cost, costs, makespan, peak, run
from functitan.pipeline.communication import place, with_messages
