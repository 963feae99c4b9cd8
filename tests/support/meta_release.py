"""Meta's releases, made from a Hugging Face model by the rules of Meta's own model code, tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import torch

_LAYER = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}


def alternating(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head as Meta has them: the two halves by turns, since it rotates neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def meta_tensors(weights: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, tuple[torch.Tensor, Any]]:
    """Meta's name to the whole tensor and the dimension that it is split along."""
    found: dict[str, tuple[torch.Tensor, Any]] = {}
    for name, weight in weights.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, inside = name.split(".", 3)
        theirs, dimension = _LAYER[inside]
        if inside.startswith(("self_attn.q", "self_attn.k")):
            weight = alternating(weight, heads if inside.startswith("self_attn.q") else groups)
        found[f"layers.{layer}.{theirs}"] = (weight, dimension)
    found["norm.weight"] = (weights["model.norm.weight"], None)
    found["tok_embeddings.weight"] = (weights["model.embed_tokens.weight"], "embedding")
    if "lm_head.weight" in weights:
        found["output.weight"] = (weights["lm_head.weight"], 0)
    return found


def write_meta(directory: Path, source: Path, *, parts: int, embedding: int = 1, **params: Any) -> Path:
    """A release.

    Args:
        directory: to be made.
        source: Hugging Face directory of transformers.
        parts: files.
        embedding: dimension along which the embedding is split: 1 in Llama 1 and 2, 0 in Llama 3.
        params: keys of params.json that are other than the model's own; None: left out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    whole = meta_tensors(weights, config.num_attention_heads, config.num_key_value_heads)
    directory.mkdir(parents=True)
    for part in range(parts):
        content = {}
        for name, (weight, dimension) in whole.items():
            dimension = embedding if dimension == "embedding" else dimension
            piece = weight if dimension is None else weight.chunk(parts, dimension)[part]
            content[name] = piece.clone().contiguous()
        content["rope.freqs"] = torch.ones(config.hidden_size // config.num_attention_heads // 2)
        torch.save(content, directory / f"consolidated.{part:02d}.pth")
    said = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        **params,
    }
    (directory / "params.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return directory
