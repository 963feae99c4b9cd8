"""What the planner plans: one training job, a model in a layout, flat and free of torch.

A run file becomes one by `Job.of`; the published runs that the time model is fitted on become one too, although their
models are no Llamas (two matrices in the feed-forward, biases, dropout, attention without a fused kernel).
"""

from dataclasses import dataclass
from typing import Literal

from megalemur.config.layers import chunk_layers
from megalemur.config.run import RunConfig

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the layers run on, as far as memory and time can tell."""

    flash_attention: bool = True
    """Scores are never written to memory. False: s x s scores and probabilities a head."""
    fused_swiglu: bool = False
    """One kernel that keeps its input only. False: torch's silu and product, which keep what they read."""
    fused_norm: bool = False
    """The norm keeps its input and a statistic a row. False: torch's rms_norm."""
    dropout: bool = False
    """Dropout behind attention and feed-forward, whose masks are kept (one byte an element)."""
    context_parallel: bool = False
    """Attention over a split sequence exists (Transformer Engine)."""
    attention_generation: Literal[2, 3] = 2
    """Of the fused attention kernel. 2: FlashAttention-2, torch's. 3: made for Hopper (FlashAttention-3, cuDNN)."""
    fused_cross_entropy: bool = False
    """One pass over the logits. False: fp32 copies of them."""
    tensor_overlap: Literal["none", "backward", "full"] = "backward"
    """What hides the tensor-parallel messages. backward: the products of the backward pass, as in megatron-core; full:
    forward products too, chunk by chunk (Transformer Engine's user buffers); none: Megatron-LM of 2021."""
    split_messages: bool = False
    """Pipeline messages are cut over TP also without sequence parallelism (Narayanan et al. 2021, section 4.1)."""
    biases: bool = False
    """Biases in the matrices; counted in time only, their bytes are nothing beside the matrices'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model, its batch and its layout. Sizes in tokens, samples, layers and processes; names as in the run file."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Padding for this layout included."""
    vocab_padding: int = 0
    """Rows of it that are padding, of no use for MFU. The loss masks them in a copy of the logits."""
    tie_embeddings: bool = False
    gated: bool = True
    """SwiGLU: three matrices in the feed-forward. False: two."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    packed: bool = False
    """Attention stays within documents, each a call of its own. Their lengths are unknown: time is that of one a
    window, which is the longest."""

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    layers: tuple[tuple[int, ...], ...]
    """Layers on each [stage][chunk]."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_p2p: bool = False

    precision: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """Of the matrix products; parameters are 2 bytes but for fp32."""
    grads_in_fp32: bool = True
    update_bytes: int = 0
    """Bytes a parameter that a rank updates, which the update allocates and frees again: 4 for fp32 copies of gradients
    in 16 bits, 4 for what torch.optim.AdamW has a tensor for. The fused kernel needs nothing."""
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    kernels: Kernels = Kernels()

    @classmethod
    def of(cls, config: RunConfig) -> "Job":
        """The job that a run file describes."""
        model, parallel, precision = config.model, config.parallel, config.precision
        engine = model.backend == "transformer_engine"
        wide_gradients = precision.reduce_grads_in_fp32 or precision.dtype == "fp32"
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            head_dim=model.head_dim,
            vocab_size=parallel.padded_vocab(model.vocab_size),
            vocab_padding=parallel.padded_vocab(model.vocab_size) - model.vocab_size,
            tie_embeddings=model.tie_embeddings,
            sequence_length=config.data.sequence_length,
            micro_batch_size=config.data.micro_batch_size,
            global_batch_size=config.data.global_batch_size,
            packed=config.data.document_mask == "intra" and not engine,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            chunks=parallel.chunks,
            context=parallel.context,
            data=parallel.data,
            sequence_parallel=parallel.sequence_parallel,
            layers=tuple(map(tuple, chunk_layers(model.num_layers, parallel))),
            distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            overlap_p2p=parallel.overlap_p2p,
            precision="fp8" if precision.fp8 else precision.dtype,
            grads_in_fp32=wide_gradients,
            update_bytes=(0 if wide_gradients else 4) + (4 if config.optim.kind == "adamw" else 0),
            recompute=precision.recompute,
            recompute_modules=precision.recompute_modules,
            recompute_method=precision.recompute_method,
            recompute_layers=precision.recompute_layers,
            kernels=Kernels(fused_norm=True, context_parallel=engine, attention_generation=3 if engine else 2),
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of a parameter and of an element of the activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step on each replica."""
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @property
    def tokens_per_step(self) -> int:
        """Tokens a step, over all replicas."""
        return self.global_batch_size * self.sequence_length

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch that one context-parallel rank holds."""
        return self.micro_batch_size * self.sequence_length // self.context

    @property
    def layer_parameters(self) -> int:
        """Matrix and norm parameters of one layer, before any split; biases left out."""
        h, kv = self.hidden_size, self.num_query_groups * self.head_dim
        query = self.num_attention_heads * self.head_dim
        return 2 * h * query + 2 * h * kv + (3 if self.gated else 2) * h * self.ffn_hidden_size + 2 * h
