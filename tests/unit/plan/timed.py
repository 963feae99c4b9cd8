"""Jobs for the tests of the time model: Llama presets in small layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megalemur.config.layers import chunk_layers
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.plan.cluster import Cluster, load_cluster
from megalemur.plan.job import Job, Kernels

ROOT = Path(__file__).parents[3]
H100, A100 = (
    load_cluster(str(ROOT / "launch" / "clusters" / f"{name}.yaml")) for name in ("h100_sxm", "a100_80gb_sxm")
)
ENGINE = Kernels(fused_swiglu=True, fused_norm=True, fused_cross_entropy=True, attention_generation=3)


def job(preset: str = "llama2_70b", *, sequence: int = 4096, micro: int = 1, batch: int = 128, **settings: Any) -> Job:
    """A preset in a layout; settings of ParallelConfig split it, all others are fields of Job."""
    model = ModelConfig.model_validate({"preset": preset})
    parallel = ParallelConfig(**{key: value for key, value in settings.items() if key in ParallelConfig.model_fields})
    made = Job(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=parallel.padded_vocab(model.vocab_size),
        vocab_padding=parallel.padded_vocab(model.vocab_size) - model.vocab_size,
        sequence_length=sequence,
        micro_batch_size=micro,
        global_batch_size=batch,
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
        kernels=ENGINE,
    )
    fields = {key: value for key, value in settings.items() if key not in ParallelConfig.model_fields}
    return replace(made, **fields)


def with_figures(cluster: Cluster, **figures: float) -> Cluster:
    """A cluster with other figures."""
    return cluster.model_copy(update=figures)
