"""Mistakes in what moves between global and local values, and keys: the call, the kind of error, its whole text."""

from __future__ import annotations

import functitan as ft
from user_errors.given import DECLARED, FEWER, KEY, MISSPELT, ODD, RULES, TOKENS, TREE, X3, X, inside, on

MISTAKES = {
    "sharding sizes that mesh dims do not divide, and another rank": (
        lambda: ft.shard(
            TREE, {"a": ["batch seq embed", "batch embed"], "b": "batch embed"}, mesh=on(fsdp=2), rules=RULES
        ),
        ft.LayoutError,
        """\
        ft.shard:
          - a.1 ('batch embed', shape (3, 5)): axis 'batch' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 \
would be
          - b: pattern 'batch embed' names 2 axes, the tensor has 1: (3,)
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole); name each \
dimension of the tensor once, in order""",
    ),
    "sharding by names without a rule": (
        lambda: ft.shard([X, X3], ["batch embde", "btach seq embed"], mesh=on(fsdp=2), rules=RULES),
        ft.RulesError,
        """\
        ft.shard:
          - 0: axis 'embde' of 'batch embde' has no rule (did you mean 'embed'?)
          - 1: axis 'btach' of 'btach seq embed' has no rule (did you mean 'batch'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "patterns of another tree": (
        lambda: ft.shard(TREE, {"a": ["batch seq embed"], "c": "batch"}, mesh=on(fsdp=2), rules=RULES),
        ft.FunctitanError,
        """\
        ft.shard:
          - nothing for a.1
          - nothing for b
          - c is not in the tree
          Fix: give a tree of the same structure, or one leaf for a whole subtree of it""",
    ),
    "sharding what is no tensor": (
        lambda: ft.shard({"x": X, "lr": 0.1}, "batch embed", mesh=on(fsdp=2), rules=RULES),
        ft.PatternError,
        """\
        ft.shard:
          - lr is a float, not a tensor
          Fix: None in place of a pattern passes a leaf as it is""",
    ),
    "sharding without rules": (
        lambda: ft.shard(X, "batch embed", mesh=on(fsdp=2), rules=None),
        ft.MeshError,
        """\
        ft.shard:
          - rules is None
          Fix: give a table: ft.AxisRules({...})""",
    ),
    "unsharding by patterns of another rank": (
        lambda: ft.unshard([X, X3], "batch embed", mesh=on(fsdp=2), rules=RULES),
        ft.PatternError,
        """\
        ft.unshard:
          - 1: pattern 'batch embed' names 2 axes, the tensor has 3: (2, 2, 4)
          Fix: name each dimension of the tensor once, in order""",
    ),
    "resharding to where it does not divide": (
        lambda: inside(lambda: ft.reshard([ODD, ODD], "mlp seq", to_rules=RULES.replace(mlp="fsdp"))),
        ft.LayoutError,
        """\
        ft.reshard:
          - 0 ('mlp seq', shape (3, 5)): axis 'mlp' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 would be
          - 1 ('mlp seq', shape (3, 5)): axis 'mlp' of size 3 is not divisible by 2 (fsdp=2); 2 or 4 would be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
    "resharding to rules that lack a name": (
        lambda: inside(lambda: ft.reshard([X, X], ["batch embed", "batch mlp"], to_rules=FEWER)),
        ft.RulesError,
        """\
        ft.reshard:
          - 0: axis 'embed' of 'batch embed' has no rule
          - 1: axis 'mlp' of 'batch mlp' has no rule
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "parameters that mesh dims do not divide": (
        lambda: ft.init(DECLARED, KEY, mesh=on(fsdp=4, tp=2), rules=RULES),
        ft.LayoutError,
        """\
        ft.init:
          - v ('vocab embed', shape (7, 8)): axis 'vocab' of size 7 is not divisible by 2 (tp=2); 6 or 8 would be
          - w ('embed mlp', shape (5, 3)): axis 'embed' of size 5 is not divisible by 4 (fsdp=4); 4 or 8 would be
          - w ('embed mlp', shape (5, 3)): axis 'mlp' of size 3 is not divisible by 2 (tp=2); 2 or 4 would be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
    "parameters by names without a rule": (
        lambda: ft.init(MISSPELT, KEY, mesh=on(fsdp=2), rules=RULES),
        ft.RulesError,
        """\
        ft.init:
          - v: axis 'vocb' of 'vocb embed' has no rule (did you mean 'vocab'?)
          - w: axis 'embde' of 'embde mlp' has no rule (did you mean 'embed'?)
          Fix: add the axis to the rules; None keeps it whole, as in rules.replace(head_dim=None)""",
    ),
    "parameters that are values": (
        lambda: ft.init({"w": X, "b": (4, 3)}, KEY),
        ft.FunctitanError,
        """\
        ft.init:
          - b.0 is a int, not a Param
          - b.1 is a int, not a Param
          - w is a Tensor, not a Param
          Fix: declare each parameter as ft.Param('embed mlp', (256, 768))""",
    ),
    "a seed in place of a key": (
        lambda: ft.init(DECLARED, 0),
        ft.FunctitanError,
        """\
        ft.init:
          - the key is 0
          Fix: make it by ft.random.key(seed), an int64 tensor of shape (2,); of ft.random.split take one row""",
    ),
    "a seed that is none": (
        lambda: ft.random.key(1.5),
        ft.FunctitanError,
        """\
        ft.random:
          - seed=1.5
          Fix: give an int in [0, 2**64)""",
    ),
    "several keys in place of one": (
        lambda: ft.random.normal(TOKENS, (4,)),
        ft.FunctitanError,
        """\
        ft.random:
          - the key is a tensor torch.int64 (1, 2)
          Fix: make it by ft.random.key(seed), an int64 tensor of shape (2,); of ft.random.split take one row""",
    ),
    "a shape that is none": (
        lambda: ft.random.normal(KEY, 4),
        ft.FunctitanError,
        """\
        ft.random:
          - shape=4
          Fix: give a sequence of ints >= 0, fewer than 2**63 elements""",
    ),
    "explaining with too few patterns": (
        lambda: ft.explain(max, X, X, mesh=dict(fsdp=2), rules=RULES, patterns=("batch embed",)),
        ft.PatternError,
        """\
        ft.explain:
          - 1 patterns for 2 arguments
          Fix: give one for each argument; None for a whole tensor""",
    ),
    "explaining sizes that mesh dims do not divide": (
        lambda: ft.explain(max, X, X3, mesh=dict(fsdp=4), rules=RULES, patterns=("batch embed", "seq batch embed")),
        ft.LayoutError,
        """\
        ft.explain:
          - argument 0 ('batch embed', shape (2, 4)): axis 'batch' of size 2 is not divisible by 4 (fsdp=4); 4 \
would be
          - argument 1 ('seq batch embed', shape (2, 2, 4)): axis 'batch' of size 2 is not divisible by 4 \
(fsdp=4); 4 would be
          Fix: change the sizes, the mesh, or the rules of those axes (None keeps an axis whole)""",
    ),
    "explaining on no mesh": (
        lambda: ft.explain(max, X, mesh=None, rules=RULES),
        ft.MeshError,
        """\
        ft.explain:
          - mesh is None
          Fix: give sizes, as in mesh=dict(fsdp=64, tp=8)""",
    ),
}
