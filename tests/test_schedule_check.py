"""Laws of the checker: what is broken is rejected, with rank, stage and action; CSV files, bad input and the search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipelining import torch_schedule

import functitan as ft
from functitan.pipeline.named import NAMES
from functitan.pipeline.placement import v_shape
from functitan.testing.strategies import pipeline_schedules


def make(name: str = "1f1b", ranks: int = 2, stages: int = 1, microbatches: int = 3) -> ft.pipeline.Schedule:
    return ft.pipeline.schedule(name, num_stages=ranks * stages, num_microbatches=microbatches, num_ranks=ranks)


def edited(schedule, rank, edit):
    """The schedule with the list of one rank's actions changed by a function of it."""
    order = list(schedule.actions[rank])
    edit(order)
    return replace(schedule, actions=(*schedule.actions[:rank], tuple(order), *schedule.actions[rank + 1 :]))


def fails(schedule, *texts: str, **options) -> None:
    with pytest.raises(ft.ScheduleError) as error:
        schedule.check(**options)
    assert all(text in str(error.value) for text in (*texts, "Fix: ")), str(error.value)


@given(pipeline_schedules(), st.data())
def test_a_missing_action_is_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    i = data.draw(st.integers(0, len(schedule.actions[rank]) - 1))
    kind, stage, m = schedule.actions[rank][i]
    assume(kind != "RESHARD")  # what is never freed is no fault
    name = {"UNSHARD": f"needs {stage}UNSHARD", "REDUCE_GRAD": "REDUCE_GRAD is there 0 times"}
    name |= {k: f"{k} of microbatch {m}" for k in "FBIW"} | {"B": f"B of microbatch {m}, or I and W, is missing"}
    fails(
        edited(schedule, rank, lambda order: order.pop(i)),
        f"rank {rank}, stage {stage}",
        name.get(kind, f"{stage}{kind}{m} is missing"),
    )


@given(pipeline_schedules(), st.data())
def test_a_doubled_action_is_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    i = data.draw(st.integers(0, len(schedule.actions[rank]) - 1))
    action = schedule.actions[rank][i]
    texts = {"UNSHARD": "gathers what is gathered", "RESHARD": "frees what is not gathered"}
    text = texts.get(action.kind, "is there 2 times")
    fails(edited(schedule, rank, lambda order: order.insert(i, action)), f"rank {rank}, stage {action.stage}", text)


@given(pipeline_schedules(), st.data())
def test_an_action_on_another_rank_is_named(schedule, data):
    assume(schedule.num_ranks > 1)
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    action = data.draw(st.sampled_from(schedule.actions[rank]))
    other = (rank + 1) % schedule.num_ranks
    moved = edited(edited(schedule, rank, lambda o: o.remove(action)), other, lambda o: o.append(action))
    fails(moved, f"rank {other}, stage {action.stage}", f"{action} is on this rank, and its stage lives on rank {rank}")


@given(pipeline_schedules(), st.data())
def test_actions_against_their_dependencies_are_named(schedule, data):
    """F and backward of one microbatch in one stage change places, and so does all that stands between them."""
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = schedule.actions[rank]
    i = data.draw(st.sampled_from([i for i, action in enumerate(order) if action.kind == "F"]))
    j = next(j for j, action in enumerate(order) if action.kind in "IB" and action[1:] == order[i][1:])

    def swap(order):
        order[i], order[j] = order[j], order[i]

    fails(edited(schedule, rank, swap), f"rank {rank}, stage {order[i].stage}, action {i}: {order[j]} stands before")


@given(pipeline_schedules(max_stages_per_rank=1), st.data())
def test_sends_and_receives_in_other_orders_are_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = schedule.actions[rank]
    pairs = [
        (i, j)
        for i, first in enumerate(order)
        for j in range(i + 1, len(order))
        if first.kind == order[j].kind and first.stage == order[j].stage and first.kind in ("SEND_F", "SEND_B")
    ]
    assume(pairs)
    i, j = data.draw(st.sampled_from(pairs))

    def swap(order):
        order[i], order[j] = order[j], order[i]

    fails(edited(schedule, rank, swap), f"rank {rank}, stage {order[i].stage}", "stands before")


def test_receives_out_of_order_are_named():
    early = edited(make("gpipe"), 1, lambda order: order.insert(0, order.pop(order.index(("RECV_F", 1, 1)))))
    fails(early, "rank 1, stage 1: 1RECV_F1 is the receive number 0 from rank 0, which sends 0SEND_F0 as number 0")


def test_ranks_that_wait_for_each_other_are_named():
    """Each rank alone is in order; together stage 1 wants microbatch 1 first and stage 0 its gradient of 0 first."""
    first = [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)]
    second = [("F", 1, 1), ("B", 1, 1), ("F", 1, 0), ("B", 1, 0)]
    with pytest.raises(ft.ScheduleError) as error:
        ft.pipeline.from_actions([first, second])
    for text in ("rank 0, stage 0", "0B0 waits forever for 1SEND_B0 of rank 1", "rank 1, stage 1", "1F1 waits forever"):
        assert text in str(error.value)


def test_two_sends_that_meet_need_a_buffer():
    """Each rank sends before it posts: it takes room for a message that nobody has asked for yet."""
    a = [("F", 0, 0), ("SEND_F", 0, 0), ("F", 0, 1), ("SEND_F", 0, 1), ("RECV_B", 0, 0), ("B", 0, 0), ("RECV_B", 0, 1)]
    b = [("RECV_F", 1, 0), ("F", 1, 0), ("B", 1, 0), ("SEND_B", 1, 0), ("RECV_F", 1, 1), ("F", 1, 1), ("B", 1, 1)]
    s = ft.pipeline.from_actions([[*a, ("B", 0, 1)], [*b, ("SEND_B", 1, 1)]])
    fails(s, "rank 0, stage 0", "0SEND_F1 waits forever for 1RECV_F1 of rank 1", "1SEND_B0 waits forever for 0RECV_B0")
    s.check(buffers=1)


@pytest.mark.parametrize(
    ("rank", "edit", "text"),
    [
        (0, lambda o: o.append(ft.pipeline.Action("G", 0, 0)), "rank 0, stage 0, action 15: 0G0 has the kind 'G'"),
        (0, lambda o: o.append(ft.pipeline.Action("F", 7, 0)), "rank 0, stage 7, action 15: 7F0 is of a stage"),
        (1, lambda o: o.append(ft.pipeline.Action("F", 1, 3)), "rank 1, stage 1, action 15: 1F3 has the microbatch 3"),
        (1, lambda o: o.append(ft.pipeline.Action("SEND_F", 1, 0)), "1SEND_F0 is of no use"),
        (0, lambda o: o.insert(0, o.pop()), "action 0: REDUCE_GRAD stands before 0B2"),
    ],
)
def test_other_faults_are_named(rank, edit, text):
    fails(edited(make(), rank, edit), text)


def test_whole_and_split_backward_of_one_microbatch_are_one_too_many():
    both = edited(make(), 0, lambda o: o.insert(o.index(("B", 0, 1)) + 1, ft.pipeline.Action("W", 0, 1)))
    fails(both, "rank 0, stage 0: W of microbatch 1 is there beside B, which is I and W")
    half = edited(make("zero_bubble_h1"), 1, lambda o: o.remove(("W", 1, 2)))
    fails(half, "rank 1, stage 1: W of microbatch 2 is missing")


def test_all_failures_are_listed_at_once():
    def drop(order):
        order.remove(("B", 0, 1))
        order.remove(("SEND_F", 0, 2))

    fails(edited(make(), 0, drop), "B of microbatch 1", "0SEND_F2 is missing", "0RECV_B1 is of no use")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compute_only", [False, True])
def test_a_csv_file_holds_the_whole_schedule(name, compute_only, tmp_path):
    s = make(name, 2, NAMES[name].stages_per_rank or 2, 4)
    ft.pipeline.write_csv(s, path := tmp_path / f"{name}.csv", compute_only)
    assert ft.pipeline.read_csv(path) == s


@given(pipeline_schedules())
@settings(max_examples=20)
def test_a_csv_file_holds_any_schedule(tmp_path_factory, schedule):
    path = tmp_path_factory.mktemp("csv") / "random.csv"
    ft.pipeline.write_csv(schedule, path)
    assert ft.pipeline.read_csv(path) == schedule


@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("name", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_files_of_torch_are_read_and_ours_are_read_by_torch(name, form, tmp_path):
    s = make(name, 2, 2, 4)
    theirs = torch_schedule(name, 4, 4, 2)
    theirs._dump_csv(path := tmp_path / "theirs.csv", format=form)
    read = ft.pipeline.read_csv(path)
    assert [read.compute(rank) for rank in range(2)] == [s.compute(rank) for rank in range(2)]
    if name != "dualpipev" or form == "compute_only":  # torch overlaps what we do one after the other
        ft.pipeline.write_csv(s, path := tmp_path / "ours.csv", compute_only=form == "compute_only")
        theirs._load_csv(path, format=form)
        sent = [a for order in s.actions for a in order if a.kind == "SEND_F"]
        assert sum(str(a) in map(str, sent) for o in theirs.pipeline_order_with_comms.values() for a in o) == len(sent)


def test_a_csv_file_with_a_missing_action_names_it(tmp_path):
    ft.pipeline.write_csv(make(ranks=2, microbatches=4), path := tmp_path / "s.csv", compute_only=True)
    path.write_text(path.read_text().replace("1B2,", ""))
    with pytest.raises(ft.ScheduleError) as error:
        ft.pipeline.read_csv(path)
    assert "rank 1, stage 1: B of microbatch 2, or I and W, is missing" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0X0,0B0\n", "rank 0 (row 1), cell 2: '0X0' is no action"),
        ("0F0,0B0,0UNSHARD3\n", "rank 0 (row 1), cell 3: '0UNSHARD3' is no action"),
        ("0F0,0B0\n1F0,F1\n", "rank 1 (row 2), cell 2: 'F1' is no action"),
        ("", "it has no actions"),
        ("0F0,0B0,2F0,2B0\n", "stage 1: no rank has an action of it"),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1,0F1\n", "rank 1, stage 0, action 4: 0F1 is on this rank"),
    ],
)
def test_bad_csv_files_are_explained(text, message, tmp_path):
    (path := tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ft.ScheduleError) as error:
        ft.pipeline.read_csv(path)
    assert message in str(error.value)


def test_a_file_may_be_held_to_its_sizes(tmp_path):
    ft.pipeline.write_csv(make(microbatches=2), path := tmp_path / "s.csv", compute_only=True)
    for sizes, text in (
        (dict(num_microbatches=3), "F of microbatch 2 is missing"),
        (dict(num_stages=3), "stage 2: no"),
    ):
        with pytest.raises(ft.ScheduleError, match=text):
            ft.pipeline.read_csv(path, **sizes)


COSTS = [{}, dict(forward=1, input=1.3, weight=0.6), dict(forward=[1, 1, 1, 2], input=[1, 1, 1, 1.5], weight=1)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("cap", [1, 3, 4, None])
def test_search_keeps_the_cap_and_no_named_schedule_beats_it(cost, cap):
    sizes = dict(num_stages=4, num_microbatches=6, num_ranks=4)
    found = ft.pipeline.search(**sizes, **cost, max_activations=cap, trials=60)
    found.check()
    assert cap is None or max(found.peak_activations()) <= cap
    for name in ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble_h1"):
        try:
            named = ft.pipeline.schedule(name, **sizes)
        except ft.ScheduleError:
            continue
        if cap is None or max(named.peak_activations()) <= cap:
            # times rounded to 9 digits are compared in the search
            assert found.bubble_fraction(**cost) <= named.bubble_fraction(**cost) + 1e-8


def test_search_takes_less_memory_for_more_time():
    sizes = dict(num_stages=4, num_microbatches=4, num_ranks=2, stage_rank=v_shape(4, 2), trials=40)
    times = [ft.pipeline.search(**sizes, max_activations=cap).bubble_fraction() for cap in (2, 3, 4)]
    assert times[0] > times[1] > times[2]
    assert times[2] == pytest.approx(make("zbv", 2, 2, 4).bubble_fraction())  # the least that is possible


def test_search_is_the_same_for_the_same_seed():
    sizes = dict(num_stages=3, num_microbatches=4, num_ranks=3, forward=1.5, weight=0.7, trials=40)
    assert ft.pipeline.search(**sizes, seed=3) == ft.pipeline.search(**sizes, seed=3)


def test_a_cap_that_is_impossible_is_named():
    with pytest.raises(ft.ScheduleError) as error:
        ft.pipeline.search(num_stages=4, num_microbatches=2, num_ranks=2, max_activations=1)
    for rank, stages in ((0, [0, 2]), (1, [1, 3])):
        assert f"rank {rank} must hold 2 activations, of one microbatch in its stages {stages}" in str(error.value)
