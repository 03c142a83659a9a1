"""State that survives: checkpoints that any mesh can read, complete or invisible, and other programs' weights."""

from functitan.checkpoint.restore import restore
from functitan.checkpoint.save import save

__all__ = ["restore", "save"]
