"""`ft.linear_cross_entropy`: the loss of `x @ w`, whose logits are never whole, in forward or in backward.

Invariant: the logits lie where the table puts their pattern, which decides where the work is done. `x` and `w` go there
once in forward and once in backward; their gradients are summed over all chunks before they come back, each once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from torch import Tensor

from functitan.axes import Axes, check_pattern, parse_axes, parse_signature, write_axes
from functitan.errors import PatternError, report
from functitan.ops.autocast import autocast_is_on, in_precision
from functitan.ops.contraction import lift, move
from functitan.ops.function import Call, apply, hidden_axes
from functitan.ops.labels import IGNORE, check_labels
from functitan.ops.linear_loss_op import LINEAR_LOSS, Options, static_of
from functitan.ops.operands import Operand, check_operands
from functitan.ops.remembered import made
from functitan.ops.types import Type, resolve
from functitan.sharding.context import current
from functitan.sharding.contraction import Contraction, Term
from functitan.sharding.mesh import is_size
from functitan.sharding.message import Label
from functitan.sharding.precision import in_compute


def linear_cross_entropy(
    pattern: str,
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
) -> Tensor:
    """-log softmax(x w)[label], a chunk of rows at a time: `"batch seq embed, vocab embed, batch seq -> batch seq"`.

    `x` has the labels' axes and one more, which the weight contracts; the weight's other axis is the vocabulary.
    Without `->` the result has the labels' pattern; a shorter result is summed. Labels are global, int64; those equal
    to `ignore_index` give 0 and no gradient. It is `cross_entropy` of the `einsum`, but a rank has logits of only
    `chunk` of its rows at a time (by default as many as make them the size of its `x`, and at least 256), and makes
    them again in backward. Logits are products in the dtype of `x`; losses, and sums over the weight's gradient, are
    float32 or better.

    `z_loss` adds z_loss * logsumexp(logits)^2 to each row that counts (Chowdhery et al., PaLM, 2022). `vocab_size`
    leaves out the padding: the columns of the vocabulary from there on, as if their logits were -inf.

    Transpose: the gradients of `x` and `w`, each reduced once over the ranks that shared it; one that is not wanted
    costs nothing. There is one reverse derivative: forward mode and second derivatives raise `FunctitanError`, as do
    labels outside the vocabulary on the CPU; elsewhere their loss is NaN. Raises `PatternError`.

    >>> import torch
    >>> x, w = torch.zeros(2, 3), torch.ones(4, 3)
    >>> linear_cross_entropy("batch embed, vocab embed, batch", x, w, torch.tensor([1, -100]), vocab_size=2)
    tensor([0.6931, 0.0000])
    """
    if autocast_is_on():
        options = dict(chunk=chunk, z_loss=z_loss, ignore_index=ignore_index, vocab_size=vocab_size)
        return in_precision(linear_cross_entropy, x, pattern, x, w, labels, **options)
    axes = _parse(pattern)
    label = Label("linear_cross_entropy", pattern)
    what = f"{label.op}({pattern!r})"
    check_operands(
        what,
        Operand("x", x, axes.x, "float"), Operand("w", w, axes.w, "float"),
        Operand("labels", labels, axes.rows, "int64"),
    )  # fmt: skip
    if chunk is not None and not is_size(chunk):
        raise PatternError(report(what, [f"chunk is {chunk!r}"], "give the number of rows of a chunk, at least 1"))
    env = current().on_one_rank((*axes.x, axes.vocab))
    (x,), given, rows = in_compute((x,), env.precision), labels, Type(axes.rows)  # the weight follows x, on its shard
    every = tuple(sorted({hidden for tensor in (x, w, labels) for hidden in hidden_axes(tensor, env)}))
    labels = lift(rows, labels, every, env, label)
    types = Type(axes.x), Type(axes.w), rows
    typed = Contraction(types, (Type((*axes.rows, axes.vocab)),), (Term(0, (0, 1, 2)),), ())
    full, (hidden, (of_rows,)) = resolve(typed, (x, w, labels), env, label)
    vocab = dict(full.sizes)[axes.vocab]
    if vocab_size is not None and not 1 <= vocab_size <= vocab:
        problem = f"vocab_size is {vocab_size}, the weight's axis {axes.vocab!r} has {vocab}"
        raise PatternError(report(what, [problem], "give the number of its columns that are no padding, or none"))
    options = Options(chunk, z_loss, ignore_index, vocab if vocab_size is None else vocab_size)
    check_labels(given, options.vocab_size, ignore_index, env, label)
    static = static_of(typed, full, axes.embed, axes.vocab, options, label)
    call = Call(LINEAR_LOSS, env, static, hidden, (of_rows, of_rows))
    loss, _ = apply(call, x, w, move(rows, static.rows, labels, env, label))
    return made(label.op, axes.result, move(static.rows, Type(axes.result), loss, env, label), env)


class _Axes(NamedTuple):
    x: Axes
    w: Axes
    rows: Axes
    result: Axes
    embed: str
    vocab: str


@cache
def _parse(pattern: str) -> _Axes:
    check_pattern(pattern, "ft.linear_cross_entropy")
    if "->" in pattern:
        operands, results = parse_signature(pattern)
    else:
        operands = tuple(parse_axes(part.strip()) for part in pattern.split(","))
        results = operands[-1:]
    if len(operands) != 3 or len(results) != 1:
        problems = [f"{len(operands)} operands and {len(results)} results: x, weight and labels give one loss"]
    else:
        (x, w, rows), (result,) = operands, results
        embed, vocab = [axis for axis in x if axis not in rows], [axis for axis in w if axis not in x]
        problems = [f"x {write_axes(x)!r} must have all axes of labels {write_axes(rows)!r} and one more"] * (
            len(embed) != 1 or len(x) != len(rows) + 1
        )
        problems += [
            f"weight {write_axes(w)!r} must have two axes, that of x which the labels lack and the vocabulary"
        ] * (len(embed) != 1 or len(w) != 2 or len(vocab) != 1 or embed[0] not in w)
        problems += [f"axis {axis!r} is the vocabulary, which the labels lack" for axis in vocab if axis in rows]
        problems += [f"result axis {axis!r} is not in the labels" for axis in result if axis not in rows]
    if problems:
        fix = "write as in 'batch seq embed, vocab embed, batch seq -> batch seq'"
        raise PatternError(report(f"linear_cross_entropy({pattern!r})", problems, fix))
    return _Axes(x, w, rows, result, embed[0], vocab[0])
