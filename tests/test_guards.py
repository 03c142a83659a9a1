"""Ranks that part ways, values that pass as equal and are not, NaN and infinity: an error that says so, on every rank.

Cheapest first: agreement on a store of this process; the virtual mesh; two gloo processes, whose end nobody watches.
"""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.distributed as dist

import functitan as ft
from functitan.sharding.agreement import agreement
from functitan.sharding.context import current

RULES = ft.AxisRules({"batch": ("dp", "fsdp"), "mlp": "tp", "seq": "tp", "embed": "fsdp", "head": None})


def line_of(fn: Any, below: int = 1) -> str:
    """As errors write it: the line that stands `below` the head of a function."""
    return f"tests/test_guards.py:{fn.__code__.co_firstlineno + below}"


# --- agreement: threads, and a store of this process ----------------------------------------------------------------


def meet(programs: list[list[str]], timeout: float = 30.0, store: Any = None) -> list[str]:
    """Each rank agrees to its programs, one after the other; the text of its error, or ''.

    After a "!" it does not wait, before a "~" it sleeps for two timeouts.
    """
    store, ends = store or dist.HashStore(), [""] * len(programs)

    def rank(me: int) -> None:
        agree = agreement(store, "test", me, range(len(programs)), timedelta(seconds=timeout))
        try:
            for program in programs[me]:
                time.sleep(2 * timeout if program.startswith("~") else 0)
                agree(program.strip("!~"), wait=not program.endswith("!"))
        except ft.CollectiveError as error:
            ends[me] = str(error)

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_ranks_that_agree_go_on_and_the_store_does_not_grow():
    counts = []
    for rounds in (2, 40):
        store = dist.HashStore()
        assert meet([[f"runs {i}" for i in range(rounds)]] * 3, store=store) == [""] * 3
        counts.append(store.num_keys())
    assert counts[0] == counts[1]


def test_agreements_made_again_in_one_store_start_anew():
    store = dist.HashStore()
    assert meet([["runs a"], ["runs b"]], store=store) != ["", ""]
    assert meet([["runs c"], ["runs c"]], store=store) == ["", ""]


def test_all_ranks_are_told_of_two_programs_that_differ():
    ends = meet([["runs a", "runs b"], ["runs a", "runs c"], ["runs a", "runs b"]])
    assert len(set(ends)) == 1  # of ranks 0 and 2, the one that came first is held against rank 1
    assert re.sub(r"- rank 1 runs c\n  - rank 2 runs b", "- rank 0 runs b\n  - rank 1 runs c", ends[0]) == dedent("""\
        ranks of one group run different programs:
          - rank 0 runs b
          - rank 1 runs c
          Fix: every rank runs the same ops in the same order""")


def test_a_rank_that_fails_does_not_wait_for_the_others_and_they_are_told():
    ends = meet([["runs a", "runs b"], ["runs a", "raises KeyError: 'flour'!"]])
    assert ends == [
        dedent("""\
            ranks of one group run different programs:
              - rank 0 runs b
              - rank 1 raises KeyError: 'flour'
              Fix: every rank runs the same ops in the same order"""),
        "",
    ]


def test_a_rank_that_does_not_come_is_named_with_what_it_did_last():
    first, second, _ = meet([["runs a", "runs b"], ["runs a"], []], timeout=0.5)
    assert first == second and first.splitlines()[1] == "  - rank 2 did not join within 0.5 s"
    ends = meet([["runs a", "runs b"], ["runs a"]], timeout=0.5)
    assert ends[0] == dedent("""\
        rank 0 waited in b:
          - rank 1 did not join within 0.5 s; its last: a
          Fix: every rank runs the same ops in the same order""")


def test_a_rank_that_comes_after_the_timeout_hears_what_was_decided_without_it():
    assert (
        meet([["runs a"], ["~runs a"]], timeout=0.4)
        == [
            dedent("""\
            rank 0 waited in a:
              - rank 1 did not join within 0.4 s
              Fix: every rank runs the same ops in the same order""")
        ]
        * 2
    )


def test_a_store_that_is_gone_is_an_error_of_its_own():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    agree = agreement(client, "test", 0, [0], timedelta(seconds=5))
    agree("runs a")
    del server
    with pytest.raises(ft.CollectiveError) as error:
        agree("runs b")
    first, second, _ = str(error.value).splitlines()
    assert first == "rank 0 waited in b:"
    assert second.startswith("  - torch.distributed's store does not answer: ")


# --- programs: the virtual mesh -------------------------------------------------------------------------------------


def same(x):
    return ft.reduce("batch ->", x)


def other_line(x):
    return ft.reduce("batch ->", x)


def other_group(x):
    return ft.reduce("mlp ->", x)


def other_op(x):
    return ft.reduce("batch ->", x, op="max")


def nothing(x):
    return x


def fail(x):
    raise KeyError("flour")


SUM = "runs all_reduce-sum over fsdp of float32[] for 'reduce' 'batch ->' in forward"
PROGRAMS = {  # what odd ranks do, and how the error says it; even ranks run `same`
    "another line": (other_line, f"{SUM} at {line_of(other_line)}"),
    "another group": (
        other_group,
        f"runs all_reduce-sum over tp of float32[] for 'reduce' 'mlp ->' in forward at {line_of(other_group)}",
    ),
    "another op": (
        other_op,
        f"runs all_reduce-max over fsdp of float32[] for 'reduce' 'batch ->' in forward at {line_of(other_op)}",
    ),
    "nothing": (nothing, "runs the end of ft.checked(branch)"),
}


def parted(of_others: Any, wrap: Any, **mesh: int) -> Exception:
    """The error when ranks with odd numbers run another function."""

    def rank(mesh):
        def branch(x):
            return (of_others if mesh.rank % 2 else same)(x)

        branch.__qualname__ = "branch"
        return ft.spmd(wrap(branch), mesh=mesh, rules=RULES)(torch.ones(2))

    start = time.monotonic()
    with pytest.raises(Exception) as error:
        ft.simulate(timeout=60.0, **mesh)(rank)()
    assert time.monotonic() - start < 30, "a rank waited for its timeout"
    return error.value


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs_that_differ_are_named_with_their_lines(case: str):
    of_others, does = PROGRAMS[case]
    text = str(parted(of_others, ft.checked, fsdp=2, tp=2))
    assert text == dedent(f"""\
        ranks of one group run different programs:
          - rank 0 {SUM} at {line_of(same)}
          - rank 1 {does}
          - rank 2 {SUM} at {line_of(same)}
          - rank 3 {does}
          Fix: every rank runs the same ops in the same order""")


def test_a_rank_that_fails_while_checked_is_raised():
    error = parted(fail, ft.checked, fsdp=2, tp=2)
    assert isinstance(error, KeyError) and error.__notes__ == ["on virtual rank 1, coordinate {'fsdp': 0, 'tp': 1}"]


def twice(x):
    first = ft.constrain("head -> embed", x)
    return first, ft.constrain("head -> embed", x)


def test_backward_is_checked_on_a_thread_without_context_and_names_the_line_of_the_op():
    def rank(mesh):
        x, errors = torch.ones(2, requires_grad=True), []
        mine = ft.spmd(ft.checked(twice), mesh=mesh, rules=RULES)(x)[mesh.rank]

        def back():
            assert current().mesh is None
            try:
                mine.sum().backward()
            except ft.CollectiveError as error:
                errors.append(error)

        thread = threading.Thread(target=back)
        thread.start()
        thread.join()
        raise errors[0]

    with pytest.raises(ft.CollectiveError) as error:
        ft.simulate(fsdp=2)(rank)()
    gather = "all_gather over fsdp of float32[1] for 'constrain' 'head -> embed' in backward"
    assert str(error.value) == dedent(f"""\
        ranks of one group run different programs:
          - rank 0 runs {gather} at {line_of(twice)}
          - rank 1 runs {gather} at {line_of(twice, 2)}
          Fix: every rank runs the same ops in the same order""")


def test_pipeline_stages_may_run_different_programs():
    def rank(mesh):
        stage = same if mesh.coordinate[0] else other_line
        return ft.spmd(ft.checked(stage), mesh=mesh, rules=RULES)(torch.ones(2))

    assert ft.simulate(pp=2, fsdp=2)(rank)() == [4.0] * 4


def test_checks_are_not_in_the_ledger_and_change_nothing():
    def rank(mesh, wrap):
        with ft.record() as ledger:
            out = ft.spmd(wrap(ft.grad(lambda x: same(x) ** 2)), mesh=mesh, rules=RULES)(torch.ones(2))
        return out.tolist(), list(ledger)

    plain, wrapped = (ft.simulate(fsdp=2)(rank)(wrap) for wrap in (lambda fn: fn, ft.checked))
    assert plain == wrapped and len(plain[0][1]) == 1


# --- equal values: the virtual mesh ---------------------------------------------------------------------------------

X = torch.arange(1.0, 97.0).view(4, 4, 6) / 50
DECLARED = {
    "scale": ft.Param("embed", (6,)),
    "up": ft.Param("embed mlp", (6, 4)),
    "down": ft.Param("mlp embed", (4, 6)),
}
TP = ft.AxisRules({"batch": "dp", "seq": "tp", "mlp": "tp", "embed": None})
UP, DOWN = "batch seq embed, embed mlp -> batch seq mlp", "batch seq mlp, mlp embed -> batch seq embed"


def right(params, x, key):
    x = x * ft.broadcast("embed -> batch seq embed", params["scale"])
    y = ft.einsum(DOWN, ft.einsum(UP, x, params["up"]).tanh(), params["down"])
    return ft.reduce("batch seq embed ->", y**2), ft.reduce("batch seq embed ->", torch.ones_like(y))


def scale_unnamed(params, x, key):
    x = x * params["scale"]
    y = ft.einsum(DOWN, ft.einsum(UP, x, params["up"]).tanh(), params["down"])
    return ft.reduce("batch seq embed ->", y**2), ft.count("batch seq embed", y)


def matmul_unnamed(params, x, key):
    y = ft.broadcast("embed -> batch seq embed", params["scale"]) * x @ torch.outer(params["scale"], params["scale"])
    return ft.reduce("batch seq embed ->", y**2), ft.count("batch seq embed", y)


def sum_unnamed(params, x, key):
    y = ft.einsum(DOWN, ft.einsum(UP, x, params["up"]).tanh(), params["down"])
    return (y**2).sum(), ft.count("batch seq embed", y)


def count_unnamed(params, x, key):
    y = ft.einsum(DOWN, ft.einsum(UP, x, params["up"]).tanh(), params["down"])
    return ft.reduce("batch seq embed ->", y**2), (y > 0).sum()


def mean_unnamed(params, x, key):
    y = ft.einsum(DOWN, ft.einsum(UP, x, params["up"]).tanh(), params["down"])
    return ft.reduce("batch ->", y.mean((1, 2)) ** 2), ft.count("batch", x[:, 0, 0])


SCALARS = "a plain sum or mean ran over a sharded axis: name its axes, as in ft.reduce('batch seq ->', x)"
GRADIENTS = (
    "a parameter met a plain torch op, and its gradient lacks a sum over ranks: "
    "write ft.broadcast('embed -> batch seq embed', scale) for x * scale, ft.einsum for a product"
)
OF_SCALE = "gradients.scale: 'embed', float32[6], differs"
BY_DP, BY_TP = (f"differs along {dim} by N of its norm" for dim in ("dp", "tp"))
MISTAKES = [  # (loss function, mesh, what differs, the fix); N stands for a number
    (scale_unnamed, dict(dp=2), [f"{OF_SCALE} along dp by N of its norm"], GRADIENTS),
    (scale_unnamed, dict(tp=2), [f"{OF_SCALE} along tp by N of its norm"], GRADIENTS),
    (
        matmul_unnamed,
        dict(dp=2, tp=2),
        [f"{OF_SCALE} along dp by N of its norm and along tp by N of its norm"],
        GRADIENTS,
    ),
    (sum_unnamed, dict(tp=2), [f"loss: float32[], {BY_TP}"], SCALARS),
    (count_unnamed, dict(dp=2), [f"loss: float32[], {BY_DP}", f"count: float32[], {BY_DP}"], SCALARS),
    (mean_unnamed, dict(tp=2), [f"loss: float32[], {BY_TP}"], SCALARS),
]


def one_step(loss, sizes, **options):
    """A step of `loss` on a virtual mesh; what each rank gives."""
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(loss, tx, **options)

    def rank(mesh):
        state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=TP)
        local = ft.shard(X, "batch seq embed", mesh=mesh, rules=TP)
        with ft.record() as ledger:
            return step(step(state, local)[0], local)[1]["loss"].item(), [entry.op for entry in ledger]

    return ft.simulate(**sizes)(rank)()


@pytest.mark.parametrize(("loss", "sizes", "lines", "fix"), MISTAKES)
def test_a_plain_op_where_a_named_one_is_missing_is_found_in_the_first_step(loss, sizes, lines, fix):
    with pytest.raises(ft.ReplicationError) as error:
        one_step(loss, sizes)
    text = re.sub(r"by [\d.e+-]+ of", "by N of", str(error.value))
    assert text == ft.errors.report("ft.train_step", lines, fix)
    one_step(loss, sizes, check=False)


@pytest.mark.parametrize("sizes", [dict(dp=2), dict(dp=2, tp=2)], ids=str)
def test_named_ops_pass_with_the_same_loss_and_ledger_checked_or_not(sizes):
    first, always, never = (one_step(right, sizes, check=check) for check in ("first", True, False))
    assert first == always == never
    assert "check_equal" not in first[0][1]


@pytest.mark.parametrize("check", ["first", False])
def test_compiled_functions_of_ranks_that_part_ways_are_compared_before_they_run(check):
    def parts(params, x, key):
        whole = lambda x: ft.reduce("batch seq embed ->", x)
        more = ft.compile(lambda x: whole(x * whole(x)) if current().mesh.rank else whole(x), backend="graph")
        total, count = right(params, x, key)
        return total + more(x), count

    with pytest.raises(ft.CollectiveError) as error:
        one_step(parts, dict(dp=2), check=check)
    assert ("of its graph" in str(error.value)) == bool(check)


@pytest.mark.parametrize("check", ["first", False])
def test_captured_steps_of_ranks_that_part_ways_are_compared_before_the_first_runs(check):
    def parts(params, x, key):
        total, count = right(params, x, key)
        return total + (ft.reduce("batch seq embed ->", x).exp() if current().mesh.rank else 0), count

    def steps(loss):
        def rank(mesh):
            tx = ft.optim.sgd(0.1)
            step = ft.jit(ft.train_step(loss, tx, check=check), donate=0, backend="graph")
            state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=TP)
            local = ft.shard(X, "batch seq embed", mesh=mesh, rules=TP)
            if mesh.rank == 0:
                step.graph(state, local)  # which one rank may look at
            return step(step(state, local)[0], local)[1]["loss"].item()

        return ft.simulate(dp=2)(rank)()

    assert len({*steps(right)}) == 1
    with pytest.raises(ft.CollectiveError) as error:
        steps(parts)
    assert (" of its graph" in str(error.value)) == bool(check)


@pytest.mark.parametrize(("check", "found"), [("first", False), (True, True), (False, False)])
def test_a_mistake_of_the_second_step_is_found_when_all_are_checked(check, found):
    def rank(mesh):
        left, tx = [right, sum_unnamed], ft.optim.sgd(0.1)
        step = ft.train_step(lambda *args: left.pop(0)(*args), tx, check=check)
        state = ft.TrainState.create(DECLARED, tx, ft.random.key(0), mesh=mesh, rules=TP)
        local = ft.shard(X, "batch seq embed", mesh=mesh, rules=TP)
        state, _ = step(state, local)
        try:
            step(state, local)
        except ft.ReplicationError:
            return True
        return False

    assert ft.simulate(dp=2)(rank)() == [found] * 2


def differ(of_rank, patterns, sizes, rules=TP) -> str:
    """The text of what `check_equal` finds in the tree that each rank makes, or ''."""

    def rank(mesh):
        try:
            ft.spmd(ft.check_equal, mesh=mesh, rules=rules)(of_rank(mesh), patterns)
        except ft.ReplicationError as error:
            return re.sub(r"by (?!1 of)[\d.e+-]+ of", "by N of", str(error))
        return ""

    (text,) = set(ft.simulate(**sizes)(rank)())  # the same on every rank
    return text


VALUES = torch.randn(700_000, generator=torch.Generator().manual_seed(0))  # some chunks of the digest
UNEQUAL = {  # how rank 1's leaf differs: (the leaf, what follows its pattern and shape)
    "one value in many": (VALUES.clone().index_fill_(0, torch.tensor([5]), 40.0), "by N of its norm"),
    "two values exchanged": (VALUES.clone().roll(1), "by N of its norm"),
    "the sign": (-VALUES, "by N of its norm"),
    "NaN": (VALUES.clone().index_fill_(0, torch.tensor([5]), torch.nan), ", where some ranks have NaN or infinity"),
    "whole numbers": (VALUES.to(torch.int64).index_fill_(0, torch.tensor([5]), 40), "by N of its norm"),
    "complex": (torch.complex(VALUES, -VALUES), "by N of its norm"),
    "bfloat16": (VALUES.bfloat16().flip(0), "by N of its norm"),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_leaves_that_differ_are_named(case):
    odd, how = UNEQUAL[case]
    even = torch.complex(VALUES, VALUES) if odd.is_complex() else VALUES.to(odd.dtype)
    text = differ(lambda mesh: {"a": VALUES, "b": [odd if mesh.rank else even]}, "embed", dict(tp=2))
    leaf = f"{str(odd.dtype).removeprefix('torch.')}[700000], differs along tp"
    assert text == ft.errors.report(
        "ft.check_equal",
        [f"b.0: 'embed', {leaf}{how if how[0] == ',' else ' ' + how}"],
        "sum what is partial by ft.reduce, or give the pattern whose axes are sharded; "
        "start all ranks from the same key",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_in_another_order_are_equal(dtype):
    """Rounding, nowhere more than a few units in the last place, and a leaf that is nothing but what rounding left."""
    eps = torch.finfo(dtype).eps

    def of_rank(mesh):
        noise = torch.randn(len(VALUES), generator=torch.Generator().manual_seed(mesh.rank))
        return {"sum": (VALUES * (1 + 2 * eps * noise)).to(dtype), "cancels": (eps / 4 * noise).to(dtype)}

    assert differ(of_rank, None, dict(tp=2)) == ""


def test_shards_may_differ_and_every_rank_hears_of_one_replica_that_differs():
    assert differ(lambda mesh: torch.ones(2) * mesh.coordinate[1], "seq", dict(dp=2, tp=2)) == ""
    assert differ(lambda mesh: torch.ones(2) * mesh.coordinate[0], "seq", dict(pp=2, tp=2)) == ""  # of other stages
    text = differ(lambda mesh: torch.ones(1) * (mesh.rank == 3), "seq", dict(dp=2, tp=2))
    assert text.splitlines()[1] == "  - : 'seq', float32[1], differs along dp by 1 of its norm"
