"""State that survives: checkpoints that any mesh can read, complete or invisible, and other programs' weights."""

from functitan.checkpoint.huggingface import from_huggingface, to_huggingface
from functitan.checkpoint.leaves import per_rank
from functitan.checkpoint.manager import Manager
from functitan.checkpoint.restore import restore
from functitan.checkpoint.save import save
from functitan.checkpoint.termination import termination

__all__ = ["Manager", "from_huggingface", "per_rank", "restore", "save", "termination", "to_huggingface"]
