"""The loop is a list of verbs."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing

from megalemur.observe.observer import Observer, StepReport
from megalemur.optim.schedule import learning_rate
from megalemur.parallel.seeds import seed_step
from megalemur.supervise.pulse import Section
from megalemur.supervise.signals import StopRequest
from megalemur.train.agreement import agree, draw
from megalemur.train.ahead import ReadAhead
from megalemur.train.evaluate import validate
from megalemur.train.guard import Verdict
from megalemur.train.pace import peaks_everywhere
from megalemur.train.rollback import roll_back
from megalemur.train.saving import begin_save, finish_save, prepare_saving, saves_ended
from megalemur.train.setup import Run
from megalemur.train.step import StepResult, train_step


def run_loop(run: Run, observers: Sequence[Observer], stop: StopRequest) -> bool:
    """Train to the last step of the run file, or until asked to stop; the last state is always saved.

    Returns whether it was asked to stop.
    """
    config, stopped = run.config, False
    prepare_saving(run)
    with closing(ReadAhead(run)) as ahead, closing(run.saver):  # end the thread that reads and the save in flight
        while run.state.step < config.last_step:
            state = run.state
            run.pulse.step(state.step)
            seed_step(config.run.seed, state.step, run.place.pp_rank, run.place.dp_rank)
            run.clock.begin()
            started = time.monotonic()
            drawn = draw(ahead.next)
            waited = time.monotonic() - started
            stopped = agree(run.place, stop, drawn, saves_exhausted=run.saver.exhausted)
            if stopped:
                break
            rate = learning_rate(state.step, config.optim, config.schedule, config.run.steps)
            result = train_step(run.engine, drawn.batches, rate)
            advance(run, result)
            seconds = time.monotonic() - started
            report(run, observers, result, rate=rate, waited=waited, seconds=seconds)
            if result.verdict is Verdict.STOP:
                run.engine.guard.give_up()
            if result.verdict is Verdict.ROLL_BACK:
                with run.pulse.during(Section.SETUP, state.step):
                    roll_back(run)
                ahead.restart()
            elif due(state.step, config.checkpoint.save_every):
                save(run, observers)
        run.pulse.enter(Section.SAVE)  # waiting for one in flight is no step that hangs
    if run.saver.saved_step != run.state.step:
        save(run, observers)
        finish_save(run)
    return stopped


def advance(run: Run, result: StepResult) -> None:
    """Count the step."""
    state, skipped = run.state, result.verdict is not Verdict.APPLY
    if skipped and not state.skipped_in_a_row:
        state.rejected_from = state.samples
    state.step += 1
    state.updates += not skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    state.samples += run.config.data.global_batch_size
    state.tokens += result.tokens


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens now; 0: never."""
    return every > 0 and step % every == 0


def report(
    run: Run, observers: Sequence[Observer], result: StepResult, *, rate: float, waited: float, seconds: float
) -> None:
    """Validate when due, and tell the observers about the step."""
    config, state = run.config, run.state
    every = config.data.validate_every
    last = state.step == config.last_step
    losses: Mapping[str, float] = {}
    if due(state.step, every) or (every and last):
        with run.pulse.during(Section.VALIDATION, state.step):
            losses = validate(run)
    ended = saves_ended(run)
    logged = due(state.step, config.log.every) or bool(losses) or last
    told = StepReport(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        tokens=config.tokens_per_step,
        samples=state.samples,
        skipped=result.verdict is not Verdict.APPLY,
        seconds=seconds,
        data_seconds=waited,
        rank_seconds=run.clock.everywhere(run.place) if logged else (),
        peak_bytes=peaks_everywhere(run.place) if logged else (),
        ledger=run.data.training.ledger(state.samples) if logged else {},
        validation=losses,
        save_write_seconds=ended.seconds,
        failed_saves=ended.failed,
        events=run.engine.guard.take_events(),
    )
    for observer in observers:
        observer.after_step(told)


def save(run: Run, observers: Sequence[Observer]) -> None:
    """Begin a save and tell the observers how long training stood still."""
    started = time.monotonic()
    with run.pulse.during(Section.SAVE, run.state.step):
        path = begin_save(run)
    for observer in observers:
        observer.at_save(run.state.step, path, time.monotonic() - started)
