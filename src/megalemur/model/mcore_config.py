"""The one place where what a model is and how it is split meet, in megatron-core's own config."""

import warnings

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig
from megalemur.parallel.device import batched_p2p

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _architecture(model: ModelConfig) -> dict[str, object]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_interleaved": False,  # Hugging Face's rotated halves: no permutation of the weights
    }


def _layout(parallel: ParallelConfig) -> dict[str, object]:
    batched = batched_p2p(parallel.pipeline, parallel.chunks) and not parallel.overlap_p2p
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.chunks if parallel.chunks > 1 else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence_parallel,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "batch_p2p_comm": batched,
        "overlap_p2p_comm": parallel.overlap_p2p,
        # freed outputs and messages still in flight give wrong gradients under gloo, in silence
        "deallocate_pipeline_outputs": parallel.pipeline > 1 and not parallel.overlap_p2p,
    }


def _recompute(precision: PrecisionConfig) -> dict[str, object]:
    if precision.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": precision.recompute_method,
            "recompute_num_layers": precision.recompute_layers,
        }
    if precision.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(precision.recompute_modules)}
    return {}


def mcore_config(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """megatron-core's config of this model in this layout."""
    dtype = DTYPES[precision.dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own defaults for CUDA graphs, which are not used
        return _transformer_config(model, parallel, precision, dtype)


def _transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, dtype: torch.dtype
) -> TransformerConfig:
    return TransformerConfig(
        **_architecture(model),
        **_layout(parallel),
        **_recompute(precision),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        fp8=precision.fp8,
        # Weights come from a checkpoint or from model/initial.py, alike in every layout, so nothing is drawn here. But
        # without perform_initialization megatron-core leaves out the marks that say which parameters are split, and the
        # gradient norm then counts rank 0's part only, in silence.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,  # sum over tokens / number of tokens: a mean of means is wrong with masks
        # fused kernels below need compiled extras of Apex or Transformer Engine
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
