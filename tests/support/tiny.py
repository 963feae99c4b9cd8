"""Small models, data sets and runs that the distributed tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalemur.config.load import parse_run
from megalemur.config.run import RunConfig
from megalemur.data.writer import IndexedWriter

SHAPE: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 251,
    "max_position_embeddings": 128,
}


def write_llama(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """A random Llama, weights of standard deviation 0.02, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPE, **changes}
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        max_position_embeddings=shape["max_position_embeddings"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.get("tie_embeddings", False),
        rope_parameters=shape.get("rope_parameters"),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # norms that are all one would hide a norm that is never loaded
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.to(dtype).save_pretrained(directory)
    return directory


def random_documents(vocab_size: int, seed: int, documents: int = 200) -> Iterator[Any]:
    """Documents of 5 to 60 random tokens."""
    generator = np.random.default_rng(seed)
    for _ in range(documents):
        yield generator.integers(0, vocab_size, generator.integers(5, 60))


def write_data(prefix: Path, *, vocab_size: int, seed: int, documents: int = 200) -> Path:
    """Random documents, without a manifest."""
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in random_documents(vocab_size, seed, documents):
            writer.add(document)
        writer.commit()
    return prefix


def tiny_run(directory: Path, *overrides: str, start_from: Path | None = None, **shape: Any) -> RunConfig:
    """A run of 10 steps on two sources in `directory`, from the Hugging Face directory or from scratch.

    The data sets are made on the first call.
    """
    model = {**SHAPE, **shape}
    for number, name in enumerate(("a", "b")):
        if not (directory / f"{name}.idx").exists():
            write_data(directory / name, vocab_size=model["vocab_size"], seed=number)
    start = f", start_from: {start_from}" if start_from else ""
    settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in model.items())
    text = f"""
run: {{name: tiny, steps: 10, collective_timeout: 90}}
model: {{{settings}}}
parallel: {{pad_vocab_to: 16}}
precision: {{dtype: fp32}}
optim: {{learning_rate: 1e-3}}
schedule: {{warmup_steps: 3}}
data:
  sequence_length: 32
  micro_batch_size: 2
  global_batch_size: 8
  sources: [{{name: a, path: {directory}/a, weight: 3}}, {{name: b, path: {directory}/b}}]
checkpoint: {{directory: {directory}/checkpoints{start}}}
log: {{directory: {directory}/log, tensorboard: false}}
"""
    return parse_run(text, overrides)
