"""The laws of real processes: collectives and derivatives over gloo, the meshes of processes, and `ft.launch`.

Starting processes is what takes time here, so that each launch runs many checks and the tests look at its results.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import functitan as ft
from functitan.errors import CollectiveError, FunctitanError, MeshError
from functitan.sharding import collectives
from functitan.sharding.distributed import mesh_of
from functitan.sharding.message import Message

TOLERANCE = 1e-10  # float64 sums of some hundred terms of order one, in another order: 1e-13 and a margin

# --- collectives: four processes ------------------------------------------------------------------------------------

GROUPS = [("fsdp",), ("tp",), ("fsdp", "tp"), ("tp", "fsdp")]
RULES = ft.AxisRules({"batch": None})
COLLECTIVES = {
    "all_gather": lambda x, dims: collectives.all_gather(x, dims, axis=1),
    "reduce_scatter": lambda x, dims: collectives.reduce_scatter(x, dims, axis=1),
    "all_reduce": lambda x, dims: collectives.all_reduce(x, dims),
    "all_to_all": lambda x, dims: collectives.all_to_all(x, dims, 0, 1),
    "permute": lambda x, dims: collectives.permute(x, dims, 1),
}


def expected(kind: str, xs: list[Tensor], me: int) -> Tensor:
    """What member `me` of a group has after a collective on its members' tensors."""
    n = len(xs)
    return {
        "all_gather": lambda: torch.cat(xs, 1),
        "reduce_scatter": lambda: sum(xs).chunk(n, 1)[me],
        "all_reduce": lambda: sum(xs),
        "all_to_all": lambda: torch.cat([x.chunk(n, 0)[me] for x in xs], 1),
        "permute": lambda: xs[me - 1],
    }[kind]()


def ours(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(x: Tensor) -> float:
    dist.all_reduce(x := x.clone())
    return x.item()


def check_collectives(device_mesh: DeviceMesh) -> dict[Any, tuple[float, float]]:
    """{(collective, dims): (largest error of the values, error of the adjoint identity)}."""
    mesh, found = mesh_of(device_mesh), {}
    coordinate = dict(zip(("fsdp", "tp"), device_mesh.get_coordinate(), strict=True))
    for kind, dims in itertools.product(COLLECTIVES, GROUPS):
        places = itertools.product(*(range(mesh.shape[dim]) for dim in dims))
        at = [tuple({**coordinate, **dict(zip(dims, place, strict=True))}.values()) for place in places]
        xs = [ours(int(device_mesh.mesh[place]), (4, 8)) for place in at]
        me = at.index(tuple(coordinate.values()))
        f = ft.spmd(lambda x: COLLECTIVES[kind](x, dims), mesh=device_mesh, rules=RULES)  # noqa: B023 (called here)
        out, transpose = torch.func.vjp(f, xs[me])
        y = ours(100 + dist.get_rank(), tuple(out.shape))
        values = (out - expected(kind, xs, me)).abs().max().item()
        found[kind, dims] = values, abs(total((out * y).sum()) - total((xs[me] * transpose(y)[0]).sum()))
    return found


def four() -> dict[str, Any]:
    errors = []
    for wrong in ({"fsdp": 3}, {"fsdp": -1, "tp": 3}, {"fsdp": 4, "backend": "glow"}):
        with pytest.raises(MeshError) as error:
            ft.make_mesh(**wrong)
        errors.append((str(error.value), dist.is_initialized()))
    mesh = ft.make_mesh(fsdp=-1, tp=2)
    descending = DeviceMesh("cpu", [[3, 1], [2, 0]], mesh_dim_names=("fsdp", "tp"))
    return {
        "errors": errors,
        "sizes": dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
        "ascending": check_collectives(mesh),
        "descending": check_collectives(descending),
    }


@pytest.fixture(scope="module")
def of_four() -> list[dict[str, Any]]:
    return ft.launch(four, nprocs=4, timeout=120)


@pytest.mark.parametrize("ranks", ["ascending", "descending"])
def test_collectives_follow_the_order_of_the_dims_and_are_adjoint(of_four, ranks: str):
    for rank, result in enumerate(of_four):
        for key, (values, adjoint) in result[ranks].items():
            assert values < TOLERANCE and adjoint < TOLERANCE, (rank, key, values, adjoint)


def test_make_mesh_infers_a_size(of_four):
    assert [result["sizes"] for result in of_four] == [{"fsdp": 2, "tp": 2}] * 4


def test_make_mesh_checks_before_it_starts_anything(of_four):
    texts, running = zip(*of_four[0]["errors"], strict=True)
    assert not any(running)
    assert "sizes multiply to 3, but the number of processes is 4" in texts[0] and "ft.launch" in texts[0]
    assert "sizes multiply to 3, which does not divide the number of processes, 4: fsdp has no size" in texts[1]
    assert "no backend 'glow'" in texts[2] and "gloo" in texts[2]


# --- a sharded model: two processes ---------------------------------------------------------------------------------

MODEL_RULES = ft.AxisRules(
    {"batch": ("dp", "fsdp"), "mlp": "tp", "vocab": "tp", "seq": ("cp", "tp"), "embed": ("fsdp", "cp")}
)
PATTERNS = {"scale": "embed", "gate": "embed mlp", "up": "embed mlp", "down": "mlp embed", "out": "vocab embed"}
SHAPES = {"scale": (8,), "gate": (8, 12), "up": (8, 12), "down": (12, 8), "out": (16, 8)}
MESHES = [{"fsdp": 2}, {"tp": 2}]


def loss(params: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    scaled = x * ft.broadcast("embed -> batch seq embed", params["scale"])
    both = "batch seq embed, embed mlp, embed mlp -> batch seq mlp, batch seq mlp"
    gate, up = ft.einsum(both, scaled, params["gate"], params["up"])
    y = x + ft.einsum("batch seq mlp, mlp embed -> batch seq embed", functional.silu(gate) * up, params["down"])
    logits = ft.einsum("batch seq embed, vocab embed -> batch seq vocab", y, params["out"])
    return ft.reduce("batch seq ->", ft.cross_entropy("batch seq vocab, batch seq", logits, labels), op="mean")


def plain_loss(params: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    scaled = x * params["scale"]
    y = x + (functional.silu(scaled @ params["gate"]) * (scaled @ params["up"])) @ params["down"]
    return functional.cross_entropy((y @ params["out"].T).flatten(0, 1), labels.flatten())


def example() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """(parameters, a direction of theirs, inputs, labels), all global."""
    params = {name: ours(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}
    direction = {name: ours(10 + seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}
    labels = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    return params, direction, ours(20, (4, 6, 8)), labels


def shards(mesh: Any) -> tuple[Any, ...]:
    patterns = PATTERNS, PATTERNS, "batch seq embed", "batch seq"
    return tuple(
        ft.shard(value, pattern, mesh=mesh, rules=MODEL_RULES)
        for value, pattern in zip(example(), patterns, strict=True)
    )


def derivatives(mesh: Any, *given: Any) -> tuple[Any, list[Any]]:
    """(value, global gradients) of the sharded loss, and the ledger's entries."""
    params, _, x, labels = given
    with ft.record() as ledger:
        value, grads = ft.spmd(ft.value_and_grad(loss), mesh=mesh, rules=MODEL_RULES)(params, x, labels)
    return (value, ft.unshard(grads, PATTERNS, mesh=mesh, rules=MODEL_RULES)), list(ledger)


def forward_modes(mesh: DeviceMesh, *given: Any) -> list[tuple[Tensor, Tensor]]:
    """(value, derivative along the direction) by ft.jvp and by torch.func.jvp; and of some parameters alone."""
    params, direction, x, labels = given
    of = lambda some: loss({**params, **some}, x, labels)
    asked = (ft.jvp, params, direction), (torch.func.jvp, params, direction), (torch.func.jvp, *some_of(*given[:2]))
    return ft.spmd(lambda: [jvp(of, (p,), (d,)) for jvp, p, d in asked], mesh=mesh, rules=MODEL_RULES)()


def some_of(*trees: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parameters such that ops have operands, and results, both with a tangent and without."""
    return [{name: tree[name] for name in ("up", "out")} for tree in trees]


def without_torchrun() -> list[float]:
    """What a group of one gathers, on each of two meshes, before and after torch.distributed's restart."""
    rank, found = os.environ.pop("RANK"), []
    for _ in range(2):
        for sizes in ({"fsdp": 1}, {"fsdp": 1, "tp": -1}):
            transport = mesh_of(ft.make_mesh(**sizes, backend="gloo")).transport
            message = Message("all_gather", ("fsdp",), 1, (1,), torch.float32, op="test")
            found.append(transport.start(message, torch.ones(1))().item())
        dist.destroy_process_group()
    os.environ["RANK"] = rank
    return found


def missing_rank() -> tuple[str, float] | None:
    """The error of a sum that only rank 0 joins, and the seconds until it came."""
    mesh = ft.make_mesh(timeout=1.0, fsdp=2)
    if dist.get_rank() == 1:
        return None
    start = time.monotonic()
    with pytest.raises(CollectiveError) as error:
        ft.spmd(lambda x: ft.reduce("batch ->", x), mesh=mesh, rules=MODEL_RULES)(torch.ones(2))
    return str(error.value), time.monotonic() - start


def pair(x: Tensor, factor: float) -> dict[str, Any]:
    result: dict[str, Any] = {"scaled": x * factor * (1 + int(os.environ["LOCAL_RANK"]))}
    result |= {"threads": torch.get_num_threads(), "alone": without_torchrun()}
    for sizes in MESHES:
        mesh = ft.make_mesh(**sizes)
        given = shards(mesh)
        result[str(sizes)] = *derivatives(mesh, *given), forward_modes(mesh, *given)
    result["missing"] = missing_rank()  # last: gloo closes the group
    return result


@pytest.fixture(scope="module")
def of_pair() -> list[dict[str, Any]]:
    return ft.launch(pair, torch.ones(2, requires_grad=True), 3.0, nprocs=2, timeout=120)


def assert_close(actual: Any, wanted: Any) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_plain_torch(of_pair, sizes: dict[str, int]):
    params, _, x, labels = example()
    grads, value = torch.func.grad_and_value(plain_loss)(params, x, labels)
    for result in of_pair:
        assert_close(result[str(sizes)][0], (value, grads))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_true_forward_mode_is_that_of_plain_torch(of_pair, sizes: dict[str, int]):
    params, direction, x, labels = example()
    of = lambda some: plain_loss({**params, **some}, x, labels)
    some, along = some_of(params, direction)
    wanted = torch.func.jvp(of, (params,), (direction,)), torch.func.jvp(of, (some,), (along,))
    for result in of_pair:
        by_ft, by_torch, of_some = result[str(sizes)][2]
        assert_close((by_ft, by_torch, of_some), (wanted[0], *wanted))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_processes_record_the_ledger_of_the_virtual_mesh(of_pair, sizes: dict[str, int]):
    virtual = ft.simulate(**sizes)(lambda mesh: derivatives(mesh, *shards(mesh)))()
    assert len(virtual[0][1]) > 3
    assert [result[str(sizes)][1] for result in of_pair] == [entries for _, entries in virtual]


def test_make_mesh_without_torchrun_is_one_process_and_may_be_made_again(of_pair):
    assert [result["alone"] for result in of_pair] == [[1.0] * 4] * 2


def test_a_missing_rank_ends_a_collective_with_op_and_pattern(of_pair):
    text, seconds = of_pair[0]["missing"]
    for part in ("process 0 in all_reduce over fsdp of float32[]", "'reduce' 'batch ->'", "Timed out", "Fix:"):
        assert part in text
    assert 0.5 < seconds < 10  # asked for 1; the machine may be busy, half an hour is gloo's own


# --- launch ---------------------------------------------------------------------------------------------------------


def fail(rank: str) -> str:
    """Raise on one rank; the others wait in a collective for it."""
    if os.environ["RANK"] == rank:
        raise KeyError("flour")
    ft.make_mesh(dp=2)
    return "not reached"


def die(rank: str) -> None:
    if os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_launch_gives_results_by_rank(of_pair):
    first, second = (result["scaled"].detach() for result in of_pair)
    assert_close([first, second], [torch.full((2,), 3.0), torch.full((2,), 6.0)])
    assert of_pair[0]["threads"] == max(1, (os.cpu_count() or 1) // 2)
    assert not multiprocessing.active_children()


def test_launch_raises_the_error_of_the_rank_that_failed():
    with pytest.raises(KeyError, match="flour") as error:
        ft.launch(fail, "1", nprocs=2)
    (note,) = error.value.__notes__
    assert "on rank 1 of 2" in note and "in fail" in note
    assert not multiprocessing.active_children()


def test_launch_ends_all_when_one_is_killed():
    with pytest.raises(CollectiveError, match="rank 0 ended without a result: killed by SIGKILL"):
        ft.launch(die, "0", nprocs=2)
    assert not multiprocessing.active_children()


def test_launch_ends_all_when_time_is_over():
    with pytest.raises(CollectiveError, match=r"ranks \[0, 1\] did not finish within 0.5 s"):
        ft.launch(sleep, 600, nprocs=2, timeout=0.5)
    assert not multiprocessing.active_children()


def test_launch_checks_before_it_starts_anything():
    with pytest.raises(FunctitanError) as error:
        ft.launch(lambda: None, iter(()), (x for x in ()), nprocs=0)
    text = str(error.value)
    for part in ("nprocs is 0", "the function cannot be sent", "the arguments cannot be sent", "top level of a module"):
        assert part in text
