"""Every layout of a job on so many GPUs: those that fit, from the fastest on, and what to write for them.

A layout changes how a job is split and what it computes twice, never what it learns: model, sequence length and global
batch stay. Memory is asked for first, time only of what fits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from megalemur.plan.job import Job

_CONTEXT = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits."""

    job: Job
    seconds: float
    """A step, predicted."""
    peak_bytes: int
    """On the fullest stage."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search saw."""

    candidates: tuple[Candidate, ...]
    """Layouts that fit, the fastest first."""
    tried: int
    """Layouts whose memory was asked for, those that do not fit included."""


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def splits_of_depth(num_layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Layers on each stage: the even split, and those with fewer on the first and the last stage, which hold more.

    The first stage holds the embedding too, the last one the output layer and the loss. A run file says how many
    layers these two have; the stages between are alike, and here never smaller than they.
    """
    if num_layers % stages == 0:
        yield (num_layers // stages,) * stages
    if stages == 1:
        return
    least = -(-num_layers // stages)
    for between in (least, least + 1) if stages > 2 else (least + 1,):
        outer = num_layers - between * (stages - 2)
        for first in range((outer - 2) // 2, (outer + 3) // 2 + 1):
            last = outer - first
            counts = (first, *(between,) * (stages - 2), last)
            if 0 < first <= between and 0 < last <= between and abs(first - last) <= 2 and len(set(counts)) > 1:
                yield counts


def _recomputes(job: Job) -> Iterator[Job]:
    """From the fastest, which keeps everything, to the smallest, which keeps the inputs of layers."""
    yield replace(job, recompute="none")
    if not job.kernels.flash_attention:
        yield replace(job, recompute="selective", recompute_modules=("core_attn",))
    yield replace(job, recompute="selective", recompute_modules=("mlp",))
    fewest = min(count for stage in job.layers for count in stage)
    for count in sorted({fewest // 4, fewest // 2, 3 * fewest // 4} - {0, fewest}):
        yield replace(job, recompute="full", recompute_method="block", recompute_layers=count)
    yield replace(job, recompute="full", recompute_method="uniform", recompute_layers=1)


def _tensor_sizes(job: Job, *, gpus: int, gpus_per_node: int) -> Iterator[int]:
    """Tensor-parallel sizes that stay in a node and cut heads, key/value groups and feed-forward evenly."""
    for size in _divisors(gpus):
        groups = job.num_query_groups
        if size > gpus_per_node or gpus_per_node % size:
            continue
        if job.num_attention_heads % size or job.ffn_hidden_size % size or (groups % size and size % groups):
            continue
        yield size


def _pipelines(job: Job, stages: int) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
    """(chunks, layers on each [stage][chunk])."""
    for counts in splits_of_depth(job.num_layers, stages):
        shared = [d for d in _divisors(min(counts)) if all(count % d == 0 for count in counts)]
        for chunks in shared if stages > 1 else [1]:
            yield chunks, tuple((count // chunks,) * chunks for count in counts)


def layouts(job: Job, *, gpus: int, gpus_per_node: int, vocab_size: int, pad_vocab_to: int) -> Iterator[Job]:
    """Every layout of this job on `gpus` GPUs that a run file can say; recompute is left at none.

    Args:
        job: model, batch, precision and kernels.
        gpus: processes in all.
        gpus_per_node: tensor parallelism does not leave a node.
        vocab_size: true size of the vocabulary.
        pad_vocab_to: rows of padding a tensor-parallel rank, as in the run file.
    """
    for tensor in _tensor_sizes(job, gpus=gpus, gpus_per_node=gpus_per_node):
        multiple = pad_vocab_to * tensor
        vocabulary = -(-vocab_size // multiple) * multiple
        if vocabulary > 2 * vocab_size:
            continue  # more padding than vocabulary: a run file may not say so
        for context in _CONTEXT if job.kernels.context_parallel else (1,):
            cut = (tensor if tensor > 1 else 1) * (2 * context if context > 1 else 1)
            if (gpus // tensor) % context or job.sequence_length % cut:
                continue
            for stages in _divisors(gpus // tensor // context):
                if stages > job.num_layers:
                    break
                data = gpus // tensor // context // stages
                if job.global_batch_size % data:
                    continue
                base = replace(
                    job,
                    tensor=tensor,
                    context=context,
                    pipeline=stages,
                    data=data,
                    vocab_size=vocabulary,
                    vocab_padding=vocabulary - vocab_size,
                    sequence_parallel=tensor > 1,
                    recompute="none",
                )
                yield from _depths_and_batches(base)


def _depths_and_batches(base: Job) -> Iterator[Job]:
    """All splits of the depth and micro-batches of a layout."""
    a_replica = base.global_batch_size // base.data
    for chunks, layers in _pipelines(base, base.pipeline):
        for micro_batch in (d for d in (1, 2, 4, 8, 16) if a_replica % d == 0):
            if chunks > 1 and (a_replica // micro_batch) % base.pipeline:
                continue
            yield replace(
                base,
                chunks=chunks,
                layers=layers,
                micro_batch_size=micro_batch,
                overlap_p2p=base.overlap_p2p and chunks > 1,
            )


def search(
    candidates: Iterator[Job], *, limit_bytes: int, peak_bytes: Callable[[Job], int], seconds: Callable[[Job], float]
) -> Found:
    """The layouts that fit, the fastest first; each with every way to recompute that fits: the front needs them all.

    Args:
        candidates: from `layouts`.
        limit_bytes: memory of a GPU.
        peak_bytes: of the fullest stage of a job.
        seconds: of a step of a job.
    """
    found, tried = [], 0
    for layout in candidates:
        for job in _recomputes(layout):
            tried += 1
            peak = peak_bytes(job)
            if peak <= limit_bytes:
                found.append(Candidate(job, seconds(job), peak))
    return Found(tuple(sorted(found, key=lambda c: (c.seconds, c.peak_bytes))), tried)


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates than which no other is both faster and smaller; from the fastest to the smallest."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.seconds, c.peak_bytes)):
        if not front or candidate.peak_bytes < front[-1].peak_bytes:
            front.append(candidate)
    return tuple(front)


def overrides(job: Job) -> list[str]:
    """What to write behind the run file, or into it, for this layout."""
    stages = [sum(stage) for stage in job.layers]
    even = len(set(stages)) == 1
    settings: dict[str, object] = {
        "parallel.tensor": job.tensor,
        "parallel.pipeline": job.pipeline,
        "parallel.chunks": job.chunks,
        "parallel.context": job.context,
        "parallel.data": job.data,
        "parallel.sequence": "null",
        "parallel.first_stage_layers": "null" if even else stages[0],
        "parallel.last_stage_layers": "null" if even else stages[-1],
        "parallel.overlap_p2p": "true" if job.overlap_p2p else "false",
        "data.micro_batch_size": job.micro_batch_size,
        "precision.recompute": job.recompute,
    }
    if job.recompute == "selective":
        settings["precision.recompute_modules"] = "[" + ",".join(job.recompute_modules) + "]"
    if job.recompute == "full":
        settings["precision.recompute_method"] = job.recompute_method
        settings["precision.recompute_layers"] = job.recompute_layers
    return [f"{name}={value}" for name, value in settings.items()]
