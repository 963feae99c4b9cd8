"""NaN, infinity and spikes: all ranks decide alike, nothing is left behind, and a rollback is a restart."""

import pytest
import torch

from tests.support.poison import Loss, bits, poison
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import Watching, start, whole_state

P = "parallel."
EIGHT = (f"{P}tensor=2", f"{P}pipeline=2", f"{P}chunks=2", f"{P}data=2")
OVERLAPPED = (f"{P}data=2", f"{P}overlap_grad_reduce=true", f"{P}overlap_param_gather=true")
SPIKES = ("guard.loss_spike=20", "guard.window=6", "guard.min_values=3", "guard.rollback_after=2")


def skip_for_each_cause(config):
    """For each (where, value, rank): verdict, whether any bit changed; then a good step."""
    from megalemur.train.step import train_step

    run = start(config)
    nan, last = float("nan"), run.place.world_size - 1
    found = []
    causes = [(where, nan, rank) for where in ("activation", "gradient") for rank in range(last + 1)]
    causes += [("loss", nan, last), ("loss", float("inf"), last), ("activation", float("inf"), 0)]
    for where, value, culprit in causes:
        before = bits(run)
        handle = poison(run, where, value) if run.place.rank == culprit else None
        result = train_step(run.engine, run.data.training.micro_batches(0, run.portion), 1e-3)
        if handle:
            handle.remove()
        same = all(torch.equal(a, b) for a, b in zip(before, bits(run), strict=True))
        found.append((where, culprit, result.verdict.name, same))
    before = bits(run)
    result = train_step(run.engine, run.data.training.micro_batches(0, run.portion), 1e-3)
    moved = not all(torch.equal(a, b) for a, b in zip(before, bits(run), strict=True))
    return found, result.verdict.name, moved


def test_nan_and_infinity_anywhere_on_any_rank_are_skipped_by_all_and_change_no_bit(tmp_path):
    config = tiny_run(tmp_path, f"{P}tensor=2", f"{P}pipeline=2", "guard.rollback_after=100")
    for found, verdict, moved in run_ranks(4, skip_for_each_cause, config):
        assert len(found) == 2 * 4 + 3
        assert {(name, same) for _, _, name, same in found} == {("SKIP", True)}, found
        assert (verdict, moved) == ("APPLY", True)


def chooses(run, numbers):
    """Whether a micro-batch holds one of these samples of the original deal, told by its tokens."""
    from megalemur.data.order import Order

    order, sources = Order(run.data.training.history.model_copy(update={"skipped": ()})), run.data.training.sources
    rows = set()
    for number in numbers:
        draw = order(number)
        rows.add(sources[draw.key].sample(draw.ordinal).tokens[:-1].tobytes())
    return lambda batch: any(row.numpy().tobytes() in rows for row in batch.tokens)


def spiky_run(config, bad, value, die_at=None):
    """The whole loop with a loss that is wrong on some samples. What the observers saw, and the state at the end."""
    from megalemur.train.agreement import StopRequest
    from megalemur.train.loop import run_loop

    run = start(config)
    Loss(run, chooses(run, bad), value)

    def die(report):
        if die_at is not None and any(event.kind == "rollback" for event in report.events):
            raise KeyboardInterrupt

    watching = Watching(die)
    try:
        with StopRequest() as stop:
            run_loop(run, [watching], stop)
    except KeyboardInterrupt:
        pass
    events = [(report.step, event.kind) for report in watching.reports for event in report.events]
    return events, [r.loss.hex() for r in watching.reports], run.state, run.data.training.history


def continue_with(config, history, bad, value):
    """The same as a plain restart from the newest checkpoint, with a history that skips from the start."""
    from megalemur.train.loop import run_loop
    from megalemur.train.setup import build_guard, build_run_data

    run = start(config)
    run.data = build_run_data(config, run.state, history)
    run.engine.guard = build_guard(run)
    Loss(run, chooses(run, bad), value)
    from megalemur.train.agreement import StopRequest

    with StopRequest() as stop:
        run_loop(run, [], stop)
    return run.state


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


BAD = range(48, 64)
"""Samples of the seventh and the eighth step."""


@pytest.mark.parametrize(
    ("layout", "value"),
    [((), 50.0), (EIGHT, 50.0), (OVERLAPPED, float("nan"))],
    ids=["one, spike", "tp2 pp2 vp2 dp2, spike", "dp2 overlapped, nan"],
)
def test_a_rollback_passes_over_the_samples_and_goes_on_as_a_restart_would(tmp_path, layout, value):
    settings = (*layout, *SPIKES, "checkpoint.save_every=4")
    config = tiny_run(tmp_path, *settings)
    world = config.parallel.world_size
    results = run_ranks(world, spiky_run, config, BAD, value)
    events, losses, state, history = results[0]
    kind = "spike" if value == 50.0 else "skip"
    assert events == [(7, kind), (8, kind), (5, "rollback")]
    assert all(other[0] == events and other[1] == losses and other[2] == state for other in results)
    assert (state.step, state.samples, state.updates, state.rollbacks) == (10, 80, 10, 1)
    assert history.skipped == ((48, 64),)
    # a restart from step 4 whose history skips them from the beginning
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name != "step_000004":
            path.rename(tmp_path / f"rolled-back-{path.name}")
    again = run_ranks(world, continue_with, config, history, BAD, value)[0]
    assert (again.step, again.updates) == (10, 10)
    for step in (8, 10):
        name = f"step_{step:06d}"
        assert_bit_equal(whole_state(tmp_path / f"rolled-back-{name}"), whole_state(tmp_path / "checkpoints" / name))


def test_a_crash_after_a_rollback_ends_in_the_same_place(tmp_path):
    settings = (f"{P}pipeline=2", *SPIKES, "checkpoint.save_every=4")
    whole_run = tiny_run(tmp_path, *settings)
    crashed = tiny_run(tmp_path, *settings, f"checkpoint.directory={tmp_path}/crashed")
    undisturbed = run_ranks(2, spiky_run, whole_run, BAD, 50.0)[0]
    first = run_ranks(2, spiky_run, crashed, BAD, 50.0, True)[0]
    assert first[0][-1] == (5, "rollback") and first[2].step == 5
    events, _, state, history = run_ranks(2, spiky_run, crashed, BAD, 50.0)[0]
    assert events == [(7, "spike"), (8, "spike"), (5, "rollback")]
    assert state == undisturbed[2] and history == undisturbed[3]
    paths = (tmp_path / name / "step_000010" for name in ("checkpoints", "crashed"))
    one, other = (whole_state(path) for path in paths)
    assert_bit_equal(one, other)


def stopped(config, bad, value):
    from megalemur.train.guard import NumericalStop

    try:
        spiky_run(config, bad, value)
    except NumericalStop as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "holds no checkpoint to go back to"),
        (("checkpoint.save_every=4", "guard.max_rollbacks=1"), "has been rolled back 1 times (guard.max_rollbacks=1)"),
    ],
    ids=["no checkpoint", "no patience"],
)
def test_a_run_that_cannot_be_helped_stops_on_all_ranks(tmp_path, overrides, said):
    config = tiny_run(tmp_path, f"{P}data=2", *SPIKES, *overrides)
    texts = run_ranks(2, stopped, config, range(40, 500), 50.0)
    assert texts[0] == texts[1] and said in texts[0]


def watched_spike(config):
    """A spike after enough good steps, a spike before, and the window afterwards."""
    events, _, state, _ = spiky_run(config, range(8, 16), 50.0)
    return events, state.skipped_in_a_row


def test_nothing_is_judged_before_there_is_enough_to_judge_by(tmp_path):
    config = tiny_run(tmp_path, *SPIKES)
    ((events, _),) = run_ranks(1, watched_spike, config)
    assert events == []


def test_rollbacks_to_the_same_checkpoint_add_up(tmp_path):
    config = tiny_run(tmp_path, *SPIKES, "checkpoint.save_every=4")
    ((events, _, state, history),) = run_ranks(1, spiky_run, config, range(48, 80), 50.0)
    storm = [(7, "spike"), (8, "spike"), (5, "rollback")]
    assert events == storm * 2
    assert history.skipped == ((48, 80),) and (state.step, state.updates, state.rollbacks) == (10, 10, 2)


def test_a_checkpoint_saved_in_mid_streak_is_gone_back_to_and_only_what_is_behind_it_is_skipped(tmp_path):
    config = tiny_run(tmp_path, *SPIKES, "checkpoint.save_every=4")
    ((events, _, state, history),) = run_ranks(1, spiky_run, config, range(56, 72), 50.0)
    assert events == [(8, "spike"), (9, "spike"), (9, "rollback")]
    assert history.skipped == ((64, 72),) and (state.step, state.samples, state.updates) == (10, 80, 9)
