"""Mistakes that part a pattern from the data: the call, the kind of error, its whole text."""

from __future__ import annotations

import torch

import functitan as ft
from functitan.models import llama
from functitan.models.generate import generate
from user_errors.given import CONFIG, KEY, LLAMA, TOKENS, on

RULES = ft.AxisRules(
    {"batch": "fsdp", "seq": "cp", "embed": "tp", **dict.fromkeys(("mlp", "free", "h", "w", "head_dim", "kv_heads"))}
)
MESH = on(fsdp=2, cp=2, tp=2)
MESH = MESH._replace(transport=MESH.transport._replace(agree=lambda *_, **__: None))
X = ft.shard(torch.ones(4, 4), "batch embed", mesh=MESH, rules=RULES)
IMAGE = ft.shard(torch.ones(4, 4, 4), "batch h w", mesh=MESH, rules=RULES)
WHOLE = ft.shard({"x": torch.ones(4, 4)}, None, mesh=MESH, rules=RULES)["x"]
W = ft.init(ft.Param("embed mlp", (4, 4)), KEY, mesh=MESH, rules=RULES)
PLACES = ft.init(ft.Param("seq mlp", (8, 3)), KEY, mesh=MESH, rules=RULES)
GLOBAL = torch.ones(4, 8)

SPMD = (
    "Fix: call it in a function that ft.spmd(fn, mesh=mesh, rules=rules) wraps, or make tensors whole first: "
    "ft.unshard(x, pattern, mesh=mesh, rules=rules)"
)
RENAME = "an axis keeps its name from op to op; ft.constrain renames it and moves the tensor"
MADE = (
    "Fix: make it as it is used: give ft.shard its pattern, move it by ft.reshard from other rules, and look a table "
    "of positions up by ft.take(pattern, ft.iota('seq', 'seq', seq=n), table) where tokens lie zigzag"
)
LIES = "where the rules say how each name lies"


def checked(fn, *args, rules=RULES):
    return ft.spmd(ft.checked(fn), mesh=MESH, rules=rules)(*args)


def zigzag(fn, *args, rules=RULES):
    return checked(ft.context_parallel(fn, order="zigzag"), *args, rules=rules)


def flattened(image):
    return ft.reduce("batch seq ->", ft.rearrange("batch h w -> batch (h w)", image))


MISTAKES = {
    "a product of shards outside spmd": (
        lambda: ft.einsum("batch embed, embed mlp -> batch mlp", X, W),
        ft.LayoutError,
        f"""\
        einsum('batch embed, embed mlp -> batch mlp'), called outside ft.spmd:
          - operand 0 'batch embed' is a shard, made as 'batch embed' by ft.shard, 'batch' sharded over fsdp=2, \
'embed' sharded over tp=2
          - operand 1 'embed mlp' is a shard, made as 'embed mlp' by ft.init, 'embed' sharded over tp=2
          {SPMD}""",
    ),
    "a gradient of shards outside spmd": (
        lambda: ft.grad(lambda w: ft.reduce("embed mlp ->", w))(W),
        ft.LayoutError,
        f"""\
        reduce('embed mlp ->', op='sum'), called outside ft.spmd:
          - x is a shard, made as 'embed mlp' by ft.init, 'embed' sharded over tp=2
          {SPMD}""",
    ),
    "a norm of shards outside spmd": (
        lambda: ft.optim.global_norm({"w": W, "v": torch.ones(2)}, {"w": "embed mlp", "v": None}),
        ft.LayoutError,
        f"""\
        global_norm, called outside ft.spmd:
          - w is a shard, made as 'embed mlp' by ft.init, 'embed' sharded over tp=2
          {SPMD}""",
    ),
    "resharding outside spmd": (
        lambda: ft.reshard({"w": W, "x": X}, {"w": "embed mlp", "x": "batch embed"}, to_rules=RULES),
        ft.LayoutError,
        f"""\
        ft.reshard, called outside ft.spmd:
          - w is a shard, made as 'embed mlp' by ft.init, 'embed' sharded over tp=2
          - x is a shard, made as 'batch embed' by ft.shard, 'batch' sharded over fsdp=2, 'embed' sharded over tp=2
          {SPMD}""",
    ),
    "an axis renamed by the next pattern": (
        lambda: checked(flattened, IMAGE),
        ft.LayoutError,
        f"""\
        reduce('batch seq ->', op='sum'):
          - x was made as 'batch (h w)' by rearrange and is used as 'batch seq': 'seq' is sharded over cp=2 here, \
'(h w)' was whole
          Fix: {RENAME}: ft.constrain('batch h_w -> batch seq', x), {LIES}""",
    ),
    "a parameter whose axes are swapped": (
        lambda: checked(ft.grad(lambda w: ft.reduce("mlp embed ->", w)), W),
        ft.LayoutError,
        f"""\
        reduce('mlp embed ->', op='sum'):
          - x was made as 'embed mlp' by ft.init and is used as 'mlp embed': 'mlp' is whole here, 'embed' was \
sharded over tp=2
          - x was made as 'embed mlp' by ft.init and is used as 'mlp embed': 'embed' is sharded over tp=2 here, \
'mlp' was whole
          Fix: {RENAME}: ft.constrain('embed mlp -> mlp embed', x), {LIES}""",
    ),
    "a whole tensor used as a shard": (
        lambda: checked(lambda x: ft.reduce("batch free ->", x), WHOLE),
        ft.LayoutError,
        f"""\
        reduce('batch free ->', op='sum'):
          - x was made by ft.shard and is used as 'batch free': 'batch' is sharded over fsdp=2 here, 'batch' was whole
          {MADE}""",
    ),
    "a parameter of positions beside tokens that lie zigzag": (
        lambda: zigzag(lambda w: ft.broadcast("seq mlp -> batch seq mlp", w), PLACES),
        ft.LayoutError,
        f"""\
        broadcast('seq mlp -> batch seq mlp'):
          - x was made as 'seq mlp' by ft.init and is used as 'seq mlp': 'seq' lies zigzag over 2 ranks here, 'seq' \
lay in the order of positions
          {MADE}""",
    ),
    "tokens that lie zigzag merged with another axis": (
        lambda: zigzag(lambda x: ft.rearrange("batch seq -> (batch seq)", x), GLOBAL, rules=RULES.replace(seq=None)),
        ft.LayoutError,
        """\
        rearrange('batch seq -> (batch seq)'):
          - 'seq' of (batch seq) lies in the order 'zigzag' of ft.context_parallel
          Fix: put it in the order of positions first, by renaming it to an axis that the rules keep whole: \
ft.constrain('batch seq -> batch whole_seq', x); or keep the contiguous order""",
    ),
    "tokens put in zigzag order twice": (
        lambda: zigzag(lambda x: ft.zigzag(x, "batch seq", mesh=MESH), GLOBAL),
        ft.LayoutError,
        """\
        ft.zigzag:
          - it is called inside ft.context_parallel(order='zigzag'), where 'seq' lies in that order already
          Fix: leave it out: ft.shard and ft.unshard know the order there; or permute outside""",
    ),
    "new tokens after some that lie zigzag": (
        lambda: zigzag(
            lambda x: generate(LLAMA, x, CONFIG, max_new_tokens=1, temperature=0),
            TOKENS,
            rules=llama.RULES.replace(batch=None, seq=None),
        ),
        ft.LayoutError,
        """\
        generate:
          - tokens lie in the order 'zigzag' of ft.context_parallel, and new ones come at the end
          Fix: call it outside ft.context_parallel(fn, order='zigzag')""",
    ),
}
