"""Seconds of one transformer layer, of the embedding and of the output layer with the loss, by what they are spent on.

Letters: T tokens of a micro-batch on a context-parallel rank, h hidden, q and g widths of all query and key/value
heads, f feed-forward width, V vocabulary, t tensor-parallel size, e bytes an activation element. Bytes are counted
kernel by kernel.
"""

from typing import NamedTuple

from megalemur.plan.cluster import Cluster
from megalemur.plan.collectives import Links
from megalemur.plan.constants import Constants
from megalemur.plan.job import Job
from megalemur.plan.kernels import ATTENTION_BACKWARD, Device


class Seconds(NamedTuple):
    """A pass of something, by kind."""

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_messages: float = 0.0
    context_messages: float = 0.0
    output_layer: float = 0.0
    recompute: float = 0.0

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        """The sum with `times` the other."""
        return Seconds(*(a + times * b for a, b in zip(self, other, strict=True)))


class Passes(NamedTuple):
    """Forward and backward pass; what is computed again counts in the backward pass."""

    forward: Seconds
    backward: Seconds


def layer_key(job: Job) -> tuple[object, ...]:
    """What the times below depend on: jobs with equal keys have equal layers."""
    return (
        *(job.hidden_size, job.ffn_hidden_size, job.num_attention_heads, job.num_query_groups, job.head_dim),
        *(job.vocab_size, job.gated, job.sequence_length, job.micro_batch_size, job.tensor, job.context),
        *(job.sequence_parallel, job.precision, job.grads_in_fp32, job.recompute_modules, job.kernels),
    )


class LayerModel:
    """Times of the layers of one job on one cluster."""

    def __init__(self, job: Job, cluster: Cluster, constants: Constants):
        self._job, self._constants = job, constants
        self._device, self._links = Device.of(cluster, constants), Links.of(cluster, constants)
        self._hopper = cluster.architecture != "ampere"
        self._tokens = job.tokens_per_rank
        self._query = job.num_attention_heads * job.head_dim / job.tensor
        self._key = job.num_query_groups * job.head_dim / job.tensor
        self._wide = job.ffn_hidden_size / job.tensor
        self._unit = self._links.ring(float(job.element_bytes * self._tokens * job.hidden_size), job.tensor, 1)

    def _products(self, precision: str, shapes: tuple[tuple[float, float], ...]) -> tuple[float, float, float]:
        """Forward, input-gradient and weight-gradient seconds of linear layers of (inputs, outputs)."""
        device, rows, grad = self._device, self._tokens, 4 if self._job.grads_in_fp32 else 2
        forward = sum(device.product(rows, n, k, precision) for k, n in shapes)
        inputs = sum(device.product(rows, k, n, precision) for k, n in shapes)
        weights = sum(device.product(n, k, rows, precision, accumulate=grad) for k, n in shapes)
        return forward, inputs, weights

    def _attention_shapes(self) -> tuple[tuple[float, float], ...]:
        hidden = float(self._job.hidden_size)
        return (hidden, self._query + 2 * self._key), (self._query, hidden)

    def _ffn_shapes(self) -> tuple[tuple[float, float], ...]:
        hidden = float(self._job.hidden_size)
        return (hidden, (2 if self._job.gated else 1) * self._wide), (self._wide, hidden)

    def layer(self) -> Passes:
        """One layer, nothing computed again."""
        shapes = (*self._attention_shapes(), *self._ffn_shapes())
        forward, inputs, weights = self._products(self._job.precision, shapes)
        core, core_backward = self._core()
        ring, ring_backward = self._context_messages(core, core_backward)
        bytes_forward, bytes_backward = self._bytes()
        tensor, tensor_backward = self._tensor_messages(forward, inputs, weights)
        return Passes(
            Seconds(
                matrices=forward,
                attention=core,
                elementwise=self._device.moved(bytes_forward),
                tensor_messages=tensor,
                context_messages=ring,
            ),
            Seconds(
                matrices=inputs + weights,
                attention=core_backward,
                elementwise=self._device.moved(bytes_backward),
                tensor_messages=tensor_backward,
                context_messages=ring_backward,
            ),
        )

    def repeated(self, passes: Passes) -> float:
        """Seconds that selective recompute adds to the backward pass of one layer."""
        modules, seconds = self._job.recompute_modules, 0.0
        if "core_attn" in modules:
            seconds += passes.forward.attention + passes.forward.context_messages
        if "mlp" in modules:
            # both products, what is between them, and the collectives around them
            seconds += self._products(self._job.precision, self._ffn_shapes())[0]
            seconds += self._device.moved(self._tokens * self._activation()[0]) + passes.forward.tensor_messages / 2
        return seconds

    def _core(self) -> tuple[float, float]:
        """Attention between the projections: forward and backward."""
        job, device = self._job, self._device
        length = job.sequence_length
        if job.kernels.flash_attention:
            flops = 2.0 * self._tokens * length * self._query
            rate = device.fused_attention(length / job.context, job.precision, job.kernels, hopper=self._hopper)
            forward = flops / rate
            return forward, 2.5 / ATTENTION_BACKWARD * forward
        heads = job.num_attention_heads // job.tensor * job.micro_batch_size
        scores = float(heads) * length * length
        one = device.product(length, length, job.head_dim, job.precision, batch=heads)
        other = device.product(length, job.head_dim, length, job.precision, batch=heads)
        e, dropped = job.element_bytes, (2 * job.element_bytes + 1 if job.kernels.dropout else 0)
        # softmax reads and writes scores; dropout reads, writes, and writes its mask; backward reads both operands
        forward = one + other + device.moved(scores * (2 * e + dropped))
        return forward, 2 * (one + other) + device.moved(scores * (3 * e + dropped))

    def _activation(self) -> tuple[float, float]:
        """Bytes a token of the feed-forward's activation."""
        wide = self._job.element_bytes * self._wide
        if not self._job.gated:
            return 2 * wide, 3 * wide
        if self._job.kernels.fused_swiglu:
            return 3 * wide, 5 * wide
        return 5 * wide, 10 * wide

    def _bytes(self) -> tuple[float, float]:
        """Bytes that the element-wise kernels of a layer move, forward and backward."""
        job = self._job
        width = job.hidden_size / (job.tensor if job.sequence_parallel else 1)
        rows = job.element_bytes * width
        norm, norm_backward = (2 * rows, 3 * rows) if job.kernels.fused_norm else (4 * rows, 7 * rows)
        mask = width if job.kernels.dropout else 0.0
        rotary = 2 * job.element_bytes * (self._query + self._key)
        act, act_backward = self._activation()
        forward = 2 * (norm + 3 * rows + mask) + rotary + act
        backward = 2 * (norm_backward + 3 * rows + 4 * mask) + rotary + act_backward
        if job.precision == "fp8":
            # every operand is read in 16 bits and written in 8 bits twice, as it is and transposed
            linear = (*self._attention_shapes(), *self._ffn_shapes())
            forward += 4 * sum(k for k, _ in linear)
            backward += 4 * sum(n for _, n in linear)
        return self._tokens * forward, self._tokens * backward

    def _hidden(self, messages: float, products: float) -> float:
        """What shows of messages that run beside products."""
        return max(self._constants.tensor_exposed * messages, messages - products)

    def _tensor_messages(self, forward: float, inputs: float, weights: float) -> tuple[float, float]:
        """Exposed seconds of a layer's tensor-parallel collectives; a unit is one all-gather or reduce-scatter.

        Forward 4 units: two all-gathers and two reduce-scatters, or two all-reduces. Backward the same; with sequence
        parallelism two all-gathers more, of inputs for the weights' gradients (Korthikanti et al. 2022, section 4.2.2).
        """
        unit, job = self._unit, self._job
        if not unit:
            return 0.0, 0.0
        # Transformer Engine gathers what fp8 products read in fp8: half the bytes
        gather = unit / 2 if job.precision == "fp8" and job.sequence_parallel else unit
        pair = 2 * (gather + unit)
        again = 2 * gather if job.sequence_parallel else 0.0
        if job.kernels.tensor_overlap == "none":
            return pair, pair + again
        if job.kernels.tensor_overlap == "full":
            return self._hidden(pair, forward), self._hidden(pair + again, inputs + weights)
        # megatron-core: gradients of a column-parallel layer's input travel beside its weights' gradient product,
        # gathered inputs beside the product before it; the gather before a row-parallel layer's backward is waited for
        if not job.sequence_parallel:
            return pair, self._hidden(pair, weights / 2)
        return pair, 2 * gather + self._hidden(2 * unit, weights / 2) + self._hidden(again, inputs / 2)

    def _context_messages(self, core: float, core_backward: float) -> tuple[float, float]:
        """Exposed seconds of the ring of keys and values, and the merging of its partial results."""
        job, ranks = self._job, self._job.context
        if ranks == 1:
            return 0.0, 0.0
        message = self._links.step(2.0 * job.element_bytes * self._tokens * self._key, ranks, job.tensor)
        steps = ranks - 1
        forward = steps * max(0.0, message - core / ranks)
        backward = steps * max(0.0, 2 * message - core_backward / ranks)
        # partial outputs are added in fp32, gradients of queries, keys and values as they are
        merge = steps * self._tokens * self._query * 12
        merge_backward = steps * self._tokens * (self._query + 2 * self._key) * 3 * job.element_bytes
        return forward + self._device.moved(merge), backward + self._device.moved(merge_backward)

    def embedding(self) -> Passes:
        """Looking rows up, and adding gradients to them."""
        job = self._job
        rows = self._tokens * job.hidden_size * job.element_bytes
        forward = self._device.moved(2.0 * rows) + self._unit
        return Passes(
            Seconds(elementwise=forward - self._unit, tensor_messages=self._unit),
            Seconds(elementwise=self._device.moved(5.0 * rows), tensor_messages=self._unit),
        )

    def output(self) -> Passes:
        """Last norm, logits and loss."""
        job = self._job
        precision = "bf16" if job.precision == "fp8" else job.precision
        shape = ((float(job.hidden_size), job.vocab_size / job.tensor),)
        forward, inputs, weights = self._products(precision, shape)
        logits = self._tokens * job.vocab_size / job.tensor
        # fp32 copies: cast, maximum, shift, exponential, sum, quotient; backward scale and cast
        read, again = (12, 8) if job.kernels.fused_cross_entropy else (38, 14)
        shown = self._unit if job.sequence_parallel else 0.0
        behind = self._hidden(2 * self._unit, weights)
        return Passes(
            Seconds(output_layer=forward + self._device.moved(read * logits) + shown),
            Seconds(output_layer=inputs + weights + self._device.moved(again * logits) + behind),
        )
