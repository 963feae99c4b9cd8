"""The order of operations is megatron-core's, and the replay what a clock would show."""

from itertools import product
from types import SimpleNamespace

import pytest

from megalemur.plan.schedule import Op, order, peak_in_flight, replay, step_seconds, warm_up

SMALL = [(p, m, v) for p, m, v in product(range(1, 6), range(1, 13), range(1, 5)) if v == 1 or (p > 1 and m % p == 0)]


def needs(op: Op, stage: int, p: int, v: int) -> tuple[int, Op] | None:
    """Written from the definition of a pipeline: parts in a row, forward up, backward down."""
    part, last = op.chunk * p + stage, p * v - 1
    if not op.backward:
        if part == 0:
            return None
        return (part - 1) % p, Op(False, (part - 1) // p, op.micro_batch)
    if part == last:
        return stage, Op(False, op.chunk, op.micro_batch)
    return (part + 1) % p, Op(True, (part + 1) // p, op.micro_batch)


def by_the_clock(p: int, m: int, v: int, ticks, message: int) -> list[list[tuple[Op, int, int]]]:
    """Every stage looks at each tick whether it is free and its next operation's input has arrived."""
    orders = [order(s, pipeline=p, chunks=v, micro_batches=m) for s in range(p)]
    spans: list[list[tuple[Op, int, int]]] = [[] for _ in range(p)]
    ended: dict[tuple[int, Op], int] = {}
    now = 0
    while any(len(spans[s]) < len(orders[s]) for s in range(p)):
        assert now < 10_000, "the order of operations waits for ever"
        for s in range(p):
            if len(spans[s]) == len(orders[s]) or (spans[s] and spans[s][-1][2] > now):
                continue
            op = orders[s][len(spans[s])]
            needed = needs(op, s, p, v)
            if needed is not None:
                end = ended.get(needed)
                if end is None or end + (message if needed[0] != s else 0) > now:
                    continue
            spans[s].append((op, now, now + ticks(s, op)))
            ended[s, op] = now + ticks(s, op)
        now += 1
    return spans


@pytest.mark.parametrize("message", [0, 1])
def test_the_replay_is_what_a_clock_shows(message):
    def ticks(stage: int, op: Op) -> int:
        return (2 if op.backward else 1) + (stage + op.chunk) % 2

    for p, m, v in SMALL:
        found = replay(p, v, m, ticks, message_seconds=message)
        assert [[tuple(span) for span in stage] for stage in found] == by_the_clock(p, m, v, ticks, message), (p, m, v)


def test_another_order_is_another_replay():
    # negative control: the clock sees when a stage's operations are as long as another's
    one = replay(3, 1, 4, lambda stage, op: 1 + op.backward)
    other = replay(3, 1, 4, lambda stage, op: 1 + op.backward + (stage == 1))
    assert one != other and step_seconds(other) > step_seconds(one)


def test_orders_and_warm_up_are_megatron_cores():
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for p, m, v in SMALL:
        if p == 1:
            continue
        for stage in range(p):
            rank = SimpleNamespace(
                pp_group=SimpleNamespace(size=lambda p=p: p, rank=lambda stage=stage: stage),
                virtual_pipeline_model_parallel_size=v if v > 1 else None,
            )
            _, _, ahead, rest = get_pp_rank_microbatches(m, v, p, p2p_communicator=rank)
            assert warm_up(stage, pipeline=p, chunks=v, micro_batches=m) == ahead
            table = get_schedule_table(m, v, p if v > 1 else m)
            ops = order(stage, pipeline=p, chunks=v, micro_batches=m)
            assert [(op.micro_batch, op.chunk) for op in ops if not op.backward] == table
            assert [(op.micro_batch, v - 1 - op.chunk) for op in ops if op.backward] == table
            assert [op.backward for op in ops] == [False] * ahead + [False, True] * rest + [True] * ahead


def test_a_schedule_without_pipeline_holds_one_micro_batch():
    ops = order(0, pipeline=1, chunks=1, micro_batches=5)
    assert peak_in_flight(ops) == 1
    assert step_seconds(replay(1, 1, 5, lambda stage, op: 2 if op.backward else 1)) == 15


def test_the_bubble_is_the_papers():
    """Narayanan et al. 2021, sections 2.2.1 and 2.2.2: (p - 1) / (v m) of the ideal time."""
    for p, m, v in SMALL:
        ticks = 12 // v  # of a forward pass through a chunk; whole for up to four chunks
        step = step_seconds(replay(p, v, m, lambda _, op, ticks=ticks: ticks * (1 + op.backward)))
        assert step == 36 * m + 36 * (p - 1) / v, (p, m, v)


def test_the_first_stage_holds_the_most():
    for p, m, v in SMALL:
        held = [peak_in_flight(order(s, pipeline=p, chunks=v, micro_batches=m)) for s in range(p)]
        assert held == sorted(held, reverse=True)
        assert held[0] == min(m * v, p if v == 1 else p * v + p - 1)
