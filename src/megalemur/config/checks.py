"""Cross-checks between the parts of a run file: what each part alone cannot know.

A check takes the parts that it names and yields its problems; it runs whenever those parts are valid, so that one
pass reports everything. A rule's docstring names the public thread of somebody who paid for its absence.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from megalemur.config.layers import chunk_layers

Problems = Iterator[str]


def _divisors(n: int) -> str:
    found = [d for d in range(1, n + 1) if n % d == 0]
    return ", ".join(map(str, found[:8])) + (" …" if len(found) > 8 else "")


def attention_shape(model: Any) -> Problems:
    """Heads divide the width, and the rotary embedding needs pairs."""
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} does not divide "
            f"model.hidden_size={model.hidden_size}; use {_divisors(model.hidden_size)}"
        )
    elif model.head_dim % 2:
        yield f"model: head size {model.head_dim} is odd and cannot be rotated; change model.num_attention_heads"
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_query_groups={model.num_query_groups} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}; use {_divisors(model.num_attention_heads)}"
        )


def layers_over_stages(model: Any, parallel: Any) -> Problems:
    """Every layer has exactly one home. https://github.com/NVIDIA/Megatron-LM/issues/468 trained 64 layers of 80,
    https://github.com/NVIDIA/Megatron-LM/issues/1304 28 of 30."""
    try:
        chunk_layers(model.num_layers, parallel)
    except ValueError as error:
        yield str(error)
    if parallel.chunks > 1 and parallel.pipeline == 1:
        yield f"parallel.chunks={parallel.chunks} needs parallel.pipeline above 1; use parallel.chunks=1"


def widths_over_tensor(model: Any, parallel: Any) -> Problems:
    """Heads, KV groups and the FFN are cut evenly over tensor-parallel ranks."""
    t, groups = parallel.tensor, model.num_query_groups
    if model.num_attention_heads % t:
        yield (
            f"parallel.tensor={t} does not divide model.num_attention_heads={model.num_attention_heads}; "
            f"use {_divisors(model.num_attention_heads)}"
        )
    if model.ffn_hidden_size % t:
        yield (
            f"parallel.tensor={t} does not divide model.ffn_hidden_size={model.ffn_hidden_size}; "
            f"use {_divisors(model.ffn_hidden_size)}"
        )
    if groups % t and t % groups:
        yield (
            f"parallel.tensor={t} neither divides model.num_query_groups={groups} nor is a multiple of it, "
            f"so key and value heads cannot be shared out; use {_divisors(groups)} or a multiple of {groups}"
        )


def vocabulary_padding(model: Any, parallel: Any) -> Problems:
    """Padding larger than the vocabulary is a mistake in the layout."""
    padding = parallel.padded_vocab(model.vocab_size) - model.vocab_size
    if padding > model.vocab_size:
        yield (
            f"parallel.pad_vocab_to={parallel.pad_vocab_to} x parallel.tensor={parallel.tensor} pads "
            f"model.vocab_size={model.vocab_size} by {padding} rows, more than it has; "
            f"use parallel.pad_vocab_to={max(1, model.vocab_size // parallel.tensor // 2)} or less"
        )


def batch_over_replicas(parallel: Any, data: Any) -> Problems:
    """The global batch is whole micro-batches on every replica: a remainder would be dropped in silence."""
    unit = data.micro_batch_size * parallel.data
    if data.global_batch_size % unit:
        lower = data.global_batch_size // unit * unit
        yield (
            f"data.global_batch_size={data.global_batch_size} is no multiple of data.micro_batch_size="
            f"{data.micro_batch_size} x parallel.data={parallel.data}; "
            f"use {f'{lower} or ' if lower else ''}{lower + unit}"
        )
        return
    micro_batches = data.global_batch_size // unit
    if parallel.chunks > 1 and micro_batches % parallel.pipeline:
        yield (
            f"parallel.chunks={parallel.chunks}: the interleaved schedule wants the micro-batches a step "
            f"({micro_batches} = data.global_batch_size / (data.micro_batch_size x parallel.data)) to be a multiple of "
            f"parallel.pipeline={parallel.pipeline}; change data.global_batch_size, or use parallel.chunks=1"
        )


def sequence_over_tensor(parallel: Any, data: Any) -> Problems:
    """Sequence and context parallelism cut the sequence evenly."""
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence=true has no effect with parallel.tensor=1; leave it out"
    cut = (parallel.tensor if parallel.sequence_parallel else 1) * (2 * parallel.context if parallel.context > 1 else 1)
    if data.sequence_length % cut:
        yield (
            f"data.sequence_length={data.sequence_length} is no multiple of {cut} (sequence parallelism over "
            f"parallel.tensor={parallel.tensor}, parallel.context={parallel.context}); "
            f"use {-(-data.sequence_length // cut) * cut}, or parallel.sequence=false"
        )


def sequence_within_model(model: Any, data: Any) -> Problems:
    """The exported config must not promise fewer positions than were trained."""
    if data.sequence_length > model.max_position_embeddings:
        yield (
            f"data.sequence_length={data.sequence_length} is above model.max_position_embeddings="
            f"{model.max_position_embeddings}; raise model.max_position_embeddings or shorten the sequence"
        )


def recompute_over_layers(model: Any, parallel: Any, precision: Any) -> Problems:
    """`uniform` must divide the layers of every chunk: megatron-core fails in mid-step otherwise."""
    if precision.recompute != "full":
        return
    try:
        counts = {n for stage in chunk_layers(model.num_layers, parallel) for n in stage}
    except ValueError:
        return  # layers_over_stages reports it
    wanted, bad = precision.recompute_layers, []
    if precision.recompute_method == "uniform":
        bad = [n for n in sorted(counts) if n % wanted]
    elif wanted > min(counts):
        bad = [min(counts)]
    if bad:
        rule = "divide" if precision.recompute_method == "uniform" else "be at most"
        yield (
            f"precision.recompute_layers={wanted} must {rule} the {bad[0]} layers of a model chunk; "
            f"use {_divisors(bad[0]) if rule == 'divide' else bad[0]}"
        )


def transformer_engine_only(model: Any, parallel: Any, precision: Any) -> Problems:
    """Context parallelism and fp8 live in Transformer Engine's kernels."""
    if model.backend == "transformer_engine":
        return
    if parallel.context > 1:
        yield (
            f"parallel.context={parallel.context} needs Transformer Engine; install it and set "
            "model.backend=transformer_engine, or use parallel.context=1"
        )
    if precision.fp8:
        yield (
            f"precision.fp8={precision.fp8} needs Transformer Engine; install it and set "
            "model.backend=transformer_engine, or leave precision.fp8 out"
        )


def overlaps(parallel: Any) -> Problems:
    """Overlaps that other settings make impossible are refused, not ignored."""
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )
    if parallel.overlap_p2p and parallel.chunks == 1:
        yield "parallel.overlap_p2p=true needs the interleaved schedule; set parallel.chunks above 1 or leave it out"


def schedule_within_run(run: Any, schedule: Any) -> Problems:
    """A schedule that outlasts the run never reaches its peak or its floor."""
    if not run.steps:
        return
    if schedule.warmup_steps >= run.steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} leaves no step after the warm-up of run.steps={run.steps}; "
            f"use {max(0, run.steps // 10)} or fewer"
        )
    decay = schedule.decay_steps
    if schedule.kind == "constant" and decay is not None:
        yield "schedule.decay_steps has no effect with schedule.kind=constant; leave it out"
    if schedule.kind == "cosine" and decay is not None and decay <= schedule.warmup_steps:
        yield f"schedule.decay_steps={decay} ends before schedule.warmup_steps={schedule.warmup_steps}; use run.steps"
    if schedule.kind == "cosine" and decay is not None and decay > run.steps:
        yield f"schedule.decay_steps={decay} is beyond run.steps={run.steps}: the floor is never reached; leave it out"
    if schedule.kind == "wsd" and decay is not None and decay + schedule.warmup_steps > run.steps:
        yield (
            f"schedule.decay_steps={decay} + schedule.warmup_steps={schedule.warmup_steps} exceed run.steps={run.steps}"
        )


def sources_named_once(data: Any) -> Problems:
    """Ledger and metrics know a source by its name."""
    for setting in ("sources", "validation"):
        names = [source.name for source in getattr(data, setting)]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"data.{setting}: the name {name!r} is used {names.count(name)} times; give each source its own"
    if not data.sources:
        yield "data.sources is empty; name at least one indexed data set"
    if data.validate_every and not data.validation:
        yield f"data.validate_every={data.validate_every} has no effect without data.validation"


def watchdog_before_collectives(run: Any, watchdog: Any) -> Problems:
    """The watchdog can name the rank that hangs; a collective that runs out of time ends those that wait for it."""
    if watchdog.enabled and watchdog.timeout is not None and watchdog.timeout + 5 > run.collective_timeout:
        yield (
            f"watchdog.timeout={watchdog.timeout:g} leaves less than 5 s before run.collective_timeout="
            f"{run.collective_timeout:g} ends the ranks that wait; raise run.collective_timeout to "
            f"{2 * watchdog.timeout:g}, or lower watchdog.timeout"
        )


def retention_has_effect(checkpoint: Any) -> Problems:
    """What is to stay is saved in the first place, and nothing goes that was not read back."""
    keep, whole, weights = checkpoint.keep, checkpoint.keep_every, checkpoint.keep_weights_every
    for name, every in (("keep_every", whole), ("keep_weights_every", weights)):
        if every and not keep:
            yield f"checkpoint.{name}={every} has no effect with checkpoint.keep=0, which keeps all; leave it out"
        elif every and (not checkpoint.save_every or every % checkpoint.save_every):
            yield (
                f"checkpoint.{name}={every} is no multiple of checkpoint.save_every={checkpoint.save_every}, so those "
                "steps are not saved; use a multiple of it"
            )
    if whole and weights and weights % whole == 0:
        yield (
            f"checkpoint.keep_weights_every={weights} has no effect: checkpoint.keep_every={whole} keeps all of those "
            "whole; leave one of them out"
        )
    if keep and not checkpoint.read_back:
        yield (
            f"checkpoint.keep={keep} has no effect with checkpoint.read_back=false: nothing is deleted before a newer "
            "checkpoint was read back; use checkpoint.keep=0 or checkpoint.read_back=true"
        )


def load_from_somewhere(checkpoint: Any) -> Problems:
    """What is to be loaded must be named."""
    if checkpoint.load is not None and checkpoint.start_from is None:
        yield f"checkpoint.load={checkpoint.load} has no effect without checkpoint.start_from; leave it out"


def guard_window(guard: Any) -> Problems:
    """A guard that waits for more values than it keeps would wait for ever."""
    if guard.min_values > guard.window:
        yield (
            f"guard.min_values={guard.min_values} is above guard.window={guard.window}, so no spike would ever be "
            f"judged; use guard.min_values={guard.window} or less"
        )


CHECKS: tuple[Callable[..., Problems], ...] = (
    attention_shape,
    layers_over_stages,
    widths_over_tensor,
    vocabulary_padding,
    batch_over_replicas,
    sequence_over_tensor,
    sequence_within_model,
    recompute_over_layers,
    transformer_engine_only,
    overlaps,
    schedule_within_run,
    sources_named_once,
    watchdog_before_collectives,
    retention_has_effect,
    load_from_somewhere,
    guard_window,
)


class Problem(NamedTuple):
    """A sentence of a check."""

    check: str
    """Name of the check, or `settings`: what a section alone knows to be wrong."""
    text: str


def named_problems(parts: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems between the given parts, each with its check; checks whose parts are missing are passed over."""
    for check in CHECKS:
        wanted = list(inspect.signature(check).parameters)
        if all(name in parts for name in wanted):
            yield from (Problem(check.__name__, text) for text in check(*(parts[name] for name in wanted)))


def problems_of(parts: Mapping[str, Any]) -> list[str]:
    """Problems between the given parts, each a full sentence."""
    return [problem.text for problem in named_problems(parts)]
