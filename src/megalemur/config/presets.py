"""Architectures by name. Sizes from the models' published config.json files."""

from typing import Any

_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}


def _shape(num_layers: int, hidden_size: int, ffn_hidden_size: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # 8 layers, so that every layout of up to 8 processes has work for each stage and chunk.
    "tiny": {**_shape(8, 128, 344, 8, 4), "vocab_size": 2048, "max_position_embeddings": 512},
    "llama2_7b": {**_shape(32, 4096, 11008, 32, 32), **_LLAMA2},
    "llama2_13b": {**_shape(40, 5120, 13824, 40, 40), **_LLAMA2},
    "llama2_70b": {**_shape(80, 8192, 28672, 64, 8), **_LLAMA2},
    "llama3_8b": {**_shape(32, 4096, 14336, 32, 8), **_LLAMA3},
    "llama3_70b": {**_shape(80, 8192, 28672, 64, 8), **_LLAMA3},
}
