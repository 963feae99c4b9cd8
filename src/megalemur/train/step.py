"""The step: forward and backward over the micro-batches, one decision, one update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megalemur.data.batches import Batch
from megalemur.optim.gradients import zero_gradients
from megalemur.optim.optimizer import Optimizer
from megalemur.parallel.groups import Place
from megalemur.train.forward import ForwardStep
from megalemur.train.guard import Guard, Verdict


class Shape(NamedTuple):
    """What the pipeline sends: rows of one micro-batch in flight."""

    sequence_length: int
    micro_batch_size: int


@dataclass
class Engine:
    """The parts of a run that a step touches."""

    chunks: Sequence[torch.nn.Module]
    optimizer: Optimizer
    forward: ForwardStep
    guard: Guard
    shape: Shape
    place: Place


class StepResult(NamedTuple):
    """What a step did. Equal on all ranks."""

    loss: float
    """Mean cross entropy a token, over all replicas (nats)."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens: int
    """Tokens that counted in the loss."""
    verdict: Verdict


def train_step(engine: Engine, batches: Sequence[Batch], learning_rate: float) -> StepResult:
    """One optimizer step over this replica's micro-batches."""
    zero_gradients(engine.chunks)
    engine.optimizer.zero_grad()
    loss, tokens = run_schedule(engine, batches, forward_only=False)
    grad_norm = engine.optimizer.prepare()
    verdict = engine.guard.judge(loss, grad_norm)
    if verdict is Verdict.APPLY:
        engine.optimizer.apply(learning_rate, grad_norm)
    return StepResult(loss, grad_norm, tokens, verdict)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    forward: Callable[..., Any],
    shape: Shape,
    batches: Sequence[Batch],
    *,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """What this rank's loss function reports of each micro-batch; nothing on stages without a loss.

    megatron-core chooses the schedule: none, 1F1B or interleaved. Each chunk has an iterator of its own over the same
    micro-batches.
    """
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks] if several else iter(batches),
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape.sequence_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )


def run_schedule(engine: Engine, batches: Sequence[Batch], *, forward_only: bool) -> tuple[float, int]:
    """(mean loss a token, tokens) of the micro-batches of all replicas, known to every rank."""
    reports = forward_backward(engine.chunks, engine.forward, engine.shape, batches, forward_only=forward_only)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.place.device)
    for report in reports:
        sums += report["sums"]
    dist.all_reduce(sums, group=engine.place.dp_cp_group)
    dist.all_reduce(sums, group=engine.place.pp_group)  # only the last stage has losses: the others add zero
    total, tokens = sums.tolist()
    return total / max(tokens, 1.0), int(tokens)
