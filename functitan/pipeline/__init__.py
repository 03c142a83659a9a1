"""Pipeline parallelism: stages are pure functions, schedules are data."""

from functitan.pipeline.actions import Action
from functitan.pipeline.schedule import Schedule, schedule

__all__ = ["Action", "Schedule", "schedule"]
