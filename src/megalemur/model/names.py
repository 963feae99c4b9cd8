"""One table between megatron-core's parameters and Hugging Face's tensors: names, shapes and splits. Free of torch.

T tensor-parallel ranks, r this rank; H query heads in G groups of head size d; h hidden, f FFN, V vocabulary.
A fused `linear_qkv` holds, for each group, its H/G query heads, then its key, then its value; `linear_fc1` on rank r is
gate.chunk(T)[r] above up.chunk(T)[r], which is no chunk of the stacked matrix.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from megalemur.config.model import ModelConfig
from megalemur.parallel.boxes import Box, Segment

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Split:
    """How one rank's part is cut out of the whole model."""

    model: ModelConfig
    tensor: int
    """Tensor-parallel size (T)."""
    tp_rank: int
    padded_vocab: int
    """Rows of the embedding over all ranks, padding included."""


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model with its shape, in the order of the layers."""
    h, f, kv = model.hidden_size, model.ffn_hidden_size, model.num_query_groups * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, h)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (h,)
        shapes[prefix + "self_attn.q_proj.weight"] = (h, h)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv, h)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv, h)
        shapes[prefix + "self_attn.o_proj.weight"] = (h, h)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        shapes[prefix + "mlp.gate_proj.weight"] = (f, h)
        shapes[prefix + "mlp.up_proj.weight"] = (f, h)
        shapes[prefix + "mlp.down_proj.weight"] = (h, f)
    shapes[NORM] = (h,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, h)
    return shapes


def _share(size: int, split: Split) -> tuple[int, int]:
    """This rank's [start, stop) of `size` rows or columns."""
    part = size // split.tensor
    return split.tp_rank * part, (split.tp_rank + 1) * part


def _whole_vector(split: Split, name: str) -> list[Segment]:
    h = split.model.hidden_size
    return [Segment(name, (h,), Box((0,), (h,)), 0)]


def _vocabulary(split: Split, name: str) -> list[Segment]:
    h, v = split.model.hidden_size, split.model.vocab_size
    start, stop = _share(split.padded_vocab, split)
    stop = min(stop, v)
    return [Segment(name, (v, h), Box((start, 0), (stop, h)), 0)] if start < stop else []


def _columns(rows: Callable[[ModelConfig], int], columns: Callable[[ModelConfig], int]) -> "Rule":
    """A row-parallel matrix: every rank holds all rows of its columns."""

    def segments(split: Split, name: str) -> list[Segment]:
        shape = (rows(split.model), columns(split.model))
        start, stop = _share(shape[1], split)
        return [Segment(name, shape, Box((0, start), (shape[0], stop)), 0)]

    return segments


def _gate_up(split: Split, prefix: str) -> list[Segment]:
    shape = (split.model.ffn_hidden_size, split.model.hidden_size)
    start, stop = _share(shape[0], split)
    box = Box((start, 0), (stop, shape[1]))
    return [
        Segment(prefix + "gate_proj.weight", shape, box, 0),
        Segment(prefix + "up_proj.weight", shape, box, stop - start),
    ]


def _fused_qkv(split: Split, prefix: str) -> list[Segment]:
    model = split.model
    h, d, groups = model.hidden_size, model.head_dim, model.num_query_groups
    per_group = model.num_attention_heads // groups * d
    first, last = _share(groups * (per_group + 2 * d), split)
    found = []
    position = 0  # in the fused rows of the whole layer
    for group in range(groups):
        for part, rows, height in (("q", groups * per_group, per_group), ("k", groups * d, d), ("v", groups * d, d)):
            low, high = max(position, first), min(position + height, last)
            if low < high:
                start = group * height + low - position
                box = Box((start, 0), (start + high - low, h))
                found.append(Segment(f"{prefix}{part}_proj.weight", (rows, h), box, low - first))
            position += height
    return found


Rule = Callable[[Split, str], list[Segment]]

# megatron-core's name within a layer -> (Hugging Face name or prefix within the layer, rule). The two names of a norm
# are the torch backend's and Transformer Engine's, which fuses the norm into the linear layer behind it.
_LAYER: dict[str, tuple[str, Rule]] = {
    "input_layernorm.weight": ("input_layernorm.weight", _whole_vector),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", _whole_vector),
    "self_attention.linear_qkv.weight": ("self_attn.", _fused_qkv),
    "self_attention.linear_proj.weight": (
        "self_attn.o_proj.weight",
        _columns(lambda m: m.hidden_size, lambda m: m.hidden_size),
    ),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", _whole_vector),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", _whole_vector),
    "mlp.linear_fc1.weight": ("mlp.", _gate_up),
    "mlp.linear_fc2.weight": (
        "mlp.down_proj.weight",
        _columns(lambda m: m.hidden_size, lambda m: m.ffn_hidden_size),
    ),
}
_OUTSIDE: dict[str, tuple[str, Rule]] = {
    "embedding.word_embeddings.weight": (EMBEDDING, _vocabulary),
    "decoder.final_layernorm.weight": (NORM, _whole_vector),
    "output_layer.weight": (HEAD, _vocabulary),
}


def segments_of(parameter: str, layer_offset: int, split: Split) -> list[Segment]:
    """What a local parameter is made of, in Hugging Face coordinates.

    Args:
        parameter: megatron-core's name inside a model chunk, such as `decoder.layers.0.mlp.linear_fc1.weight`.
        layer_offset: layers of the model before this chunk's first.
        split: how this rank's part is cut.

    Raises:
        KeyError: a parameter that no Llama has.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    if match:
        name, rule = _LAYER[match[2]]
        return rule(split, f"model.layers.{int(match[1]) + layer_offset}.{name}")
    name, rule = _OUTSIDE[parameter]
    # a tied head on the last stage is the embedding's other home
    return rule(split, EMBEDDING if name == HEAD and split.model.tie_embeddings else name)
