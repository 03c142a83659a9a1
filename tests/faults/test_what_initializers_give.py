"""What an initializer returns is what was declared, and equal declarations are equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functitan as ft
from functitan.param import constant, fan_in, normal, uniform

RULES = ft.AxisRules({"embed": "fsdp", "mlp": None})
KEY = ft.random.key(0)
BAD = {
    "another shape": (lambda key, param, block: torch.ones(4, 1), "float32[4, 1] on cpu"),
    "another dtype": (lambda key, param, block: torch.ones(4, 3, dtype=torch.float64), "float64[4, 3] on cpu"),
    "another device": (lambda key, param, block: torch.ones(4, 3, device="meta"), "float32[4, 3] on meta"),
    "nothing": (lambda key, param, block: None, "a NoneType"),
    "a number": (lambda key, param, block: 1.0, "a float"),
    "an array": (lambda key, param, block: torch.ones(4, 3).numpy(), "a ndarray"),
}


def create(declared, key):
    return ft.TrainState.create(declared, ft.optim.sgd(0.1), key)


@pytest.mark.parametrize("make", [ft.init, create])
@pytest.mark.parametrize("init, found", BAD.values(), ids=BAD)
def test_every_bad_value_is_named_with_what_was_declared(make, init, found):
    declared = {"bad": [ft.Param("embed mlp", (4, 3), init=init)] * 2, "good": ft.Param("embed", (4,))}
    with pytest.raises(ft.FunctitanError) as caught:
        make(declared, KEY)
    what, *problems, fix = str(caught.value).split("\n")
    assert what == ("ft.init:" if make is ft.init else "ft.TrainState.create:")
    assert problems == [f"  - bad.{i}: init gives {found}, not float32[4, 3] on cpu" for i in range(2)]
    assert "return the block of the value" in fix


def test_a_whole_value_where_a_block_was_asked_for_is_named_on_every_rank():
    whole = ft.Param("embed mlp", (4, 3), init=lambda key, param, block: torch.ones(param.shape))

    def on_rank(mesh):
        with pytest.raises(
            ft.FunctitanError, match=r"w: init gives float32\[4, 3\] on cpu, not float32\[2, 3\] on cpu"
        ):
            ft.init({"w": whole}, KEY, mesh=mesh, rules=RULES)

    ft.simulate(fsdp=2)(on_rank)()


INITIALIZERS = st.one_of(
    st.builds(lambda std: (normal, (std,)), st.floats(0.1, 2)),
    st.builds(lambda low, more: (uniform, (low, low + more)), st.floats(-1, 1), st.floats(0.1, 1)),
    st.builds(lambda value: (constant, (value,)), st.floats(-2, 2)),
    st.builds(lambda axes: (fan_in, tuple(axes)), st.lists(st.sampled_from(["embed", "mlp"]), unique=True)),
)


@given(INITIALIZERS, INITIALIZERS)
def test_declarations_of_equal_arguments_are_equal(first, second):
    declared = lambda make, numbers: ft.Param("embed mlp", (4, 3), init=make(*numbers))
    assert declared(*first) == declared(*first) and hash(declared(*first)) == hash(declared(*first))
    assert (declared(*first) == declared(*second)) == (first == second)


@pytest.mark.parametrize("family, config", [(ft.models.llama, "DEBUG"), (ft.models.gpt2, "DEBUG")])
def test_a_model_declared_twice_is_one_structure(family, config):
    first, second = (family.params(getattr(family, config)) for _ in range(2))
    assert first == second
    one, other = (ft.TrainState.declare(each, ft.optim.adamw(0.1), KEY) for each in (first, second))
    ft.tree.map(lambda x, y: x, one, other)
    assert ft.tree.flatten(one)[1] == ft.tree.flatten(other)[1]


def test_declarations_of_a_module_are_equal_where_their_tensors_are_the_same_objects():
    module, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    patterns = {"weight": "mlp embed", "bias": "mlp"}
    declared, again, others = (ft.from_module(m, patterns)[1] for m in (module, module, twin))
    assert declared == again and hash(declared["bias"]) == hash(again["bias"])
    assert declared["weight"] != others["weight"]
    assert torch.equal(ft.init(again, KEY)["weight"], module.weight)
