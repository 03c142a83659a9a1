"""Mistakes in patterns, products, and sums: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from user_errors.given import ARRAY, HALF, IDS, META, X3, V, W, X, inside

MISTAKES = {
    "a repeated axis": (
        lambda: ft.einsum("batch embed embed -> batch", X3),
        ft.PatternError,
        """\
        pattern 'batch embed embed -> batch':
          - axis 'embed' stands twice in 'batch embed embed': each axis of a tensor has a name of its own
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "names that are none": (
        lambda: ft.einsum("2batch embed-dim -> batch", X),
        ft.PatternError,
        """\
        pattern '2batch embed-dim -> batch':
          - '2batch' in '2batch embed-dim' is not an axis name: letters, digits and '_', beginning with a letter
          - 'embed-dim' in '2batch embed-dim' is not an axis name: letters, digits and '_', beginning with a \
letter
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "a comma of another alphabet": (
        lambda: ft.einsum("batch embed， embed mlp -> batch mlp", X, W),
        ft.PatternError,
        """\
        pattern 'batch embed， embed mlp -> batch mlp':
          - 'embed，' in 'batch embed， embed mlp' is not an axis name: letters, digits and '_', beginning with a \
letter
          Fix: name each axis once, with spaces between, as in 'batch seq embed'""",
    ),
    "an arrow of another alphabet": (
        lambda: ft.einsum("batch embed → batch", X),
        ft.PatternError,
        """\
        pattern 'batch embed → batch':
          - a pattern of an operation has one '->', this has 0
          Fix: write 'operand, operand -> result', as in 'batch embed, embed mlp -> batch mlp'""",
    ),
    "a tensor before the pattern": (
        lambda: ft.reduce(X, "batch embed -> batch"),
        ft.PatternError,
        """\
        pattern that is a value of type 'Tensor':
          - a pattern is a string
          Fix: write 'batch seq embed'; in ops it comes first, as in ft.einsum('a b, b c -> a c', x, w)""",
    ),
    "an axis from nowhere": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mpl", X, W),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mpl'):
          - result 'batch mpl' has axis 'mpl' (did you mean 'mlp'?), which none of its operands has
          Fix: ft.broadcast gives a tensor an axis that it lacks""",
    ),
    "a name without a rule": (
        lambda: inside(lambda: ft.einsum("batch embde, embde mlp -> batch mlp", X, W)),
        ft.RulesError,
        """\
        einsum('batch embde, embde mlp -> batch mlp'):
          - axis 'embde' of 'batch embde' has no rule (did you mean 'embed'?)
          - axis 'embde' of 'embde mlp' has no rule (did you mean 'embed'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "more results than operands": (
        lambda: ft.einsum("batch embed -> batch, embed", X),
        ft.PatternError,
        """\
        einsum('batch embed -> batch, embed'):
          - 2 results for 1 operands: the last operands belong to one result each
          Fix: give at least one operand for each result""",
    ),
    "too few tensors": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", X),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - the pattern has 2 operands, the call 1 tensors
          Fix: give one tensor for each operand, in order""",
    ),
    "operands of the wrong rank": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", X3, V),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': pattern 'batch embed' names 2 axes, the tensor has 3: (2, 2, 4)
          - operand 1 'embed mlp': pattern 'embed mlp' names 2 axes, the tensor has 1: (4,)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "a size that differs": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", X, X),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - axis 'embed' is 2 in operand 1 'embed mlp', but 4 in operand 0 'batch embed'
          Fix: give each axis one size, in every operand""",
    ),
    "a global size that differs": (
        lambda: inside(lambda: ft.einsum("batch embed, embed mlp -> batch mlp", X, W)),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - axis 'embed' is 8 (shards of 4 over fsdp) in operand 1 'embed mlp', but 4 in operand 0 'batch embed'
          Fix: give each axis one global size; tensors are local shards, as ft.shard and ft.init make them""",
    ),
    "what is no tensor": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", ARRAY, ft.Param("embed mlp", (4, 3))),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': a value of type 'ndarray' is no tensor
          - operand 1 'embed mlp': a value of type 'Param' is no tensor
          Fix: give tensors: torch.as_tensor(x)""",
    ),
    "dtypes that differ": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", HALF, W),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': float16, operand 1 'embed mlp': float32
          Fix: cast by x.to(...), so that all have one dtype""",
    ),
    "devices that differ": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", META, W),
        ft.PatternError,
        """\
        einsum('batch embed, embed mlp -> batch mlp'):
          - operand 0 'batch embed': meta, operand 1 'embed mlp': cpu
          Fix: cast by x.to(...), so that all have one device""",
    ),
    "an unknown reduction": (
        lambda: ft.reduce("batch embed -> batch", X, op="average"),
        ft.PatternError,
        """\
        reduce('batch embed -> batch'):
          - unknown op 'average'
          Fix: use one of ['sum', 'mean', 'max', 'logsumexp']""",
    ),
    "a mean of integers": (
        lambda: ft.reduce("batch ->", IDS, op="mean"),
        ft.PatternError,
        """\
        reduce('batch ->', op='mean'):
          - x: dtype int64, where floating-point numbers are wanted
          Fix: cast by x.float()""",
    ),
    "a reduction to an axis that is not there": (
        lambda: ft.reduce("batch embed -> seq", X),
        ft.PatternError,
        """\
        reduce('batch embed -> seq'):
          - result 'seq' has axis 'seq', which the operand lacks
          Fix: ft.broadcast gives a tensor an axis that it lacks""",
    ),
    "a broadcast that loses an axis": (
        lambda: ft.broadcast("embed -> batch mlp", V, embed=4, batch=-2),
        ft.PatternError,
        """\
        broadcast('embed -> batch mlp'):
          - axis 'embed' of the operand is not in the result
          - embed=4: the new axes are ['batch', 'mlp']
          - batch=-2: a size is a whole number of at least 1
          Fix: ft.broadcast gives new axes, and sizes to these alone; ft.reduce takes axes away""",
    ),
    "a new axis that its mesh dim does not divide": (
        lambda: inside(lambda: ft.broadcast("mlp -> batch mlp", V, batch=3)),
        ft.LayoutError,
        """\
        broadcast('mlp -> batch mlp'):
          - result ('batch mlp', shape (3, 4)): axis 'batch' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 \
would be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
}
