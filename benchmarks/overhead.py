"""Microseconds that functitan adds: per named op, per plan lookup, per tree operation, per checked collective.

    python benchmarks/overhead.py

Each figure is the least of many short repeats, of which other load on the machine leaves some alone, on one thread and
tensors too small to matter. Bounds: a plan lookup 5 us, einsum 5 us more than torch.einsum, flattening a tree of 300
leaves 100 us.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch

import functitan as ft
from functitan.sharding.contraction import Contraction, terms_of
from functitan.sharding.layout import layout_of
from functitan.sharding.mesh import mesh_sizes
from functitan.sharding.plan import plan

RULES = ft.AxisRules({"batch": "dp", "seq": None, "embed": "fsdp", "mlp": "tp", "vocab": "tp"})


def microseconds(fn: Callable[[], object], calls: int = 5000) -> float:
    fn()
    return min(timeit.repeat(fn, number=calls // 100, repeat=500)) / (calls // 100) * 1e6


def collective(calls: int = 300) -> tuple[float, float]:
    """Microseconds of an all-reduce of one number, plain and `ft.checked`, on this rank of two gloo processes."""
    mesh, x = ft.make_mesh(dp=2), torch.ones(1)

    def sums() -> None:
        for _ in range(calls):
            ft.reduce("batch ->", x)

    runs = [ft.spmd(fn, mesh=mesh, rules=RULES) for fn in (sums, ft.checked(sums))]
    plain, checked = (min(timeit.repeat(run, number=1, repeat=5)) / calls * 1e6 for run in runs)
    return plain, checked


def main() -> None:
    torch.set_num_threads(1)
    x, w, s = torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(4)
    ids, table = torch.tensor([1, 0]), torch.randn(6, 4)
    mesh = mesh_sizes(dict(dp=2, fsdp=2, tp=2))
    layouts = [
        layout_of(axes, RULES, mesh) for axes in (("batch", "seq", "embed"), ("embed", "mlp"), ("batch", "seq", "mlp"))
    ]
    sizes = (("batch", 2), ("seq", 3), ("embed", 4), ("mlp", 6))
    contraction = Contraction(tuple(layouts[:2]), tuple(layouts[2:]), terms_of(2, 1), sizes)
    tree = {f"layer{i}": {"a": s, "b": [s, s]} for i in range(100)}
    pattern = "batch seq embed, embed mlp -> batch seq mlp"
    rows = {
        "einsum, matmul": (lambda: ft.einsum(pattern, x, w), lambda: torch.einsum("bse,em->bsm", x, w)),
        "einsum, multiply": (lambda: ft.einsum("a b c, c -> a b c", x, s), lambda: torch.einsum("abc,c->abc", x, s)),
        "reduce": (lambda: ft.reduce("a b c -> a", x), lambda: x.sum((1, 2))),
        "broadcast": (lambda: ft.broadcast("c -> a b c", s), lambda: s.view(1, 1, 4)),
        "take": (lambda: ft.take("a, b c -> a c", ids, table), lambda: torch.nn.functional.embedding(ids, table)),
        "plan lookup": (lambda: plan(contraction, mesh), None),
        "tree.flatten, 300 leaves": (lambda: ft.tree.flatten(tree), None),
        "tree.map, 300 leaves": (lambda: ft.tree.map(lambda leaf: leaf, tree), None),
        "tree.paths, 300 leaves": (lambda: ft.tree.paths(tree), None),
    }
    print(f"torch {torch.__version__}, microseconds a call\n{'':28}{'functitan':>10}{'torch':>10}{'more':>10}")
    for name, (ours, theirs) in rows.items():
        calls = 5000 if theirs else 1000
        mine = microseconds(ours, calls)
        if theirs is None:
            print(f"{name:28}{mine:10.2f}")
        else:
            plain = microseconds(theirs, calls)
            print(f"{name:28}{mine:10.2f}{plain:10.2f}{mine - plain:10.2f}")
    plain, checked = ft.launch(collective, nprocs=2)[0]
    print(f"{'all_reduce, 2 gloo processes':28}{plain:10.2f}\n{'the same, ft.checked':28}{checked:10.2f}")


if __name__ == "__main__":
    main()
