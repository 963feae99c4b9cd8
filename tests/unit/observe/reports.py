"""Step reports and run configs for the tests of this room."""

from pathlib import Path

from megalemur.config.load import parse_run
from megalemur.config.run import RunConfig
from megalemur.observe.observer import StepReport

RUN = """
run: {name: test, steps: 10}
model: {preset: tiny}
parallel: {tensor: 2, data: 2}
optim: {learning_rate: 1e-3}
data:
  sequence_length: 128
  global_batch_size: 4
  sources: [{name: code, path: code}]
checkpoint: {directory: checkpoints}
log: {directory: log, tensorboard: false}
"""


def run_config(directory: Path, *overrides: str) -> RunConfig:
    """A run of 10 steps and 4 processes that logs under `directory`."""
    return parse_run(RUN, [f"log.directory={directory}", *overrides])


def report(step: int = 1, **values) -> StepReport:
    """One step of 2 seconds and 100 tokens."""
    usual = {
        "loss": 2.5,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "tokens": 100,
        "samples": 4 * step,
        "skipped": False,
        "data_seconds": 0.25,
        "seconds": 2.0,
        "rank_seconds": [1.5],
    }
    return StepReport(step=step, **{**usual, **values})
