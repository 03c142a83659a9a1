"""Second derivatives through `ft.remat` are those without it, whatever a policy stores and however attention is run."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

import functitan as ft

Q, KV = "batch seq heads head_dim", "batch seq kv_heads head_dim"
RULES = ft.AxisRules({"batch": "dp", "heads": "tp", "kv_heads": "tp", "seq": ("cp", "tp"), "head_dim": None, "a": None})
SEGMENTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
KINDS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "segments": {"causal": True},
    "mask": {"mask": lambda b, h, q, k: (q >= k) & ((q + h) % 3 != k)},
}
POLICIES = {
    "nothing": ft.remat_policies.nothing_saveable,
    "everything": ft.remat_policies.everything_saveable,
    "dots": ft.remat_policies.dots_saveable,
    "names": ft.remat_policies.save_only_these_names("attended"),
    "budget": ft.remat_policies.budget(1024),
    "all": lambda made: True,
}
MESHES = [({"cp": 2}, ("causal", "window", "segments"), ("dots", "budget")), ({"dp": 2, "tp": 2}, ("mask",), ("all",))]


class Args(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    w: torch.Tensor


PATTERNS = Args(Q, KV, "head_dim a")


def args(kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 2, 4), (2, 4, kv_heads, 4), (4, 4)
    return Args(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes))


def block(options, segments):
    def attend(x, y, w, segments):
        z = ft.attention(f"{Q}, {KV}", x, y, y, segments=segments, **options)
        z = ft.checkpoint_name(torch.tanh(ft.einsum(f"{Q}, head_dim a -> batch seq heads a", z, w)), "attended")
        return torch.tanh(ft.einsum(f"{Q}, head_dim a -> batch seq heads a", z, w))

    return lambda wrap: lambda a: ft.reduce(f"{Q} ->", wrap(attend)(*a, segments) ** 2)


def of(name, mesh=None):
    segments = SEGMENTS if name == "segments" else None
    if segments is not None and mesh is not None:
        segments = ft.shard(segments, "batch seq", mesh=mesh, rules=RULES)
    return block(KINDS[name], segments)


def rematted(policy):
    return lambda fn: ft.remat(fn, policy=POLICIES[policy])


def gap(found, expected):
    pairs = zip(ft.tree.leaves(found), ft.tree.leaves(expected), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", KINDS)
def test_hvp_of_every_policy(name):
    kv_heads = 2 if name in ("plain", "window") else 1
    at, along = args(kv_heads), ft.tree.map(torch.cos, args(kv_heads))
    expected = ft.hvp(of(name)(lambda fn: fn), (at,), (along,))
    for policy in POLICIES:
        assert gap(ft.hvp(of(name)(rematted(policy)), (at,), (along,)), expected) < 1e-11, policy


@pytest.mark.parametrize(("mesh", "kinds", "policies"), MESHES, ids=["ring", "heads"])
def test_hvp_on_meshes(mesh, kinds, policies):
    """Also where first derivatives take a ring, and second ones gather."""
    at, along = args(), ft.tree.map(torch.cos, args())

    def rank(mesh):
        whole = lambda tree: ft.shard(tree, PATTERNS, mesh=mesh, rules=RULES)
        hvp = lambda fn: ft.unshard(ft.hvp(fn, (whole(at),), (whole(along),)), PATTERNS, mesh=mesh, rules=RULES)
        inside = lambda: {key: hvp(of(key[0], mesh)(rematted(key[1]))) for key in cases}
        return ft.spmd(inside, mesh=mesh, rules=RULES)()

    cases = list(itertools.product(kinds, policies))
    found = ft.simulate(**mesh)(rank)()[0]
    for name, policy in cases:
        expected = ft.hvp(of(name)(lambda fn: fn), (at,), (along,))
        assert gap(found[name, policy], expected) < 1e-11, (name, policy)


def test_jvp_on_a_virtual_mesh_is_two_vjps():
    at, along = args(), ft.tree.map(torch.cos, args())

    def rank(mesh):
        whole = lambda tree: ft.shard(tree, PATTERNS, mesh=mesh, rules=RULES)
        jvp = lambda name, wrap: ft.jvp(of(name, mesh)(wrap), (whole(at),), (whole(along),))[1]
        inside = lambda: {name: jvp(name, rematted("budget")) for name in ("causal", "window")}
        return ft.spmd(inside, mesh=mesh, rules=RULES)()

    found = ft.simulate(cp=2)(rank)()[0]
    for name in found:
        grads = ft.grad(of(name)(lambda fn: fn))(at)
        assert abs(found[name] - sum((a * b).sum() for a, b in zip(grads, along, strict=True))) < 1e-11, name


@pytest.mark.parametrize("name", ["segments", "mask"])
def test_hessians_and_nested_remat(name):
    at = args(1)
    hessian = lambda wrap: torch.func.jacrev(torch.func.grad(lambda w: of(name)(wrap)(at._replace(w=w))))(at.w)
    expected = hessian(lambda fn: fn)
    assert gap(hessian(rematted("budget")), expected) < 1e-11
    assert gap(hessian(lambda fn: rematted("dots")(rematted("all")(fn))), expected) < 1e-11


def test_vmapped_hvp():
    at, along = args(1), ft.tree.map(torch.cos, args(1))
    several = torch.stack([at.w, at.w + 1, at.w * 2])

    def hvp(wrap, w):
        return ft.hvp(of("window")(wrap), (at._replace(w=w),), (along,))

    found = torch.func.vmap(lambda w: hvp(rematted("all"), w))(several)
    for i, w in enumerate(several):
        assert gap(ft.tree.map(lambda x: x[i], found), hvp(lambda fn: fn, w)) < 1e-11  # noqa: B023


def calls(*patterns):
    """A function that calls one einsum of each pattern the first time that it runs, and all but the first later."""
    seen = []

    def fn(x, w):
        for pattern in patterns[1:] if seen else patterns:
            x = torch.tanh(ft.einsum(pattern, x, w))
        seen.append(1)
        return ft.reduce("batch embed ->", x)

    return fn


def test_a_replay_that_calls_other_ops_raises():
    """It would take another call's stored value, here of the same shape."""
    x, w = torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    fn = calls("batch embed, embed mlp -> batch mlp", "batch mlp, embed mlp -> batch embed")
    with pytest.raises(ft.FunctitanError) as caught:
        ft.grad(ft.remat(fn, policy=ft.remat_policies.dots_saveable))(x, w)
    of = "float64[2, 3], float64[3, 3]"
    problem = f"""named op 0 was einsum('batch embed, embed mlp -> batch mlp') of {of} in forward, \
and is einsum('batch mlp, embed mlp -> batch embed') of {of} when it is computed again"""
    assert problem in str(caught.value)
    assert "Fix: a rematerialized function calls the same named ops each time" in str(caught.value)


def test_a_replay_that_calls_fewer_ops_raises():
    """Two equal calls last: the one that is left out shows only at the end."""
    seen = []

    def fn(x, w):
        x = ft.einsum("batch e, e f -> batch f", x, w)
        for _ in range(1 if seen else 2):
            x = torch.sin(ft.einsum("batch e, e f -> batch f", x, w))
        seen.append(1)
        return x.sum()

    x, w = torch.ones(2, 3), torch.ones(3, 3)
    with pytest.raises(ft.FunctitanError, match="3 named ops were called in forward, 2 when it was computed again"):
        ft.grad(ft.remat(fn, policy=ft.remat_policies.dots_saveable))(x, w)
