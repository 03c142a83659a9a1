"""torch.distributed.pipelining's own orders, without process groups: what tests of schedules compare with."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

from torch.distributed.pipelining import schedules

# our name -> theirs; torch has no class of its own for ZB-H1, which is its interleaved zero bubble of one stage a rank
CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "flexible_interleaved_1f1b": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "zero_bubble_h1": "ScheduleInterleavedZeroBubble",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


def torch_schedule(name: str, num_stages: int, num_microbatches: int, num_ranks: int):
    """torch's object of one of our names; a `ValueError` where torch has none of these sizes."""
    sizes = dict(num_stages=num_stages, group_size=num_ranks, group_rank=0, has_backward=True, is_last=False)
    stages = [SimpleNamespace(stage_index=i, submod=None, **sizes) for i in range(num_stages // num_ranks)]
    single = name in ("gpipe", "1f1b")
    cls = getattr(schedules, CLASSES[name])
    return cls(stages[0] if single else stages, num_microbatches, loss_fn=lambda *values: None)


def torch_orders(name: str, num_stages: int, num_microbatches: int, num_ranks: int) -> list[list[tuple]]:
    """Each rank's compute actions `(kind, stage, microbatch)`; an overlapped pair one after the other."""
    if name in ("gpipe", "1f1b"):
        if num_stages != num_ranks:
            raise ValueError("torch has one stage on each rank")
        return [_executed(name, num_microbatches, num_ranks, rank) for rank in range(num_ranks)]
    order = torch_schedule(name, num_stages, num_microbatches, num_ranks).pipeline_order
    return [
        [
            (each.computation_type.value, each.stage_index, each.microbatch_index)
            for action in order[rank]
            if action is not None
            for each in action.sub_actions or (action,)
            if each.is_compute_op
        ]
        for rank in range(num_ranks)
    ]


def _executed(name: str, num_microbatches: int, num_ranks: int, rank: int) -> list[tuple]:
    """What torch's loop does with a stage that only notes its calls: what it prints for 1F1B is not what it runs."""
    calls: list[tuple] = []
    stage = MagicMock(num_stages=num_ranks, group_size=num_ranks, group_rank=rank, stage_index=rank, is_last=False)
    stage.forward_one_chunk.side_effect = lambda m, *args, **options: calls.append(("F", rank, m))
    stage.backward_one_chunk.side_effect = lambda m, **options: calls.append(("B", rank, m))
    for ops in (stage.get_fwd_recv_ops, stage.get_fwd_send_ops, stage.get_bwd_recv_ops, stage.get_bwd_send_ops):
        ops.return_value = []
    theirs = getattr(schedules, CLASSES[name])(stage, num_microbatches, loss_fn=lambda *values: None)
    theirs._initialize_stage = lambda *args: None
    theirs._step_microbatches()
    return calls
