"""Pipeline parallelism: stages are pure functions, schedules are data."""

from functitan.pipeline.actions import Action
from functitan.pipeline.named import schedule
from functitan.pipeline.schedule import Schedule, from_actions

__all__ = ["Action", "Schedule", "from_actions", "schedule"]
