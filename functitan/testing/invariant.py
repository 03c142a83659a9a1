"""The law of functitan as an assert: a program is the same function on every mesh, and so are its gradients.

Invariant: every rank's values and gradients are compared with those of plain torch, without a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functitan import tree
from functitan.errors import report
from functitan.sharding.rules import AxisRules
from functitan.testing.asserts import leaf_differences
from functitan.testing.divergence import Divergence, first_divergence
from functitan.testing.sharded import on_ranks

MESHES: tuple[Mapping[str, int], ...] = (
    dict(fsdp=2), dict(tp=2), dict(cp=2), dict(dp=2, fsdp=2), dict(fsdp=2, tp=2), dict(dp=2, fsdp=2, tp=2)
)  # fmt: skip


def assert_mesh_invariant(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    patterns: tree.Tree,
    out: tree.Tree,
    rules: AxisRules,
    meshes: Sequence[Mapping[str, int]] = MESHES,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that `fn(*args)` and its gradients are on every mesh what they are without one.

    `args` are global values; `patterns` is a tree or prefix of their patterns (or `Param`s), `out` one for what `fn`
    returns, tensors only; `None` is equal on every rank. Gradients are those of all floating-point leaves of `args`,
    for one random cotangent of the result. `meshes` gives sizes of virtual meshes, by default six of up to 8 ranks,
    which the sizes of the sharded axes must allow. Tolerances as in `assert_trees_all_close`. Raises `AssertionError`
    that lists, for every mesh, what differs, and the first named op whose value does.

    >>> from functitan.ops.einsum import einsum
    >>> matmul = lambda x, w: einsum("batch embed, embed mlp -> batch mlp", x, w)
    >>> rules = AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "embed": "fsdp"})
    >>> x, w = torch.rand(4, 8, dtype=torch.float64), torch.rand(8, 2, dtype=torch.float64)
    >>> assert_mesh_invariant(matmul, (x, w), patterns=("batch embed", "embed mlp"), out="batch mlp", rules=rules)
    """
    leaves, structure = tree.flatten(tuple(args))
    spread = tree.broadcast_prefix(patterns, tuple(args), "assert_mesh_invariant, patterns")
    of_leaves = [p if isinstance(x, Tensor) else None for x, p in zip(leaves, spread, strict=True)]
    floats = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    result = fn(*args)
    of_values = tree.broadcast_prefix(out, result, "assert_mesh_invariant, out")
    generator = torch.Generator().manual_seed(0)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in tree.leaves(result) if y.is_floating_point()
    ]
    of_cotangents = [p for p, y in zip(of_values, tree.leaves(result), strict=True) if y.is_floating_point()]

    def program(leaves: list[Any], cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return _values_and_gradients(fn, structure, leaves, floats, cotangents)

    paths = tree.paths(tuple(args))
    names = [f"value{'.' if path else ''}{path}" for path in tree.paths(result)]
    names += [f"gradient of argument {paths[i]}" for i in floats]
    inputs, of_inputs = (leaves, cotangents), (of_leaves, of_cotangents)
    of_results = (of_values, [of_leaves[i] for i in floats])
    expected = _named(names, program(*inputs))
    problems = []
    for mesh in meshes:
        where = f"mesh {dict(mesh)}"
        try:
            ranks = on_ranks(program, inputs, of_inputs, of_results, mesh=mesh, rules=rules)
        except Exception as error:
            error.add_note(f"in assert_mesh_invariant, on {where}")
            raise
        found = list(_of_ranks([leaf_differences(_named(names, of), expected, rtol, atol) for of in ranks]))
        if found:
            first = first_divergence(program, inputs, None, mesh, patterns=of_inputs, rules=rules, rtol=rtol, atol=atol)
            problems += [f"{where}: {line}" for line in [*found, _first(first)]]
    if problems:
        raise AssertionError(report("assert_mesh_invariant", problems, _FIX))


def _values_and_gradients(
    fn: Callable[..., Any], structure: Any, leaves: list[Any], floats: list[int], cotangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    def flat(*values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        full = dict(enumerate(leaves)) | dict(zip(floats, values, strict=True))
        out = tree.leaves(fn(*tree.unflatten(structure, full.values())))
        return tuple(y for y in out if y.is_floating_point()), tuple(out)

    if not floats or not cotangents:
        return list(flat(*(leaves[i] for i in floats))[1]), [torch.zeros_like(leaves[i]) for i in floats]
    _, back, values = torch.func.vjp(flat, *(leaves[i] for i in floats), has_aux=True)  # type: ignore[misc]
    return list(values), list(back(tuple(cotangents)))


def _named(names: list[str], results: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
    return dict(zip(names, [*results[0], *results[1]], strict=True))


def _of_ranks(lines: list[list[str]]) -> Iterator[str]:
    """Each leaf's line once, from the first rank where it differs."""
    seen = set()
    for rank, mine in enumerate(lines):
        for line in mine:
            name = line.split(":")[0]
            if name not in seen:
                seen.add(name)
                yield f"{line} (rank {rank})"


def _first(found: Divergence | None) -> str:
    if found is not None:
        return f"the first named op that differs is {found}"
    return (
        "no named op differs: it comes from plain torch ops on arguments before all named ops, or on the last results"
    )


_FIX = (
    "plain torch ops are elementwise, on tensors of one pattern; a parameter meets activations, and positions of a "
    "sharded axis meet each other, in named ops: x * ft.broadcast('embed -> batch embed', scale), ft.reduce(...)"
)
