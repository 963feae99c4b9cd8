"""Validation: the loss of each source on its own, always over the same samples."""

from megalemur.data.feed import ValidationData
from megalemur.train.setup import Run
from megalemur.train.step import run_schedule


def validate(run: Run) -> dict[str, float]:
    """Mean loss a token (nats) of every validation source, by name. A collective; changes nothing."""
    for chunk in run.engine.chunks:
        chunk.eval()
    losses = {source.name: _loss(run, source) for source in run.data.validation}
    for chunk in run.engine.chunks:
        chunk.train()
    return losses


def _loss(run: Run, source: ValidationData) -> float:
    total, tokens = 0.0, 0
    for batches in source.rounds(run.portion):
        mean, counted = run_schedule(run.engine, batches, forward_only=True)
        total, tokens = total + mean * counted, tokens + counted
    return total / tokens
