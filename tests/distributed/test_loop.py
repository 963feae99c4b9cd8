"""What one rank alone knows, all ranks learn before the next collective: bad batches, signals, slowness."""

import os
import signal
import threading
import time

import numpy as np

from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run


def loop(run, *observers):
    from megalemur.train.agreement import StopRequest
    from megalemur.train.loop import run_loop

    with StopRequest() as stop:
        run_loop(run, observers, stop)


def damage_a_sample_of_the_other_replica(config, run):
    """Write an id that no vocabulary has into a sample of source a that only replica 1 draws, in the third step."""
    import torch.distributed as dist

    from megalemur.data.batches import Portion
    from megalemur.data.indexed import bin_path
    from megalemur.data.order import Order

    data = config.data
    portion = Portion(1, 2, data.micro_batch_size, data.global_batch_size)
    order, sources = Order(run.data.training.history), run.data.training.sources
    numbers = [n for batch in portion.sample_numbers(2 * data.global_batch_size) for n in batch]
    draws = [order(n) for n in numbers]
    source, ordinal = next((sources[draw.key], draw.ordinal) for draw in draws if sources[draw.key].config.name == "a")
    span = source.samples.spans(ordinal)[0]
    if run.place.rank == 0:
        tokens = np.memmap(bin_path(source.config.path), dtype=np.uint16, mode="r+")
        tokens[(span.start + span.stop) // 2] = 60000
        tokens.flush()
    dist.barrier()


def train_on_damaged_data(config):
    from tests.support.training import start

    run = start(config)
    damage_a_sample_of_the_other_replica(config, run)
    try:
        loop(run)
    except Exception as error:
        alive = [t.name for t in threading.enumerate() if t.name.startswith("megalemur-data")]
        return type(error).__name__, str(error), run.state.step, alive
    return None


def test_a_batch_that_one_replica_cannot_read_stops_all_of_them(tmp_path):
    own, other = run_ranks(2, train_on_damaged_data, tiny_run(tmp_path, "parallel.data=2"))[::-1]
    assert own[0] == "VocabularyError" and "60000" in own[1] and "data source a" in own[1]
    assert other[0] == "DataError" and "another rank" in other[1]
    assert own[2] == other[2] == 2, "the two whole steps before it were taken"
    assert own[3] == other[3] == [], "nothing reads ahead any more"


def train_with_a_slow_replica(config):
    from tests.support.training import Watching, start

    run = start(config)
    if run.place.rank == 1:
        forward = run.engine.forward

        def slowly(*args):
            time.sleep(0.5)
            return forward(*args)

        run.engine.forward = slowly
    watching = Watching()
    loop(run, watching)
    return [(list(report.rank_seconds), report.seconds) for report in watching.reports]


def test_a_slow_replica_is_told_from_those_that_wait_for_it(tmp_path):
    config = tiny_run(tmp_path, "parallel.data=2", "run.stop_at=3")
    reports = run_ranks(2, train_with_a_slow_replica, config)
    assert [seconds for seconds, _ in reports[0]] == [seconds for seconds, _ in reports[1]]
    for (ready, whole), (_, other) in zip(*reports, strict=True):
        assert ready[1] > ready[0] + 0.5, "two micro-batches of half a second each"
        assert min(whole, other) > 1.0, "both steps last as long as the slow one"


def stop_after_the_second_step(config):
    from tests.support.training import Watching, start

    before = signal.getsignal(signal.SIGUSR1)
    run = start(config)

    def signal_once(report):
        if report.step == 2 and run.place.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    loop(run, Watching(signal_once))
    return run.state.step, signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_to_one_rank_stops_all_at_one_step_and_saves(tmp_path):
    config = tiny_run(tmp_path, "parallel.data=2")
    assert run_ranks(2, stop_after_the_second_step, config) == [(2, True), (2, True)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


def skip_steps(config):
    import torch

    from megalemur.train.guard import NumericalStop
    from tests.support.training import start

    run = start(config)
    for chunk in run.engine.chunks:
        next(chunk.parameters()).register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    try:
        loop(run)
    except NumericalStop as error:
        return run.state.step, run.state.skipped_in_a_row, str(error)
    return run.state.step, run.state.skipped_in_a_row, ""


def test_the_guard_goes_on_counting_after_a_restart(tmp_path):
    limit = ("guard.rollback_after=4", "guard.max_rollbacks=0")
    assert run_ranks(1, skip_steps, tiny_run(tmp_path, *limit, "run.stop_at=2")) == [(2, 2, "")]
    ((step, _, said),) = run_ranks(1, skip_steps, tiny_run(tmp_path, *limit))
    assert step == 4 and "4 steps in a row" in said
