"""Models: each a tree of `Param` and a function of it."""

from functitan.models import gpt2 as gpt2
from functitan.models import llama as llama
