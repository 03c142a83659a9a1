"""Learned positions: a table with one row for each position of the context.

Invariant: a token meets the row of its global position, however `seq`, `positions` and `embed` are sharded.
"""

from __future__ import annotations

from torch import Tensor

from functitan import tree
from functitan.errors import PatternError, report
from functitan.ops.lookup import iota, sizes, take
from functitan.ops.reduce import broadcast
from functitan.param import Initializer, Param, normal


def params(context: int, embed: int, *, init: Initializer | None = None) -> tree.Tree:
    """The table, "positions embed"."""
    return {"embedding": Param("positions embed", (context, embed), init or normal(0.02))}


def apply(params: tree.Tree, x: Tensor, *, positions: Tensor | None = None) -> Tensor:
    """`x`, "batch seq embed", plus the row of each position.

    `positions` (int64, "batch seq", below the context) replaces the places in the sequence. Without them the rows are
    looked up once for all examples, so that no more than "seq embed" is moved. Raises `PatternError` for a sequence
    longer than the context.
    """
    table = params["embedding"]
    if positions is not None:
        return x + take("batch seq, positions embed -> batch seq embed", positions, table)
    length, context = sizes("batch seq embed", x)["seq"], sizes("positions embed", table)["positions"]
    if length > context:
        problem = f"a sequence of {length} tokens, a table of {context} positions"
        raise PatternError(report("position_embedding.apply", [problem], "cut the sequence, or give a longer context"))
    rows = take("seq, positions embed -> seq embed", iota("seq", "seq", seq=length).to(x.device), table)
    return x + broadcast("seq embed -> batch seq embed", rows)
