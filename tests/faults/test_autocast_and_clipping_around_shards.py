"""torch.autocast and the clipping of a foreign loop, around named ops: the same on every mesh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import functitan as ft
from functitan import tree

KEY = ft.random.key(0)
RULES = ft.AxisRules(
    {"batch": "fsdp", "seq": None, "heads": "tp", "mlp": "tp", "vocab": "tp", "embed": "fsdp", "head_dim": None}
)
MESHES = [None, dict(fsdp=2, tp=2)]
DECLARED = {
    "w": ft.Param("embed mlp", (8, 4)), "b": ft.Param("embed", (8,)), "table": ft.Param("vocab embed", (16, 8)),
    "q": ft.Param("embed heads head_dim", (8, 2, 4)),
}  # fmt: skip
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8)


def product(p, x, labels):
    return ft.einsum("batch embed, embed mlp -> batch mlp", x, p["w"])


def mixed(p, x, labels):
    """The second product meets what torch cast, and a weight that it did not."""
    x = x + ft.broadcast("embed -> batch embed", p["b"])
    return ft.einsum("batch mlp, embed mlp -> batch embed", product(p, x, labels).sin(), p["w"])


def attention(p, x, labels):
    q = ft.einsum("batch embed, embed heads head_dim -> batch heads head_dim", x, p["q"]).unsqueeze(1)
    pattern = "batch seq heads head_dim, batch seq heads head_dim"
    return ft.attention(pattern, q, q, q.float())


def losses(p, x, labels):
    return ft.linear_cross_entropy("batch embed, vocab embed, batch -> batch", x, p["table"], labels)


def rematerialized(p, x, labels):
    return ft.remat(mixed)(p, x, labels)


CASES = {  # the function, the pattern of its result
    "product": (product, "batch mlp"), "mixed": (mixed, "batch embed"), "remat": (rematerialized, "batch embed"),
    "attention": (attention, "batch seq heads head_dim"), "loss": (losses, "batch"),
}  # fmt: skip


def gradients(fn, pattern, mesh, autocast):
    """The result's dtype, the whole result and the whole gradients of the sum of its squares."""
    shards = lambda x, its: ft.shard(x, its, mesh=mesh, rules=RULES)
    p = tree.map(lambda x: x.requires_grad_(), ft.init(DECLARED, KEY, mesh=mesh, rules=RULES))
    run = ft.spmd(fn if autocast else ft.precision(fn), mesh=mesh, rules=RULES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(p, shards(X, "batch embed"), shards(LABELS, "batch"))
    y.float().square().sum().backward()
    grads = {path: x.grad for path, x in p.items() if x.grad is not None}
    patterns = {path: DECLARED[path] for path in grads}
    whole = ft.unshard(y.detach(), pattern, mesh=mesh, rules=RULES)
    return y.dtype, whole, ft.unshard(grads, patterns, mesh=mesh, rules=RULES)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast_is_precision_in_its_dtype(case, mesh):
    run = lambda mesh: [gradients(*CASES[case], mesh, autocast) for autocast in (True, False)]
    for (dtype, y, grads), (own, expected, theirs) in [run(None)] if mesh is None else ft.simulate(**mesh)(run)():
        assert dtype == own and (case == "loss" or dtype == torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        assert grads.keys() == theirs.keys() and all(g.dtype == torch.float32 for g in grads.values())
        ft.testing.assert_trees_all_close(grads, theirs, rtol=4e-2, atol=1e-1)


def test_a_precision_inside_wins_and_nothing_stays_behind():
    p = ft.init(DECLARED, KEY)
    with torch.autocast("cpu", torch.bfloat16):
        full = ft.precision(product, compute=torch.float32)(p, X, LABELS)
        assert product(p, X, LABELS).dtype == torch.bfloat16 == (X @ p["w"]).dtype
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(product(p, X, LABELS), X @ p["w"])
    assert full.dtype == torch.float32 and torch.equal(full, X @ p["w"])


@pytest.mark.parametrize("wrap", [ft.compile, ft.jit])
def test_a_graph_refuses_autocast(wrap):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ft.FunctitanError, match=r"autocast[^\n]*\n.*ft\.precision"),
    ):
        wrap(lambda x: x + 1, backend="graph")(X)


@pytest.mark.parametrize("max_norm", [1e-2, 1.0, 1e6])
@pytest.mark.parametrize("mesh", [None, dict(tp=2), dict(fsdp=2, tp=2)], ids=str)
def test_gradients_of_a_foreign_loop_are_clipped_as_torch_clips_whole_ones(mesh, max_norm):
    whole = ft.init(DECLARED, ft.random.key(1))
    leaves = [nn.Parameter(torch.zeros_like(x)) for x in tree.leaves(whole)]
    for leaf, x in zip(leaves, tree.leaves(whole), strict=True):
        leaf.grad = x.clone()
    expected = torch.nn.utils.clip_grad_norm_(leaves, max_norm)

    def run(mesh):
        grads = ft.init(DECLARED, ft.random.key(1), mesh=mesh, rules=RULES)
        before = tree.map(torch.clone, grads)
        clipped, norm = ft.optim.clip_grads(
            grads | {"none": None}, max_norm, DECLARED | {"none": None}, mesh=mesh, rules=RULES
        )
        inside = ft.spmd(lambda g: ft.optim.clip_grads(g, max_norm, DECLARED), mesh=mesh, rules=RULES)(grads)
        assert torch.equal(inside[1], norm) and clipped.pop("none") is None
        ft.testing.assert_trees_all_close([inside[0], grads], [clipped, before], rtol=0, atol=0)
        return ft.unshard(clipped, DECLARED, mesh=mesh, rules=RULES), norm

    for clipped, norm in [run(None)] if mesh is None else ft.simulate(**mesh)(run)():
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for mine, leaf in zip(tree.leaves(clipped), leaves, strict=True):
            torch.testing.assert_close(mine, leaf.grad, rtol=1e-5, atol=0)


def test_clipping_shards_without_patterns_is_refused():
    def run(mesh):
        return ft.optim.clip_grads(ft.init(DECLARED, KEY, mesh=mesh, rules=RULES), 1.0, mesh=mesh, rules=RULES)

    with pytest.raises(ft.PatternError, match="patterns"):
        ft.simulate(tp=2)(run)()
