"""A training step of chosen ranks without weights, GPUs or other ranks: megatron-core's modules and schedule on tensors
that have shapes and no values. Proves shapes; counts FLOPs, collectives and bytes; and holds them against the plan.

Ranks run in processes of their own (`python -m megalemur.plan.dry_run`), since a process stands in one world at a time
and the one that plans needs no torch.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import orjson
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import megalemur.model.layers
from megalemur.config.run import RunConfig
from megalemur.data.batches import Batch
from megalemur.model.llama import Llama, build_chunks
from megalemur.optim.gradients import gather_parameters, wrap_chunks, zero_gradients
from megalemur.optim.optimizer import Optimizer
from megalemur.parallel.imagined import imagined_rank
from megalemur.plan.dry_result import Collective, Order, RankTrace, stage_of
from megalemur.plan.job import Job
from megalemur.plan.memory import enough_micro_batches, memory_of
from megalemur.plan.schedule import order as order_of
from megalemur.plan.traced import Tracer
from megalemur.train.setup import build_forward, build_shape
from megalemur.train.step import forward_backward

_CPU = torch.device("cpu")


class _FusedNorm(torch.autograd.Function):
    """Shapes of CUDA's rms_norm: one kernel that keeps its input and a figure a row. The CPU has none."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, rows)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


def _norms(fused: bool) -> contextlib.AbstractContextManager[Any]:
    if not fused:
        return contextlib.nullcontext()
    stand_in = lambda hidden, _, weight, eps: _FusedNorm.apply(hidden, weight)  # noqa: E731
    return mock.patch.object(megalemur.model.layers, "rms_norm", stand_in)


class _Known(torch.Tensor):
    """Has values among tensors that have none: borders of documents decide on shapes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


class _Enough(Exception):
    """The peak is over: the rest of the step would show nothing new."""


class _Stage:
    """One rank's modules, and the tracer that sees them work."""

    def __init__(self, config: RunConfig, tracer: Tracer):
        self.config, self.tracer = config, tracer
        chunks = build_chunks(config.model, config.parallel, config.precision)
        self.parameters = tracer.now
        self.parameter_count = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        self.wrapped = wrap_chunks(chunks, config.parallel, config.precision)
        self.gradients = tracer.now - self.parameters
        before = tracer.now
        self.optimizer_parts = Optimizer(self.wrapped, config.optim, config.parallel, config.precision)
        self.optimizer = tracer.now - before
        settings = self.wrapped[0].config
        finish = settings.finalize_model_grads_func
        # with the number of tokens megatron-core would ask whether it is above zero
        settings.finalize_model_grads_func = lambda chunks, tokens=None, **given: finish(chunks, None, **given)
        self.shape = build_shape(config)
        self.batch = self._batch()
        self.forward_step = build_forward(config, _CPU, "torch")  # the CPU's; borders are read on it in any case

    def _batch(self) -> Batch:
        b, s = self.config.data.micro_batch_size, self.config.data.sequence_length
        tokens, mask = torch.zeros(b, s, dtype=torch.int64), torch.ones(b, s)
        with unset_fake_temporarily():  # windows of one document, which is all that one can be
            borders = torch.arange(0, b * s + 1, s, dtype=torch.int32).as_subclass(_Known)
        return Batch(tokens, tokens, mask, tokens, borders, s)

    def _received(self) -> torch.Tensor:
        config = self.wrapped[0].config
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shape = (self.shape.sequence_length // split, self.shape.micro_batch_size, config.hidden_size)
        return torch.empty(shape, dtype=config.pipeline_dtype, requires_grad=True)

    def one_micro_batch(self) -> tuple[int, ...]:
        """Take a micro-batch through each chunk, forward and backward, and reduce the gradients as at a step's end.

        Returns the bytes that each chunk keeps in between; what it sends on is not among them.
        """
        kept, forward = [], self.forward_step
        for wrapped in self.wrapped:
            chunk: Llama = wrapped.module
            before = self.tracer.now
            if not chunk.pre_process:
                chunk.set_input_tensor(self._received())
            out, loss_of = forward(iter([self.batch]), wrapped)
            sent = 0 if chunk.post_process else out.untyped_storage().nbytes()
            kept.append(self.tracer.now - before - sent)
            if chunk.post_process:
                out = loss_of(out)[0]
            out.backward(torch.empty_like(out))
            del out, loss_of
            chunk.set_input_tensor(None)
        self.wrapped[0].config.finalize_model_grads_func(self.wrapped, None)
        if not self.config.parallel.overlap_param_gather:
            gather_parameters(self.wrapped)
        return tuple(kept)

    def schedule(self, micro_batches: int, forwards: int) -> None:
        """Run megatron-core's schedule until it asks for one more forward operation than `forwards`."""
        forward, done = self.forward_step, 0

        def counted(batches: Iterator[Batch], model: torch.nn.Module) -> Any:
            nonlocal done
            done += 1
            if done > forwards:
                raise _Enough
            return forward(batches, model)

        with contextlib.suppress(_Enough):
            forward_backward(
                self.wrapped,
                counted,
                self.shape,
                [self.batch] * micro_batches,
                forward_only=False,
            )


def trace_rank(order: Order, rank: int) -> RankTrace:
    """Build one rank's modules and optimizer, and run them.

    Raises:
        ValueError: the run file asks for modules that are not installed.
    """
    config, started = order.config, time.monotonic()
    stage = stage_of(config.parallel, rank)
    with contextlib.ExitStack() as inside:
        names = inside.enter_context(imagined_rank(config.parallel, rank))
        inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside.enter_context(_norms(order.fused_norm))
        with Tracer(names) as tracer:
            built = _Stage(config, tracer)
            standing = tracer.now
            built.one_micro_batch()  # leaves the buffers that stay
            buffers = tracer.now - standing
            zero_gradients(built.wrapped)
            tracer.restart()
            kept = built.one_micro_batch()
            flops, sent = tracer.flops, _collectives(tracer)
            zero_gradients(built.wrapped)
            tracer.restart()
            micro_batches, forwards = _enough(replace(Job.of(config), update_bytes=0), stage, order.whole)
            built.schedule(micro_batches, forwards)
            return RankTrace(
                rank=rank,
                stage=stage,
                parameter_count=built.parameter_count,
                parameters=built.parameters,
                gradients=built.gradients,
                optimizer=built.optimizer,
                buffers=buffers,
                kept=kept,
                peak=tracer.peak,
                flops=flops,
                collectives=sent,
                messages=tuple(c for c in _collectives(tracer) if c.group == "pipeline"),
                forwards=forwards,
                seconds=time.monotonic() - started,
            )


def _enough(job: Job, stage: int, whole: bool) -> tuple[int, int]:
    """(micro-batches, forward operations) that have the peak of a step of any length among them."""
    micro_batches = enough_micro_batches(job.pipeline, job.chunks, job.micro_batches)
    if whole:
        return micro_batches, micro_batches * job.chunks
    peak = memory_of(job)[stage].peak_op
    ops = order_of(stage, pipeline=job.pipeline, chunks=job.chunks, micro_batches=micro_batches)
    behind = ops[: ops.index(peak) + 1]
    return micro_batches, sum(not op.backward for op in behind) + 2  # two more, to see it fall


def _collectives(tracer: Tracer) -> tuple[Collective, ...]:
    return tuple(
        Collective(sent.kind, sent.group, calls, tracer.bytes[sent]) for sent, calls in sorted(tracer.calls.items())
    )


def main() -> None:
    """Answer one question: an order and its ranks as JSON on stdin, traces as one line of JSON on stdout."""
    question = orjson.loads(sys.stdin.buffer.read())
    ranks = question.pop("ranks")
    order = Order(**{**question, "config": RunConfig.model_validate(question["config"])})
    try:
        answer: dict[str, Any] = {"traces": [asdict(trace_rank(order, rank)) for rank in ranks]}
    except ValueError as error:
        answer = {"problem": str(error)}
    sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")


if __name__ == "__main__":
    main()
