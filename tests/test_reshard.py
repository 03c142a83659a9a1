"""Moves are the identity of global values, and move no more than they must."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.axes import write_axes
from functitan.ops.move import constrain_like, where_whole
from functitan.testing.sharded import sharded
from functitan.testing.strategies import AXES, meshes, rules_tables

RULES = ft.AxisRules({"batch": "dp", "heads": "tp", "seq": "tp", "embed": "tp"})
MESH = dict(dp=2, tp=2)


@settings(max_examples=20)
@given(mesh=meshes(), rules=rules_tables(AXES), to_rules=rules_tables(AXES), data=st.data())
def test_reshard_to_another_table_is_the_identity(mesh, rules, to_rules, data):
    x, pattern = torch.arange(64.0).view(8, 8), write_axes(data.draw(st.permutations(AXES))[:2])

    def rank(own):
        shard = ft.shard(x, pattern, mesh=own, rules=rules)
        moved = ft.spmd(lambda x: ft.reshard(x, pattern, to_rules=to_rules), mesh=own, rules=rules)(shard)
        assert torch.equal(moved, ft.shard(x, pattern, mesh=own, rules=to_rules))

    ft.simulate(**mesh)(rank)()


def test_where_whole_moves_one_axis():
    x = torch.arange(32.0).view(4, 8)
    flip = lambda x: where_whole("batch embed", "embed", lambda x: x.flip(-1), x)
    run = sharded(flip, ("batch embed",), "batch embed", mesh=MESH, rules=RULES)
    assert torch.equal(run(x), x.flip(-1))
    sent = ft.explain(flip, x, mesh=MESH, rules=RULES, patterns=("batch embed",))
    assert [(e.collective, e.mesh_dims) for e in sent] == [("all_gather", ("tp",))]


def test_a_tensor_may_lie_as_its_axes_do_in_another():
    """The heads take the mesh dim that shards the positions alone."""
    product = lambda at, x: constrain_like("seq", at, "seq heads", x).unsqueeze(1) * x
    run = sharded(product, ("seq", "seq heads"), "seq heads", mesh=MESH, rules=RULES)
    at, x = torch.arange(4.0), torch.arange(16.0).view(4, 4)
    assert torch.equal(run(at, x), at.unsqueeze(1) * x)
