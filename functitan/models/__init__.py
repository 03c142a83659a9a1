"""Models, each a tree of `Param` and a function of it; and `generate`, the tokens that one goes on with."""

from functitan.models import generate as generate
from functitan.models import gpt2 as gpt2
from functitan.models import llama as llama
