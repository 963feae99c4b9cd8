"""The loop is a list of verbs."""

import time
from collections.abc import Sequence
from contextlib import closing

from megalemur.observe.observer import Observer, StepReport
from megalemur.optim.schedule import learning_rate
from megalemur.parallel.seeds import seed_step
from megalemur.train.agreement import StopRequest, agree, draw
from megalemur.train.ahead import ReadAhead
from megalemur.train.evaluate import validate
from megalemur.train.guard import Verdict
from megalemur.train.rollback import roll_back
from megalemur.train.saving import save_run
from megalemur.train.setup import Run
from megalemur.train.step import StepResult, train_step


def run_loop(run: Run, observers: Sequence[Observer], stop: StopRequest) -> None:
    """Train to the last step of the run file, or until asked to stop; the last state is always saved."""
    config = run.config
    saved = run.state.step if run.origin.resumed else None
    with closing(ReadAhead(run)) as ahead:  # ends the thread that reads
        while run.state.step < config.last_step:
            state = run.state
            seed_step(config.run.seed, state.step, run.place.pp_rank, run.place.dp_rank)
            run.clock.begin()
            started = time.monotonic()
            drawn = draw(ahead.next)
            waited = time.monotonic() - started
            if agree(run.place, stop, drawn):
                break
            rate = learning_rate(state.step, config.optim, config.schedule, config.run.steps)
            result = train_step(run.engine, drawn.batches, rate)
            advance(run, result)
            seconds = time.monotonic() - started
            report(run, observers, result, rate=rate, waited=waited, seconds=seconds)
            if result.verdict is Verdict.STOP:
                run.engine.guard.give_up()
            if result.verdict is Verdict.ROLL_BACK:
                roll_back(run)
                ahead.restart()
                saved = run.state.step
            elif due(state.step, config.checkpoint.save_every):
                save(run, observers)
                saved = state.step
    if saved != run.state.step:
        save(run, observers)


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
    losses = validate(run) if due(state.step, every) or (every and last) else {}
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
        ledger=run.data.training.ledger(state.samples) if logged else {},
        validation=losses,
        events=run.engine.guard.take_events(),
    )
    for observer in observers:
        observer.after_step(told)


def save(run: Run, observers: Sequence[Observer]) -> None:
    """Save and tell the observers how long training stood still."""
    started = time.monotonic()
    path = save_run(run)
    for observer in observers:
        observer.at_save(run.state.step, path, time.monotonic() - started)
