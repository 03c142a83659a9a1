"""Mistakes in lookups, attention, losses, norms: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from functitan.sharding import collectives
from user_errors.given import FLOATS, IDS, K3, KEY, LATER, LONG, ODD, PLACES, TABLE, THREE, K, Q, V, X, inside

ATTEND = "batch seq heads head_dim, batch seq kv_heads head_dim"
MISTAKES = {
    "a lookup by floats": (
        lambda: ft.take("batch, vocab embed -> batch embed", FLOATS, TABLE),
        ft.PatternError,
        """\
        take('batch, vocab embed -> batch embed'):
          - indices: dtype float32, where integers are wanted
          Fix: cast by x.long()""",
    ),
    "a lookup with its operands swapped": (
        lambda: ft.take("batch, vocab embed -> batch embed", TABLE, IDS),
        ft.PatternError,
        """\
        take('batch, vocab embed -> batch embed'):
          - indices: pattern 'batch' names 1 axes, the tensor has 2: (6, 4)
          - indices: dtype float32, where integers are wanted
          - table: pattern 'vocab embed' names 2 axes, the tensor has 1: (2,)
          Fix: name each dimension of the tensor once, in order; cast by x.long()""",
    ),
    "a lookup that loses two axes": (
        lambda: ft.take("batch, vocab embed -> batch", IDS, TABLE),
        ft.PatternError,
        """\
        take('batch, vocab embed -> batch'):
          - one axis of the table is looked up and goes, not 2: ['vocab', 'embed']
          Fix: write as in 'batch seq, vocab embed -> batch seq embed'""",
    ),
    "a lookup by row of another batch": (
        lambda: ft.take("batch, batch vocab -> batch", IDS, TABLE),
        ft.PatternError,
        """\
        take('batch, batch vocab -> batch'):
          - axis 'batch' is 6 in table, but 2 in indices
          Fix: give each axis one size, in every operand""",
    ),
    "an index that is too large": (
        lambda: ft.select("batch embed -> batch", X, 4),
        ft.PatternError,
        """\
        select('batch embed -> batch'):
          - index 4 is out of range for axis 'embed' of size 4
          Fix: give one from -4 to 3""",
    ),
    "an index that is too negative": (
        lambda: inside(lambda: ft.select("batch embed -> embed", ODD, -7)),
        ft.PatternError,
        """\
        select('batch embed -> embed'):
          - index -7 is out of range for axis 'batch' of size 6
          Fix: give one from -6 to 5""",
    ),
    "an index that is a slice": (
        lambda: ft.select("batch embed -> batch", X, slice(0, 1)),
        ft.PatternError,
        """\
        select('batch embed -> batch'):
          - the pattern has 1 operands, and the index is a slice
          Fix: write 'batch seq -> batch' for an int, 'batch seq, batch -> batch' for a tensor of indices""",
    ),
    "an index for each of another batch": (
        lambda: ft.select("batch embed, batch -> batch", X, THREE),
        ft.PatternError,
        """\
        select('batch embed, batch -> batch'):
          - axis 'batch' is 3 in index, but 2 in x
          Fix: give each axis one size, in every operand""",
    ),
    "a selection that takes nothing away": (
        lambda: ft.select("batch embed -> batch embed", X, 0),
        ft.PatternError,
        """\
        select('batch embed -> batch embed'):
          - one axis of the table is looked up and goes, not 0: []
          Fix: write as in 'batch seq embed -> batch embed': the axis that goes is the one that is looked up""",
    ),
    "indices without sizes": (
        lambda: ft.iota("batch seq", "sqe", batch=0, embed=4),
        ft.PatternError,
        """\
        iota('batch seq', 'sqe'):
          - axis 'sqe' is not in the pattern (did you mean 'seq'?)
          - axis 'seq' has no size
          - batch=0: a size is a whole number of at least 1
          - embed=4: the pattern has no such axis
          Fix: give the size of every axis by name, or like=""",
    ),
    "indices that a mesh dim does not divide": (
        lambda: inside(lambda: ft.iota("batch", "batch", batch=3)),
        ft.LayoutError,
        """\
        iota('batch', 'batch'):
          - result ('batch', shape (3,)): axis 'batch' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 would be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
    "a renaming that loses an axis": (
        lambda: ft.constrain("batch seq -> batch", X),
        ft.PatternError,
        """\
        constrain('batch seq -> batch'):
          - it renames the axes of one tensor, one for one; these patterns have [2] to [1] axes
          Fix: write as in 'batch seq -> batch whole_seq'""",
    ),
    "a move to where it does not divide": (
        lambda: inside(lambda: ft.constrain("mlp seq -> batch seq", ODD)),
        ft.LayoutError,
        """\
        constrain('mlp seq -> batch seq'):
          - result ('mlp seq', shape (3, 5)): axis 'mlp' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 would \
be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
    "heads that do not group": (
        lambda: ft.attention(ATTEND, Q, K3, K3),
        ft.PatternError,
        """\
        attention('batch seq heads head_dim, batch seq kv_heads head_dim'):
          - 4 heads are not a multiple of 3 kv heads
          Fix: each kv head serves the same number of heads: give a divisor of them""",
    ),
    "values of another length and other heads than keys": (
        lambda: ft.attention(ATTEND, Q, K3, LONG, causal=True),
        ft.PatternError,
        """\
        attention('batch seq heads head_dim, batch seq kv_heads head_dim'):
          - axis 'seq' is 5 in values, but 4 in queries
          - axis 'kv_heads' is 2 in values, but 3 in keys
          Fix: give each axis one size, in every operand""",
    ),
    "segments of another length, positions that are floats": (
        lambda: ft.attention(ATTEND, Q, K, K, segments=LATER, positions=PLACES),
        ft.PatternError,
        """\
        attention('batch seq heads head_dim, batch seq kv_heads head_dim'):
          - positions: dtype float32, where integers are wanted
          - axis 'seq' is 5 in segments, but 4 in queries
          Fix: cast by x.long(); give each axis one size, in every operand""",
    ),
    "attention with a result": (
        lambda: ft.attention(ATTEND + " -> batch seq heads head_dim", Q, K, K),
        ft.PatternError,
        """\
        pattern 'batch seq heads head_dim, batch seq kv_heads head_dim -> batch seq heads head_dim':
          - it has '->', but the pattern of this result follows from the operands
          Fix: write the operands alone, 'operand, operand'""",
    ),
    "attention with heads before positions": (
        lambda: ft.attention("batch heads seq dim, batch kv_heads seq dim", Q, K, K),
        ft.PatternError,
        """\
        attention('batch heads seq dim, batch kv_heads seq dim'):
          - positions are 'heads' in queries, 'kv_heads' in keys, which have no positions of their own
          Fix: write 'batch seq heads head_dim, batch seq kv_heads head_dim'; where keys are other tokens, as of an \
encoder: key_positions=ft.iota('batch kv_heads', 'kv_heads', sizes)""",
    ),
    "attention over other tokens, without their positions": (
        lambda: ft.attention("batch seq heads head_dim, batch source kv_heads head_dim", Q, LONG, LONG),
        ft.PatternError,
        """\
        attention('batch seq heads head_dim, batch source kv_heads head_dim'):
          - positions are 'seq' in queries, 'source' in keys, which have no positions of their own
          Fix: write 'batch seq heads head_dim, batch seq kv_heads head_dim'; where keys are other tokens, as of an \
encoder: key_positions=ft.iota('batch source', 'source', sizes)""",
    ),
    "attention with options of other kinds": (
        lambda: ft.attention(ATTEND, Q, K, K, causal="yes", scale="x", window=0),
        ft.PatternError,
        """\
        attention('batch seq heads head_dim, batch seq kv_heads head_dim'):
          - causal is 'yes': it is True or False
          - scale is 'x': it is a finite number
          - window is 0: a number of positions, at least 1
          Fix: write causal=True, scale=0.125, window=1024, mask=lambda b, h, q, kv: q >= kv""",
    ),
    "labels that are floats, for another batch": (
        lambda: ft.cross_entropy("batch vocab, batch ->", ODD, FLOATS),
        ft.PatternError,
        """\
        cross_entropy('batch vocab, batch ->'):
          - labels: dtype float32, where 64-bit integers are wanted
          - axis 'batch' is 2 in labels, but 3 in logits
          Fix: cast by x.long(); give each axis one size, in every operand""",
    ),
    "labels before logits": (
        lambda: ft.cross_entropy("batch vocab, batch ->", IDS, X),
        ft.PatternError,
        """\
        cross_entropy('batch vocab, batch ->'):
          - logits: pattern 'batch vocab' names 2 axes, the tensor has 1: (2,)
          - logits: dtype int64, where floating-point numbers are wanted
          - labels: pattern 'batch' names 1 axes, the tensor has 2: (2, 4)
          - labels: dtype float32, where 64-bit integers are wanted
          Fix: name each dimension of the tensor once, in order; cast by x.float(); cast by x.long()""",
    ),
    "labels with an axis that logits lack": (
        lambda: ft.cross_entropy("batch vocab, batch seq ->", X, IDS),
        ft.PatternError,
        """\
        cross_entropy('batch vocab, batch seq ->'):
          - labels 'batch seq' must have all axes of logits 'batch vocab' but the vocabulary
          Fix: write as in 'batch seq vocab, batch seq -> batch seq'""",
    ),
    "a scale of another size": (
        lambda: ft.rms_norm("batch embed, embed", X, V[:3]),
        ft.PatternError,
        """\
        rms_norm('batch embed, embed'):
          - axis 'embed' is 3 in scale, but 4 in x
          Fix: give each axis one size, in every operand""",
    ),
    "a scale without a pattern": (
        lambda: ft.rms_norm("batch embed", X, V),
        ft.PatternError,
        """\
        rms_norm('batch embed'):
          - 1 patterns: one of x, one of the scale
          Fix: write 'batch seq embed, embed'""",
    ),
    "a bias of another size, and of integers": (
        lambda: ft.layer_norm("batch embed, embed", X, V[:3], IDS),
        ft.PatternError,
        """\
        layer_norm('batch embed, embed'):
          - bias: dtype int64, where floating-point numbers are wanted
          - axis 'embed' is 3 in scale, but 4 in x
          - axis 'embed' is 2 in bias, but 4 in x
          Fix: cast by x.float(); give each axis one size, in every operand""",
    ),
    "a dropout of everything": (
        lambda: ft.dropout("batch embed", X, KEY, 1.0),
        ft.FunctitanError,
        """\
        dropout('batch embed'):
          - rate is 1.0
          Fix: give a number in [0, 1)""",
    ),
    "a rate and a key in the wrong order": (
        lambda: ft.dropout("batch embed", X, 0.1, KEY),
        ft.FunctitanError,
        """\
        dropout('batch embed'):
          - the key is 0.1
          Fix: make it by ft.random.key(seed), an int64 tensor of shape (2,); of ft.random.split take one row""",
    ),
    "a collective that is wrong in two ways": (
        lambda: inside(lambda: collectives.all_reduce(V, ("tpp",), op="avg")),
        ft.MeshError,
        """\
        all_reduce over ('tpp',):
          - unknown mesh dim 'tpp' (did you mean 'tp'?); this mesh has ['fsdp']
          - op is 'avg', not 'sum' or 'max'
          Fix: the mesh is {'fsdp': 2}""",
    ),
}
