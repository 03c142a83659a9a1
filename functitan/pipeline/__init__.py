"""Pipeline parallelism: stages are pure functions, schedules are data."""

from functitan.pipeline.actions import Action
from functitan.pipeline.gradients import value_and_grad
from functitan.pipeline.named import schedule
from functitan.pipeline.schedule import Schedule, from_actions
from functitan.pipeline.stages import Stage, declarations

__all__ = ["Action", "Schedule", "Stage", "declarations", "from_actions", "schedule", "value_and_grad"]
