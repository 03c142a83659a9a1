"""Models: each a tree of `Param` and a function of it."""

from functitan.models import llama as llama
