"""What one rank of Megatron-LM holds: its parameters by megatron-core's names, their local shapes, and the keys that
older versions had for them.

Older versions nested their state (`language_model`, `encoder`, `layers.0.self_attention.query_key_value.weight`) and
called the same tensors otherwise. From version 2.0 of their checkpoints on, the rows of the fused matrices have the
order that megatron-core has (`megalemur.model.names`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.megatron_tensors import EMBEDDING, FINAL_NORM, HEAD
from megalemur.model.names import Split, segments_of

LAYER = re.compile(r"decoder\.layers\.(\d{1,5})\.(.+)")
_OLD_LAYER = re.compile(r"language_model\.(?:encoder|transformer)\.layers\.(\d{1,5})\.(.+)")
_OLD_IN_A_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "attention.dense.weight": "self_attention.linear_proj.weight",
    "post_attention_norm.weight": "pre_mlp_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}
_OLD = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.encoder.final_norm.weight": FINAL_NORM,
    "language_model.encoder.final_layernorm.weight": FINAL_NORM,
    "language_model.transformer.final_layernorm.weight": FINAL_NORM,
    "language_model.output_layer.weight": HEAD,
    "word_embeddings_for_head.weight": HEAD,
}
_MAX_NAME = 1024
_WRAPPER = re.compile(r"(?:module\.)+")
_STATELESS = re.compile(r".*(?:\._extra_state|rotary_pos_emb\.inv_freq)")

_LOCAL = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
# Transformer Engine keeps a norm in the linear layer behind it
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def flat_keys(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested state dict, by its dotted name; wrappers of modules are taken off.

    Raises:
        ConversionError: a name is longer than any parameter's.
    """
    for key, value in state.items():
        name = f"{prefix}{key}"
        if len(name) > _MAX_NAME:
            raise ConversionError(f"{name[:100]}...: no parameter has a name of more than {_MAX_NAME} characters")
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{name}.")
        else:
            yield _WRAPPER.sub("", name) if _WRAPPER.match(name) else name, value


def is_stateless(key: str) -> bool:
    """Whether a model computes this again, or needs it for FP8 alone."""
    return _STATELESS.fullmatch(key) is not None


def core_name(key: str) -> str:
    """megatron-core's name of what an older version called otherwise; others stay as they are."""
    layer = _OLD_LAYER.fullmatch(key)
    if layer and layer[2] in _OLD_IN_A_LAYER:
        return f"decoder.layers.{layer[1]}.{_OLD_IN_A_LAYER[layer[2]]}"
    return _OLD.get(key, key)


def parameters(layers: int, *, first: bool, last: bool, transformer_engine: bool) -> Iterator[str]:
    """Names of what a chunk of the model holds.

    Args:
        layers: in the chunk.
        first: whether the embedding is here.
        last: whether the final norm and the head are here.
        transformer_engine: its names of the norms instead of megatron-core's local ones.
    """
    if first:
        yield EMBEDDING
    for layer in range(layers):
        for name in _LOCAL:
            yield f"decoder.layers.{layer}.{_FUSED.get(name, name) if transformer_engine else name}"
    if last:
        yield FINAL_NORM
        yield HEAD


def extra_states(layers: int, *, last: bool, transformer_engine: bool) -> Iterator[str]:
    """Keys that a strict load looks for besides; without FP8 there is nothing in them."""
    modules = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    for layer in range(layers):
        yield from (f"decoder.layers.{layer}.{module}._extra_state" for module in modules)
    if last:
        if transformer_engine:
            yield "decoder.final_layernorm._extra_state"
        yield "output_layer._extra_state"


def local_shape(parameter: str, split: Split) -> tuple[int, ...]:
    """Of a rank's part, vocabulary padding included.

    Raises:
        KeyError: a parameter that no Llama has.
    """
    if parameter in (EMBEDDING, HEAD):
        return split.padded_vocab // split.tensor, split.model.hidden_size
    segments = segments_of(parameter, 0, split)
    return sum(segment.box.shape[0] for segment in segments), *segments[0].box.shape[1:]
