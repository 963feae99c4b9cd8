"""Rank files as Megatron-LM saves and loads them. What a rank holds is made of Hugging Face's tensors by cutting and
joining them, with nothing of what the converters use."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalemur.config.model import ModelConfig
from megalemur.config.run import RunConfig
from tests.support.training import forward_logits, start

Tensors = dict[str, torch.Tensor]
State = dict[str, Any]

_OLD = {
    "input_layernorm.weight": "input_norm.weight",
    "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
    "self_attention.linear_proj.weight": "self_attention.dense.weight",
    "pre_mlp_layernorm.weight": "post_attention_norm.weight",
    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
}


def file_of(directory: Path, tensor: int, stage: int | None = None) -> Path:
    """A rank's file in the directory of an iteration; no stage where there is no pipeline."""
    folder = f"mp_rank_{tensor:02d}" if stage is None else f"mp_rank_{tensor:02d}_{stage:03d}"
    return directory / folder / "model_optim_rng.pt"


def load_file(path: Path) -> State:
    """As Megatron-LM loads one."""
    return torch.load(path, map_location="cpu", weights_only=False)


def layer_state(weights: Mapping[str, torch.Tensor], model: ModelConfig, layer: int, tensor: int, rank: int) -> Tensors:
    """One layer of a tensor-parallel rank, by megatron-core's local names."""
    prefix, h, groups = f"model.layers.{layer}.", model.hidden_size, model.num_query_groups

    def part(name: str, axis: int = 0) -> torch.Tensor:
        return weights[f"{prefix}{name}.weight"].chunk(tensor, axis)[rank]

    heads = [weights[f"{prefix}self_attn.{one}_proj.weight"].view(groups, -1, h) for one in "qkv"]
    return {
        "input_layernorm.weight": weights[f"{prefix}input_layernorm.weight"],
        "self_attention.linear_proj.weight": part("self_attn.o_proj", 1),
        "self_attention.linear_qkv.weight": torch.cat(heads, 1).view(-1, h).chunk(tensor)[rank],
        "pre_mlp_layernorm.weight": weights[f"{prefix}post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([part("mlp.gate_proj"), part("mlp.up_proj")]),
        "mlp.linear_fc2.weight": part("mlp.down_proj", 1),
    }


def padded(table: torch.Tensor, rows: int) -> torch.Tensor:
    """With zeros behind the last row."""
    return torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])


def chunk_state(
    weights: Mapping[str, torch.Tensor],
    model: ModelConfig,
    layers: Sequence[int],
    *,
    tensor: int,
    rank: int,
    rows: int,
    ends: tuple[bool, bool],
    one_stage: bool = False,
) -> Tensors:
    """What a rank holds of consecutive layers.

    Args:
        weights: Hugging Face's.
        model: the architecture.
        layers: their numbers in the model.
        tensor: tensor-parallel ranks.
        rank: which of them.
        rows: of the embedding, padding included.
        ends: whether the embedding and whether the head are here.
        one_stage: no pipeline: a tied head is not stored again.
    """
    state: Tensors = {}
    if ends[0]:
        state["embedding.word_embeddings.weight"] = padded(weights["model.embed_tokens.weight"], rows)
    for number, layer in enumerate(layers):
        found = layer_state(weights, model, layer, tensor, rank)
        state |= {f"decoder.layers.{number}.{name}": value for name, value in found.items()}
    if ends[1]:
        state["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        if not (model.tie_embeddings and one_stage):
            head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
            state["output_layer.weight"] = padded(head, rows)
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & state.keys():
        state[name] = state[name].chunk(tensor)[rank]
    return state


def in_old_style(state: Tensors) -> State:
    """The same as Megatron-LM nested it before megatron-core."""
    encoder = {}
    for name, value in state.items():
        if name.startswith("decoder.layers."):
            number, inner = name.removeprefix("decoder.layers.").split(".", 1)
            encoder[f"layers.{number}.{_OLD[inner]}"] = value
    found: State = {"encoder": encoder}
    if "decoder.final_layernorm.weight" in state:
        encoder["final_norm.weight"] = state["decoder.final_layernorm.weight"]
        found["output_layer"] = {"weight": state["output_layer.weight"]}
    if "embedding.word_embeddings.weight" in state:
        found["embedding"] = {"word_embeddings": {"weight": state["embedding.word_embeddings.weight"]}}
    return {"language_model": found}


def save_ranks(
    directory: Path,
    weights: Mapping[str, torch.Tensor],
    model: ModelConfig,
    stages: Sequence[Sequence[Sequence[int]]],
    *,
    tensor: int = 1,
    args: Mapping[str, Any] | None = None,
    style: Callable[[Tensors], State] = dict,
) -> Path:
    """Files of all ranks, and the tracker.

    Args:
        directory: the one above the iteration's.
        weights: Hugging Face's.
        model: the architecture.
        stages: numbers of the layers of each chunk of each stage.
        tensor: tensor-parallel ranks.
        args: Megatron-LM's; None: the files have none.
        style: names of a chunk's state.
    """
    inner, rows = directory / "iter_0000010", -(-model.vocab_size // (8 * tensor)) * 8 * tensor
    for stage, chunks in enumerate(stages):
        for rank in range(tensor):
            tree: State = {"checkpoint_version": 3.0, "iteration": 10}
            tree |= {} if args is None else {"args": argparse.Namespace(**args)}
            for number, layers in enumerate(chunks):
                ends = stage == number == 0, stage == len(stages) - 1 and number == len(chunks) - 1
                split = {"tensor": tensor, "rank": rank, "rows": rows, "ends": ends, "one_stage": len(stages) == 1}
                key = "model" if len(chunks) == 1 else f"model{number}"
                # a clone: torch.save would write the whole of what a tensor is a view of
                state = {name: value.clone() for name, value in chunk_state(weights, model, layers, **split).items()}
                tree[key] = style(state)
            file = file_of(inner, rank, stage if len(stages) > 1 else None)
            file.parent.mkdir(parents=True)
            torch.save(tree, file)
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return directory


def edit_rank(path: Path, edit: Callable[[State], object]) -> None:
    """Load a rank's file, change what is in it, and save it."""
    tree = load_file(path)
    edit(tree)
    torch.save(tree, path)


def load_as_megatron(directory: Path, config: RunConfig, tokens: torch.Tensor) -> torch.Tensor | None:
    """In a rank's process: load the rank's file with strict=True into megatron-core's chunks; logits of `tokens`."""
    run = start(config)
    with torch.no_grad():
        for parameter in run.segments:
            parameter.fill_(float("nan"))
    pipeline = config.parallel.pipeline > 1
    tree = load_file(file_of(directory, run.place.tp_rank, run.place.pp_rank if pipeline else None))
    chunks = [chunk.module for chunk in run.engine.chunks]
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(tree["model" if len(chunks) == 1 else f"model{number}"], strict=True)
    return forward_logits(run, tokens)


def save_as_megatron(directory: Path, config: RunConfig, args: Mapping[str, Any]) -> None:
    """In a rank's process: build the run and save what its chunks hold as Megatron-LM does."""
    run = start(config)
    pipeline = config.parallel.pipeline > 1
    chunks = [chunk.module for chunk in run.engine.chunks]
    tree: State = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 7, "rng_state": [{}]}
    for number, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{number}"
        tree[key] = chunk.state_dict_for_save_checkpoint()
    file = file_of(directory, run.place.tp_rank, run.place.pp_rank if pipeline else None)
    file.parent.mkdir(parents=True)
    torch.save(tree, file)
