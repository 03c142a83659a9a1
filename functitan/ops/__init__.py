"""Named differentiable ops: each knows its layouts from its pattern, and plans its own communication."""
