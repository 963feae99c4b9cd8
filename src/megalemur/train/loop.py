"""The loop is a list of verbs."""

import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

from megalemur.observe.observer import Observer, StepReport
from megalemur.optim.schedule import learning_rate
from megalemur.parallel.seeds import seed_step
from megalemur.train.evaluate import validate
from megalemur.train.guard import Verdict
from megalemur.train.saving import save_run
from megalemur.train.setup import Run
from megalemur.train.step import StepResult, train_step


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 or SIGUSR2: finish the step, save, leave. All ranks agree on the step."""

    def __init__(self) -> None:
        self._heard = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def agreed(self, run: Run) -> bool:
        """Whether any rank was asked to stop. A collective of one byte, over the host."""
        heard = torch.tensor([self._heard], dtype=torch.uint8)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=run.place.cpu_group)
        return bool(heard.item())


def run_loop(run: Run, observers: Sequence[Observer], stop: StopRequest) -> None:
    """Train to the last step of the run file, or until asked to stop; the last state is always saved."""
    config, state = run.config, run.state
    saved = state.step if run.origin.resumed else None
    feed = run.data.training.prefetched(state.samples, run.portion)
    while state.step < config.last_step:
        seed_step(config.run.seed, state.step, run.place.pp_rank, run.place.dp_rank)
        started = time.monotonic()
        batches = next(feed)
        waited = time.monotonic() - started
        rate = learning_rate(state.step, config.optim, config.schedule, config.run.steps)
        result = train_step(run.engine, batches, rate)
        advance(run, result)
        seconds = time.monotonic() - started
        report(run, observers, result, rate=rate, waited=waited, seconds=seconds)
        stopping = stop.agreed(run)
        if stopping or due(state.step, config.checkpoint.save_every):
            save(run, observers)
            saved = state.step
        if stopping:
            break
    feed.close()  # ends the thread that reads ahead
    if saved != state.step:
        save(run, observers)


def advance(run: Run, result: StepResult) -> None:
    """Count the step."""
    run.state.step += 1
    run.state.updates += result.verdict is Verdict.APPLY
    run.state.samples += run.config.data.global_batch_size
    run.state.tokens += result.tokens


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
        skipped=result.verdict is Verdict.SKIP,
        data_seconds=waited,
        rank_seconds=gather_seconds(run, seconds) if logged else [seconds],
        ledger=run.data.training.ledger(state.samples) if logged else {},
        validation=losses,
    )
    for observer in observers:
        observer.after_step(told)


def gather_seconds(run: Run, seconds: float) -> list[float]:
    """Step seconds of every rank. A collective over the host."""
    everyone = torch.zeros(run.place.world_size, dtype=torch.float64)
    everyone[run.place.rank] = seconds
    dist.all_reduce(everyone, group=run.place.cpu_group)
    return everyone.tolist()


def save(run: Run, observers: Sequence[Observer]) -> None:
    """Save and tell the observers how long training stood still."""
    started = time.monotonic()
    path = save_run(run)
    for observer in observers:
        observer.at_save(run.state.step, path, time.monotonic() - started)
