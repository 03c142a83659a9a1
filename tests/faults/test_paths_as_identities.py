"""A leaf's path is its identity: two leaves never share one, whatever the keys, and who asks for paths says so.

Trees of odd keys either come back from a checkpoint, with random numbers of their own for each leaf, or are refused
with both leaves' keys; the paths of ordinary trees are as they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functitan as ft
from functitan.errors import FunctitanError

P = ft.Param("embed", (3,))
KEYS = st.one_of(
    st.sampled_from(["a", "b", "a.b", "b.a", ".", "", " ", "0", "1", "a/b", "None", "\n"]),
    st.sampled_from([0, 1, -1, None, 1.5, (0, "a"), (0,)]),
    st.text(max_size=3),
)
TREES = st.recursive(
    st.just(P),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=5,
)
CLASHES = [{"a.b": P, "a": {"b": P}}, {0: P, "0": P}, [{"0.1": P, "0": [P, P]}], {"": {"a": P}, ".a": P}]


def joined(tree: Any, keys: tuple = ()) -> list[str]:
    """The paths of a tree's leaves."""
    if isinstance(tree, ft.Param):
        return [".".join(map(str, keys))]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [path for key, each in items for path in joined(each, (*keys, key))]


@settings(max_examples=60)
@given(TREES)
def test_a_tree_of_odd_keys_comes_back_or_is_refused(tree):
    paths = joined(tree)
    if len(set(paths)) < len(paths):
        with pytest.raises(FunctitanError, match="have one path"):
            ft.init(tree, ft.random.key(0))
        return
    assert sorted(ft.tree.paths(tree)) == sorted(paths)
    made = ft.init(tree, ft.random.key(0))
    leaves = ft.tree.leaves(made)
    assert len({tuple(x.tolist()) for x in leaves}) == len(leaves)
    with tempfile.TemporaryDirectory() as folder:
        ft.checkpoint.save(f"{folder}/saved", made)
        back = ft.tree.leaves(ft.checkpoint.restore(f"{folder}/saved", tree))
    assert all(map(torch.equal, back, leaves))


ASK: dict[str, Callable[[Any], Any]] = {
    "paths": ft.tree.paths,
    "init": lambda tree: ft.init(tree, ft.random.key(0)),
    "create": lambda tree: ft.TrainState.create(tree, ft.optim.sgd(0.1), ft.random.key(0)),
    "save": lambda tree: ft.checkpoint.save("/nowhere/saved", ft.tree.map(lambda _: torch.ones(3), tree)),
    "restore": lambda tree: ft.checkpoint.restore("/nowhere/saved", tree),
    "mask": lambda tree: ft.optim.add_decayed_weights(0.1, lambda path, leaf: True).update(tree, (), tree),
    "map_with_path": lambda tree: ft.tree.map_with_path(lambda path, leaf: leaf, tree),
}


@pytest.mark.parametrize("tree", CLASHES, ids=repr)
@pytest.mark.parametrize("ask", ASK)
def test_whoever_asks_names_both_leaves(ask: str, tree: Any):
    with pytest.raises(FunctitanError, match=r"the leaves of \(.*\) and \(.*\) have one path, '.*'(.|\n)*rename a key"):
        ASK[ask](tree)


def test_ordinary_paths_are_what_they_were():
    state = ft.TrainState.create({"layers": [{"w.q": P}, {"b": P}]}, ft.optim.sgd(0.1, momentum=0.9), ft.random.key(0))
    paths = ft.tree.paths({"train": state, "cursor": (1, 2), 7: 0})
    assert paths[:3] == ["7", "cursor.0", "cursor.1"]
    assert paths[3:5] == ["train.params.layers.0.w.q", "train.params.layers.1.b"]
    assert paths[-2:] == ["train.step", "train.key"]
