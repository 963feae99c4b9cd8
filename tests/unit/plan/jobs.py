"""Jobs that the planner's tests share."""

from dataclasses import replace
from typing import Any

from megalemur.config.layers import chunk_layers
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.plan.job import Job, Kernels


def job_of(preset: str = "llama2_7b", *, num_layers: int | None = None, **changes: Any) -> Job:
    """A Llama in a layout; sequence parallel where it is tensor parallel, kernels as on CUDA."""
    model = ModelConfig(preset=preset) if num_layers is None else ModelConfig(preset=preset, num_layers=num_layers)
    names = ("tensor", "pipeline", "chunks", "context", "data", "sequence", "first_stage_layers", "last_stage_layers")
    parallel = ParallelConfig(**{name: changes.pop(name) for name in names if name in changes})
    padded = parallel.padded_vocab(model.vocab_size)
    job = Job(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=padded,
        vocab_padding=padded - model.vocab_size,
        sequence_length=4096,
        micro_batch_size=1,
        global_batch_size=64 * parallel.data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        chunks=parallel.chunks,
        context=parallel.context,
        data=parallel.data,
        sequence_parallel=parallel.sequence_parallel,
        layers=tuple(map(tuple, chunk_layers(model.num_layers, parallel))),
        kernels=Kernels(fused_norm=True),
    )
    return replace(job, **changes)
