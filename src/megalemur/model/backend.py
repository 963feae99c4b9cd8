"""Which kernels the model runs on: chosen by the run file, never by what happens to be importable."""

import importlib.util
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megalemur.config.model import ModelConfig
from megalemur.model.layers import CoreAttention, RMSNorm

Backend = Literal["torch", "transformer_engine"]


def resolve_backend(model: ModelConfig) -> Backend:
    """The backend that this process will use.

    Raises:
        ValueError: Transformer Engine is asked for and not installed.
    """
    if model.backend != "transformer_engine":
        return "torch"  # auto too: Transformer Engine has not run on a GPU of ours (docs/gpu.md)
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "model.backend=transformer_engine, but Transformer Engine is not installed; "
            "install it (docs/installation.md) or set model.backend=torch"
        )
    return "transformer_engine"


def _torch_layer() -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return layer


def block_spec(backend: Backend, num_layers: int) -> TransformerBlockSubmodules:
    """megatron-core's description of `num_layers` Llama layers and the norm behind them."""
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec()
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=[_torch_layer()] * num_layers, layer_norm=RMSNorm)
