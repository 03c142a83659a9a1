"""Laws of pipeline schedules: every named one is valid, costs what its paper says, and is torch's own."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from pipelining import torch_orders

import functitan as ft
from functitan.pipeline.named import NAMES
from functitan.testing.strategies import pipeline_schedules

SIZES = [  # (name, ranks, stages per rank, microbatches)
    (name, ranks, stages, microbatches)
    for name, kind in NAMES.items()
    for ranks in (1, 2, 3, 4)
    for stages in ((kind.stages_per_rank,) if kind.stages_per_rank else (1, 2, 3))
    for microbatches in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12)
    if not (kind.whole_rounds and microbatches % ranks)
]


def make(name: str, ranks: int, stages: int, microbatches: int) -> ft.pipeline.Schedule:
    return ft.pipeline.schedule(name, num_stages=ranks * stages, num_microbatches=microbatches, num_ranks=ranks)


def by_name(sizes: list) -> list:
    names = sorted({size[0] for size in sizes})
    return [pytest.param([size for size in sizes if size[0] == name], id=name) for name in names]


@pytest.mark.parametrize("sizes", by_name(SIZES))
def test_every_named_schedule_passes_the_check_without_buffers(sizes):
    for size in sizes:
        make(*size).check(buffers=0)


@pytest.mark.parametrize("sizes", by_name(SIZES))
def test_compute_is_that_of_torch(sizes):
    compared = 0
    for name, ranks, stages, microbatches in sizes:
        ours = make(name, ranks, stages, microbatches)
        try:
            theirs = torch_orders(name, ranks * stages, microbatches, ranks)
        except ValueError:  # sizes that torch does not take
            continue
        assert [list(ours.compute(rank)) for rank in range(ranks)] == theirs, (name, ranks, stages, microbatches)
        compared += 1
    assert compared >= len(sizes) // 4


def bubble(useful: float, idle: float) -> float:
    return float(Fraction(idle) / (Fraction(useful) + Fraction(idle)))


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_bubbles_are_those_of_the_papers(p, rounds):
    """Unit costs of F, I and W; a rank works 3 m v, and these are the times it waits."""
    m = p * rounds
    published = {
        ("gpipe", 1): 3 * (p - 1),  # GPipe and PipeDream: (p - 1) (F + B)
        ("1f1b", 1): 3 * (p - 1),
        ("interleaved_1f1b", 2): 3 * (p - 1),  # Megatron-LM: the same number of smaller chunks, so 1/v of the time
        ("interleaved_1f1b", 3): 3 * (p - 1),
        ("looped_bfs", 2): 3 * (p - 1),
        ("zero_bubble_h1", 1): p - 1,  # Zero Bubble, table 2: (p - 1) (F + I - W)
        ("interleaved_zero_bubble", 2): p - 1,
        ("zbv", 2): p - 1,  # none but that of the first microbatch on its way
    }
    for (name, v), idle in published.items():
        # a sum of at most 100 unit costs is exact; the quotient rounds in its last digit
        assert make(name, p, v, m).bubble_fraction() == pytest.approx(bubble(3 * m * v, idle), rel=1e-12), name
    # DualPipe: (p - 1) (F + B + B - 3 W) of a forward and a backward that share their time; ours may take them apart
    assert make("dualpipev", p, 2, m).bubble_fraction() <= bubble(6 * m, 2 * (p - 1))


@pytest.mark.parametrize("m", range(4, 18))
def test_flexible_interleaving_costs_the_same_for_any_number_of_microbatches(m):
    for v in (2, 3):
        expected = bubble(3 * m * v, 3 * (4 - 1))
        assert make("flexible_interleaved_1f1b", 4, v, m).bubble_fraction() == pytest.approx(expected, rel=1e-12)


def test_zbv_never_waits_once_begun():
    s = make("zbv", 4, 2, 8)
    for rank, times in enumerate(s.timeline()):
        spans = [span for action, span in zip(s.actions[rank], times, strict=True) if action in s.compute(rank)]
        assert spans[-1][1] - spans[0][0] == 3 * 2 * 8


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 8), (4, 16)])
def test_interleaved_beats_1f1b_and_zero_bubble_beats_both(p, m):
    plain = make("1f1b", p, 1, m).bubble_fraction()
    interleaved = make("interleaved_1f1b", p, 2, m).bubble_fraction()
    zero = make("interleaved_zero_bubble", p, 2, m).bubble_fraction()
    assert zero < interleaved < plain
    assert make("zero_bubble_h1", p, 1, m).bubble_fraction() < plain
    assert make("zbv", p, 2, m).bubble_fraction() < interleaved


def test_peak_activations_are_those_of_the_papers():
    p, m = 4, 8
    assert make("gpipe", p, 1, m).peak_activations() == (m,) * p
    assert make("1f1b", p, 1, m).peak_activations() == (4, 3, 2, 1)
    assert make("zero_bubble_h1", p, 1, m).peak_activations() == (p,) * p
    assert make("zbv", p, 2, m).peak_activations() == (2 * p,) * p  # of half the size: no more than 1F1B's first rank
    assert make("zero_bubble_h1", p, 1, m).peak_activations(kept=0) == make("1f1b", p, 1, m).peak_activations()


@given(pipeline_schedules())
def test_random_valid_schedules_pass_the_check(schedule):
    schedule.check(buffers=0)


@given(pipeline_schedules())
def test_each_action_starts_after_what_it_needs_has_ended(schedule):
    """The clock against the definition of a pipeline, written out once more."""
    F, I, W, last = 1.0, 1.5, 0.5, schedule.num_stages - 1
    end, spans = {}, []
    for order, times in zip(schedule.actions, schedule.timeline(forward=F, input=I, weight=W), strict=True):
        row = [(*action, *span) for action, span in zip(order, times, strict=True) if action.kind in "FBIW"]
        assert all(before[4] <= after[3] for before, after in pairwise(row))
        spans += row
    for kind, stage, m, _, stop in spans:
        end[kind, stage, m] = stop
        if kind == "B":
            end["I", stage, m] = stop
    for kind, stage, m, start, stop in spans:
        assert stop - start == pytest.approx({"F": F, "I": I, "W": W, "B": I + W}[kind])
        needs = [("F", stage - 1, m)] if kind == "F" and stage > 0 else []
        needs += [("F", stage, m)] if kind in "IB" else []
        needs += [("I", stage + 1, m)] if kind in "IB" and stage < last else []
        needs += [("I", stage, m)] if kind == "W" else []
        assert all(end[need] <= start + 1e-9 for need in needs)  # sums of at most 100 halves: exact


@given(pipeline_schedules())
def test_nothing_could_start_earlier(schedule):
    """A rank waits for a message alone: each start is the end of the action before it, or of one on another rank."""
    times = schedule.timeline(forward=1, input=2, weight=3)
    ends = {0.0} | {end for row in times for _, end in row}
    for order, row in zip(schedule.actions, times, strict=True):
        assert all(start in ends for action, (start, _) in zip(order, row, strict=True) if action.kind in "FBIW")


@given(
    pipeline_schedules(),
)
def test_receives_are_posted_before_their_messages_are_sent(schedule):
    """At unit costs, so that sends never wait; and no rank sends to itself."""
    sent, posted = {}, {}
    for order, row in zip(schedule.actions, schedule.timeline(), strict=True):
        for action, (start, _) in zip(order, row, strict=True):
            (sent if "SEND" in action.kind else posted)[action] = start
    for action, at in sent.items():
        step = 1 if action.kind == "SEND_F" else -1
        assert schedule.stage_rank[action.stage] != schedule.stage_rank[action.stage + step]
        assert posted[(action.kind.replace("SEND", "RECV"), action.stage + step, action.microbatch)] <= at


def test_messages_take_time_where_a_rank_waits_for_them():
    s = make("1f1b", 2, 1, 1)
    spans = dict(zip(map(str, s.actions[0]), s.timeline(send=0.5)[0], strict=True))
    assert spans["0RECV_B0"] == (0, 5)  # posted at once; F, a message, F and B of the other rank, and a message
    assert spans["0B0"] == (5, 7)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_gathered_once_or_a_few_at_a_time(name):
    stages = NAMES[name].stages_per_rank or 2
    for most in (None, 1, 2):
        s = ft.pipeline.schedule(name, num_stages=2 * stages, num_microbatches=4, num_ranks=2, max_unsharded=most)
        s.check()
        for rank, order in enumerate(s.actions):
            gathered, peak = 0, 0
            for action in order:
                gathered += {"UNSHARD": 1, "RESHARD": -1}.get(action.kind, 0)
                peak = max(peak, gathered)
            assert gathered == 0 and peak <= (most or stages)
            if most is None:
                assert sum(action.kind == "UNSHARD" for action in order) == len(s.stages(rank))
            assert sum(action.kind == "REDUCE_GRAD" for action in order) == len(s.stages(rank))


def test_the_text_shows_each_rank_on_a_line():
    text = str(make("zero_bubble_h1", 2, 1, 3)).splitlines()
    assert text == [
        "zero_bubble_h1: 2 stages on 2 ranks, 3 microbatches; bubble 10.0%, at most 2 2 activations",
        "rank 0  0F0 0F1 ·   0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "rank 1  ·   1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]


def test_the_text_and_the_picture_show_predicted_beside_measured(tmp_path):
    s = make("interleaved_1f1b", 2, 2, 4)
    draws = random.Random(0)
    measured = s.timeline(forward=[draws.uniform(1, 2) for _ in range(4)], input=0.5)
    text = s.text(measured).splitlines()
    assert len(text) == 6
    assert text[3] == f"measured: bubble {s.bubble_fraction(measured=measured):.1%}"
    assert s.bubble_fraction(measured=s.timeline()) == s.bubble_fraction()
    s.plot(one := tmp_path / "one.png")
    s.plot(both := tmp_path / "both.png", measured, forward=2)
    sizes = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (one, both)]  # the height in a PNG's header
    assert path_is_png(one) and path_is_png(both) and sizes[1] > 1.5 * sizes[0]


def path_is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (dict(name="1f1f"), "no schedule has this name (did you mean '1f1b'?)"),
        (dict(num_ranks=0), "num_ranks is 0, and must be 1 or more"),
        (dict(num_stages=3), "it has 1 stage on each rank, 2 on 2 ranks, and not 3"),
        (dict(num_stages=1), "rank 1 has no stage: there are 1 stages for 2 ranks"),
        (dict(name="zbv"), "it has 2 stages on each rank, 4 on 2 ranks, and not 2"),
        (dict(name="looped_bfs", num_stages=5), "rank 1 has a stage less than rank 0: 5 stages on 2 ranks"),
        (dict(name="interleaved_1f1b", num_microbatches=3), "3 is no multiple; flexible_interleaved_1f1b takes any"),
        (dict(num_microbatches=2.5), "num_microbatches is 2.5, and must be 1 or more"),
    ],
)
def test_bad_sizes_are_named(sizes, text):
    arguments = dict(name="1f1b", num_stages=2, num_microbatches=4, num_ranks=2) | sizes
    with pytest.raises(ft.ScheduleError) as error:
        ft.pipeline.schedule(arguments.pop("name"), **arguments)
    assert text in str(error.value) and "Fix: " in str(error.value)


@pytest.mark.parametrize(
    ("costs", "text"),
    [(dict(forward=[1, 2, 3]), "forward has 3 costs for 2 stages"), (dict(weight=-1), "weight of stage 0 is -1")],
)
def test_bad_costs_are_named(costs, text):
    with pytest.raises(ft.ScheduleError, match=text):
        make("1f1b", 2, 1, 2).bubble_fraction(**costs)
