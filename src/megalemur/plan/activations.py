"""What one model chunk allocates while a micro-batch goes through it, allocation by allocation.

Each part of a chunk is a ledger: the bytes that torch and megatron-core 0.16 allocate (positive) and free (negative),
in the order in which they do it, forward and backward. What a forward ledger leaves behind is kept until the backward
one frees it; the highest prefix sum is the peak inside. The ledgers were read off traces of the real modules, and
dry_run.py holds them against new ones (docs/planner.md).

Letters: t tokens of a micro-batch on this rank, h hidden, f FFN width, T tensor-parallel ranks, e bytes an element.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from megalemur.plan.job import Job

Events = list[int]
"""Bytes allocated and, negative, freed."""


class Unit(NamedTuple):
    """One part of a chunk: the embedding, a layer, a group of recomputed layers, the output layer with the loss."""

    name: str
    kept: int
    """Bytes from its forward pass until its backward pass."""
    forward: int
    """Peak of the forward pass, above what was held before it."""
    backward: int
    """Peak of the backward pass, above what was held before it, its own kept bytes among that."""


class Run(NamedTuple):
    """Equal units, one after another."""

    times: int
    unit: Unit


class Chunk(NamedTuple):
    """What one chunk of a stage keeps a micro-batch, and its peaks."""

    kept: int
    """Bytes a micro-batch from the end of its forward pass to its backward pass."""
    forward: int
    """Peak of a forward pass, above what was held before it."""
    forward_unit: str
    """Part of the chunk in which that is."""
    backward: int
    """Peak of a backward pass, above what was held before it (the micro-batch's own kept bytes among that)."""
    backward_unit: str
    logits: int
    """Of the peaks, where they are in the output layer: logits, softmax and their gradients."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of the tensors of one micro-batch on one rank."""

    element: int
    tensor: int
    sequence_parallel: bool
    fused_norm: bool
    hidden: int
    """The residual stream, split over T with sequence parallelism: e t h / T."""
    gathered: int
    """The same, whole: e t h."""
    wide: int
    """The residual stream in fp32."""
    row: int
    """One fp32 figure a token of the residual stream."""
    query: int
    key: int
    qkv: int
    """The product of the first matrix of attention, as it stays: queries, keys and values in one."""
    qkv_local: int
    """The same before it is gathered; only where there are fewer key and value heads than ranks."""
    statistics: int
    """Log-sum-exp of the scores, fp32."""
    scores: int
    """s x s scores of every head; 0 with flash attention."""
    joined: int
    """Results of a window's documents, put together; 0 where a window is attended to as one."""
    rotary: int
    """Cosines and sines of queries and keys."""
    ffn: int
    logits: int
    softmax: int
    """Logits in fp32."""
    token: int
    """One byte a token."""
    weight_query: int
    weight_out: int
    weight_ffn: int
    """One matrix of the feed-forward."""
    weight_table: int

    @property
    def keeps_stream(self) -> bool:
        """Whether the norms keep their input itself: torch's keeps an fp32 copy where it is not fp32 already."""
        return self.fused_norm or self.element == 4


def _stream_split(job: Job) -> int:
    """Ranks over which sequence parallelism splits the residual stream."""
    return job.tensor if job.sequence_parallel else 1


def _sizes(job: Job) -> _Sizes:
    e, t, tensor, share = job.element_bytes, job.tokens_per_rank, job.tensor, _stream_split(job)
    head, h = job.head_dim, job.hidden_size
    replicated = job.num_query_groups < tensor
    query = job.num_attention_heads * head
    rows = query + 2 * job.num_query_groups * head
    key = head if replicated else job.num_query_groups * head // tensor
    flash = job.kernels.flash_attention
    return _Sizes(
        element=e,
        tensor=tensor,
        sequence_parallel=job.sequence_parallel,
        fused_norm=job.kernels.fused_norm,
        hidden=e * t * h // share,
        gathered=e * t * h,
        wide=4 * t * h // share,
        row=4 * t // share,
        query=e * t * query // tensor,
        key=e * t * key,
        qkv=e * t * (rows if replicated else rows // tensor),
        qkv_local=e * t * rows // tensor if replicated else 0,
        statistics=4 * t * job.num_attention_heads // tensor,
        scores=0 if flash else e * t * job.sequence_length * job.num_attention_heads // tensor,
        joined=e * t * query // tensor if job.packed else 0,
        rotary=4 * e * (t if job.packed else job.sequence_length // job.context) * head,
        ffn=e * t * job.ffn_hidden_size // tensor,
        logits=e * t * job.vocab_size // tensor,
        softmax=4 * t * job.vocab_size // tensor,
        token=t,
        weight_query=e * rows * h // tensor,
        weight_out=e * query * h // tensor,
        weight_ffn=e * job.ffn_hidden_size * h // tensor,
        weight_table=e * job.vocab_size * h // tensor,
    )


def _peak(events: Sequence[int]) -> int:
    return max(accumulate(events), default=0)


def _norm(s: _Sizes) -> Events:
    """x is alive; its norm stays, with what the backward pass reads."""
    if s.fused_norm:
        return [s.hidden, s.row]
    if s.element == 4:
        return [s.wide, -s.wide, s.row, s.wide, s.hidden]
    return [s.wide, s.wide, -s.wide, s.row, s.wide, s.wide, s.hidden, -s.wide]


def _norm_backward(s: _Sizes, *, residual: bool) -> Events:
    """The gradient of the norm becomes that of x, to which the residual's is added; what was kept goes."""
    h, n = s.hidden, s.wide
    add = [h, -h, -h] if residual else []
    if s.fused_norm:
        return [h, -h, -s.row, *add, -h]
    squares = [n, n, n, n, -n, -n, -n]
    products = [n, n, -n, -n]
    if s.element == 4:
        return [n, n, -n, -n, -n, *products, *add, *squares, -n, n, -n, -n, -s.row]
    return [n, -h, n, n, -n, -n, -n, *products, *squares, -n, n, -n, -n, h, -n, -s.row, *add]


def _row_parallel(s: _Sizes) -> Events:
    """Product with a matrix split by columns, summed over the ranks and added to the residual stream: a new tensor."""
    product = [s.gathered, s.hidden, -s.gathered] if s.sequence_parallel else [s.gathered]
    return [*product, s.hidden, -s.hidden]


def _row_parallel_backward(s: _Sizes, weight: int, given: int, kept: int) -> Events:
    """Leaves the gradient of what the matrix was given; `kept` bytes of that go."""
    gather = s.gathered if s.sequence_parallel else 0
    return [gather, given, weight, -gather, -kept, -weight]


def _column_parallel_backward(s: _Sizes, weight: int, gradient: int) -> Events:
    """From the gradient of the product to that of the norm before it, whose output goes."""
    if s.sequence_parallel:
        return [s.gathered, s.hidden, weight, -s.gathered, -gradient, -s.hidden, -weight]
    return [s.gathered, weight, -gradient, -s.hidden, -weight]


def _rotate(size: int) -> Events:
    return [size, size // 2, size, -(size // 2), size, -size, size, -size, -size, size, -size]


def _rotate_backward(size: int) -> Events:
    half = size // 2
    return [size, half, size, -size, -half, size, size, -size, -size, size, -size, size, -size, -size]


def _grouped(job: Job) -> bool:
    """Whether queries lie between keys and values of several groups on a rank, and so are copied out."""
    local_groups = job.num_query_groups // job.tensor
    return local_groups > 1 and job.num_attention_heads > job.num_query_groups


def _core_attention(job: Job, s: _Sizes) -> Events:
    """Queries, keys and values are there; the result stays, with what the backward pass reads."""
    if not s.scores:
        return [s.query, s.statistics, s.joined]
    mask = [s.scores // s.element, s.scores] if job.kernels.dropout else []
    return [s.scores, s.scores, -s.scores, *mask, s.query]


def _core_attention_backward(job: Job, s: _Sizes) -> Events:
    """The gradient of the result becomes those of query, key and value; all that attention kept goes."""
    kept = sum(_core_attention(job, s))
    work = [s.scores, s.scores, -s.scores, -s.scores] if s.scores else []
    joined = s.query + 2 * s.key if s.joined else 0
    return [*work, s.query, 2 * s.key, joined, -joined, -s.query, -s.key, -s.query, -s.qkv, -kept]


def _attention(job: Job, s: _Sizes) -> Events:
    product = [s.qkv_local, s.qkv, s.qkv, -s.qkv, -s.qkv_local] if s.qkv_local else [s.qkv]
    copy = s.query if _grouped(job) else 0
    core = _core_attention(job, s)
    if job.recompute == "selective" and "core_attn" in job.recompute_modules:
        core = [*core, s.query - sum(core)]
    dropped = s.hidden // s.element if job.kernels.dropout else 0
    rotated = [copy, s.rotary, *_rotate(s.query), *_rotate(s.key)]
    return [*_norm(s), *product, *rotated, *core, *_row_parallel(s), -copy, dropped]


def _attention_backward(job: Job, s: _Sizes) -> Events:
    again: Events = []
    if job.recompute == "selective" and "core_attn" in job.recompute_modules:
        again = [-s.query, *_core_attention(job, s)]
    gradient = s.query + 2 * s.key
    gathered = [s.qkv, -gradient, s.qkv, -s.qkv, s.qkv_local, -s.qkv] if s.qkv_local else []
    dropped = s.hidden // s.element if job.kernels.dropout else 0
    return [
        -dropped,
        *_row_parallel_backward(s, s.weight_out, s.query, 0),
        *again,
        *_core_attention_backward(job, s),
        -s.rotary,
        *_rotate_backward(s.key),
        *_rotate_backward(s.query),
        gradient,
        -gradient,
        *gathered,
        *_column_parallel_backward(s, s.weight_query, s.qkv_local or gradient),
        *_norm_backward(s, residual=True),
    ]


def _activation(job: Job, s: _Sizes) -> Events:
    """First matrix of the feed-forward and what lies between it and the second."""
    if not job.gated:
        return [s.ffn, s.ffn]
    return [2 * s.ffn, s.ffn] if job.kernels.fused_swiglu else [2 * s.ffn, s.ffn, s.ffn, s.ffn]


def _activation_backward(job: Job, s: _Sizes) -> Events:
    """From the gradient of the second matrix' input to that of the first one's output."""
    f = s.ffn
    if not job.gated:
        return [f, -f, -f]
    if job.kernels.fused_swiglu:
        return [2 * f, -f, -2 * f]
    return [f, f, -f, -f, -f, f, -f, -2 * f, 2 * f, -f, -f]


def _feed_forward(job: Job, s: _Sizes) -> Events:
    inner = [*_activation(job, s), *_row_parallel(s)]
    if job.recompute == "selective" and "mlp" in job.recompute_modules:
        inner.append(-sum(_activation(job, s)))
    dropped = s.hidden // s.element if job.kernels.dropout else 0
    return [*_norm(s), *inner, dropped]


def _feed_forward_backward(job: Job, s: _Sizes) -> Events:
    again, output = [], 0
    if job.recompute == "selective" and "mlp" in job.recompute_modules:
        output = s.hidden
        again = [*_activation(job, s), s.gathered, output, -s.gathered]
    dropped = s.hidden // s.element if job.kernels.dropout else 0
    return [
        -dropped,
        *again,
        *_row_parallel_backward(s, s.weight_ffn, s.ffn, s.ffn),
        *_activation_backward(job, s),
        *_column_parallel_backward(s, (2 if job.gated else 1) * s.weight_ffn, (2 if job.gated else 1) * s.ffn),
        -output,
        *_norm_backward(s, residual=True),
    ]


def _layer(job: Job, s: _Sizes) -> Unit:
    """One layer that keeps its activations. Its input is held while it runs and, where norms keep it, after that."""
    # a norm that keeps its input keeps the stream before attention and the one before the feed-forward
    kept_stream = s.hidden if s.keeps_stream else 0
    forward = [s.hidden, *_attention(job, s), *_feed_forward(job, s)]
    forward += [kept_stream - s.hidden, kept_stream - s.hidden, -s.hidden]
    backward = [s.hidden, *_feed_forward_backward(job, s), *_attention_backward(job, s), -s.hidden]
    return Unit("layer", sum(forward), _peak(forward), _peak(backward))


def _recomputed(job: Job, s: _Sizes, layer: Unit, layers: int) -> Unit:
    """Layers whose activations are computed again in one go; only their input stays."""
    # without gradients a tensor goes as soon as nothing reads it any more, so one layer's feed-forward is the most
    alone = [*_activation(job, s), s.ffn - sum(_activation(job, s)), *_row_parallel(s)]
    forward = max(s.hidden + _peak(_attention(job, s)), 3 * s.hidden + _peak(alone))
    same = s.hidden if s.keeps_stream else 0  # the first norm keeps the input, which is there already
    again = (layers - 1) * layer.kept + layer.forward - s.hidden
    backward = layers * layer.kept + s.hidden + layer.backward - same  # with the recomputed output
    return Unit("recomputed layer", s.hidden, forward, max(again, backward))


def _embedding(job: Job, s: _Sizes) -> Unit:
    masked = 9 * s.token if s.tensor > 1 else 0
    gather = [s.gathered, -s.hidden] if s.sequence_parallel else []
    copy = s.gathered if s.tensor > 1 else 0
    source = s.gathered if s.sequence_parallel else s.hidden
    forward = [masked, s.gathered, s.hidden, -s.gathered, -s.hidden]
    backward = [s.hidden, *gather, copy, -copy, s.weight_table, -s.weight_table, -source, -masked]
    return Unit("embedding", sum(forward), _peak(forward), _peak(backward))


def _output(job: Job, s: _Sizes) -> Unit:
    """Final norm, output layer and loss. Cross entropy is taken in fp32 and keeps the softmax."""
    masked = s.logits if job.vocab_padding else 0
    labels = 13 * s.token
    kept_stream = s.hidden if s.keeps_stream else 0
    wide = [] if s.element == 4 else [s.softmax, -s.logits]
    forward = [s.hidden, *_norm(s), kept_stream - s.hidden, s.logits, masked, *wide, labels, -masked]
    narrow = [] if s.element == 4 else [s.logits, -s.softmax]
    backward = [
        *narrow,
        masked,
        -masked,
        *_column_parallel_backward(s, s.weight_table, s.logits),
        *_norm_backward(s, residual=False),
        -labels,
        -s.hidden,
    ]
    return Unit("output layer", sum(forward), _peak(forward), _peak(backward))


def _layers(job: Job, s: _Sizes, count: int) -> list[Run]:
    layer = _layer(job, s)
    if job.recompute != "full":
        return [Run(count, layer)]
    if job.recompute_method == "uniform":
        return [Run(count // job.recompute_layers, _recomputed(job, s, layer, job.recompute_layers))]
    again = min(job.recompute_layers, count)
    return [Run(again, _recomputed(job, s, layer, 1)), Run(count - again, layer)]


@lru_cache(maxsize=4096)
def chunk_of(job: Job, layers: int, first: bool, last: bool) -> Chunk:
    """What a chunk allocates a micro-batch.

    Args:
        job: the job.
        layers: in this chunk.
        first: it begins with the embedding.
        last: it ends with the output layer and the loss.
    """
    s = _sizes(job)
    layer_runs = [run for run in _layers(job, s, layers) if run.times]
    runs = [
        *([Run(1, _embedding(job, s))] if first else []),
        *layer_runs,
        *([Run(1, _output(job, s))] if last else []),
    ]
    # the schedule holds what a chunk received, and the forward pass its embedding; where layers keep it, they count it
    given = 0 if s.keeps_stream or job.recompute == "full" else s.hidden
    held, forward, forward_unit = given, 0, ""
    for run in runs:
        count, unit = run
        alone = unit.forward - (given if run is layer_runs[0] else 0)  # its input is what was given
        peak = held + max(alone, (count - 1) * unit.kept + unit.forward if count > 1 else 0)
        held += count * unit.kept
        if peak > forward:
            forward, forward_unit = peak, unit.name
    held -= given if first else 0
    tied = s.weight_table if first and last and job.tie_embeddings else 0
    kept, backward, backward_unit = held, 0, ""
    for count, unit in reversed(runs):
        work = unit.backward + (0 if unit.name == "output layer" else tied)
        if unit.name == "embedding":
            work = max(work, 3 * tied)  # both gradients of a tied table and their sum
        peak = held - kept + work
        held -= count * unit.kept
        if peak > backward:
            backward, backward_unit = peak, unit.name
    logits = s.logits + s.softmax if last else 0
    return Chunk(kept, forward, forward_unit, backward, backward_unit, logits)


def message_bytes(job: Job) -> int:
    """One pipeline message: the residual stream of a micro-batch on this rank, or its gradient."""
    return job.element_bytes * job.tokens_per_rank * job.hidden_size // _stream_split(job)


def standing_buffers(job: Job) -> int:
    """Bytes that stay between micro-batches: the buffer into which sequence parallelism gathers, and rotary angles."""
    s = _sizes(job)
    angles = 4 * job.sequence_length * job.head_dim * job.chunks  # each chunk computes its own
    return (s.gathered if s.sequence_parallel else 0) + angles
