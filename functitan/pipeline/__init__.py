"""Pipeline parallelism: stages are pure functions, schedules are data."""

from functitan.pipeline.actions import Action
from functitan.pipeline.gradients import value_and_grad
from functitan.pipeline.named import schedule
from functitan.pipeline.partition import LayerCosts, estimate_costs, partition
from functitan.pipeline.schedule import Schedule, from_actions
from functitan.pipeline.search import search
from functitan.pipeline.stages import Stage, declarations
from functitan.pipeline.table import read_csv, write_csv

__all__ = [
    "Action",
    "LayerCosts",
    "Schedule",
    "Stage",
    "declarations",
    "estimate_costs",
    "from_actions",
    "partition",
    "read_csv",
    "schedule",
    "search",
    "value_and_grad",
    "write_csv",
]
