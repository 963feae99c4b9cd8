"""Random jobs for the planner's proofs, and what their ranks do in a dry run."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from megalemur.config.load import parse_run
from megalemur.config.run import RunConfig
from megalemur.plan.dry_result import Compared, Order, class_rank, compared

_RUN = """
run: {name: planned, steps: 10}
model: {num_layers: 4, hidden_size: 512, ffn_hidden_size: 1376, num_attention_heads: 16, num_query_groups: 16,
        vocab_size: 32000}
optim: {learning_rate: 1e-3}
data: {sequence_length: 2048, global_batch_size: 8, sources: [{name: a, path: nowhere}]}
checkpoint: {directory: nowhere}
log: {directory: nowhere}
"""


def planned_run(*overrides: str) -> RunConfig:
    """A run of a small Llama, for plans and dry runs; nothing that it names exists."""
    return parse_run(_RUN, overrides)


def _overrides(pick: random.Random) -> list[str]:
    choose = pick.choice
    hidden = choose([512, 1024, 2048, 4096])
    heads = hidden // choose([64, 128])
    pipeline, data, micro_batch = choose([1, 2, 3, 4, 6]), choose([1, 2, 4]), choose([1, 2, 4])
    chunks = choose([1, 2, 3]) if pipeline > 1 else 1
    per_chunk = choose([1, 2, 3])
    micro_batches = choose([1, 2, 3, 5]) * (pipeline if chunks > 1 else 1)
    settings: dict[str, Any] = {
        "model.hidden_size": hidden,
        "model.num_attention_heads": heads,
        "model.num_query_groups": max(1, heads // choose([1, 4, 8])),
        "model.ffn_hidden_size": choose([2, 3, 4]) * hidden - choose([0, 256]),
        "model.num_layers": pipeline * chunks * per_chunk,
        "model.vocab_size": choose([8000, 32000, 50257, 128256]),
        "model.tie_embeddings": choose(["true", "false"]),
        "parallel.tensor": choose([1, 2, 4, 8]),
        "parallel.pipeline": pipeline,
        "parallel.chunks": chunks,
        "parallel.data": data,
        "parallel.distributed_optimizer": choose(["true", "false"]),
        "parallel.overlap_grad_reduce": choose(["true", "false"]),
        "data.sequence_length": choose([1024, 2048, 4096]),
        "data.document_mask": choose(["none", "intra"]),
        "data.micro_batch_size": micro_batch,
        "data.global_batch_size": micro_batches * data * micro_batch,
        "precision.dtype": choose(["bf16", "bf16", "bf16", "fp32"]),
        "precision.reduce_grads_in_fp32": choose(["true", "true", "false"]),
        "precision.recompute": choose(["none", "selective", "full"]),
        "precision.recompute_modules": choose(["[core_attn]", "[mlp]", "[core_attn, mlp]"]),
        "precision.recompute_method": choose(["uniform", "block"]),
        "precision.recompute_layers": choose([1, 2, 3]),
    }
    if settings["parallel.tensor"] > 1 and choose([True, False, False]):
        settings["parallel.sequence"] = "false"
    return [f"{name}={value}" for name, value in settings.items()]


def random_runs(count: int, *, seed: int) -> Iterator[RunConfig]:
    """Valid runs over everything that moves memory; what the checks of a run file refuse is drawn again."""
    pick = random.Random(seed)
    while count:
        try:
            yield planned_run(*_overrides(pick))
        except ValueError:
            continue
        count -= 1


class Found(NamedTuple):
    """One stage of one random run."""

    config: RunConfig
    fused_norm: bool
    compared: Compared


def all_stages(config: RunConfig, fused_norm: bool) -> list[Found]:
    """Dry-run every stage of a run, every operation of it, in this process."""
    from megalemur.plan.dry_run import trace_rank

    order = Order(config, fused_norm=fused_norm, whole=True)
    traces = [trace_rank(order, class_rank(config.parallel, s)) for s in range(config.parallel.pipeline)]
    return [Found(config, fused_norm, one) for one in compared(order, traces).ranks]


def differing(found: list[Found], tolerance: float) -> list[str]:
    """What the plan got wrong, a line each."""
    problems = []
    for config, fused, one in found:
        where = f"stage {one.trace.stage} of {config.parallel!r} {config.precision!r}, fused norms {fused}"
        for name, error in (("activations", one.memory_error), ("all tensors", one.total_error)):
            if abs(error) > tolerance:
                problems.append(f"{name} {error:+.2%}: {where}")
        if one.trace.parameter_count != one.planned.parameter_count or abs(one.flops_error) > 1e-9:
            problems.append(f"parameters or FLOPs: {where}")
    return problems


def trace_runs(runs: list[tuple[RunConfig, bool]]) -> list[Found]:
    """Dry-run every stage of several runs, each with fused norms or without; what a process of a test does."""
    return [found for config, fused_norm in runs for found in all_stages(config, fused_norm)]


def peak_of_tensors(config: RunConfig, steps: int) -> int:
    """Bytes of tensors at the highest moment of some real training steps on this rank."""
    from megalemur.plan.traced import Tracer
    from tests.support.training import start, take_steps

    with Tracer() as tracer:
        take_steps(start(config), steps)
    return tracer.peak
