"""Weights in memory, for whatever reads a checkpoint by rows; and mistakes that converters make, to be caught."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.config.model import ModelConfig
from megalemur.model.names import EMBEDDING, HEAD, hf_shapes
from tests.support.tiny import SHAPE

Tensors = dict[str, torch.Tensor]


def tiny_model(**changes: Any) -> ModelConfig:
    """The architecture of tests.support.tiny.SHAPE, two layers deep."""
    return ModelConfig(**{**SHAPE, "num_layers": 2, **changes})


def random_tensors(model: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Matrices that keep the size of what they are multiplied with, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in hf_shapes(model).items():
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if len(shape) == 1 else values * (1.0 if name == EMBEDDING else shape[1] ** -0.5)
        found[name] = values.to(dtype)
    return found


class MemoryWeights:
    """A checkpoint's interface over tensors in memory."""

    def __init__(self, model: ModelConfig, tensors: Mapping[str, torch.Tensor], **kinds: Mapping[str, torch.Tensor]):
        self.model = model
        self._tensors = {Key(WEIGHT, name): tensors[name] for name in hf_shapes(model)}
        self._tensors |= {Key(kind, name): found[name] for kind, found in kinds.items() for name in hf_shapes(model)}
        self.dtypes = {key: tensor.dtype for key, tensor in self._tensors.items()}

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows of a tensor."""
        return self._tensors[key][first:last].clone()


def _interleaved_rotary(model: ModelConfig, tensors: Tensors) -> None:
    """Queries and keys as Meta has them: the pairs of a head are neighbours and not halves apart."""
    for part in "qk":
        weight = tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
        heads = weight.view(-1, 2, model.head_dim // 2, model.hidden_size)
        tensors[f"model.layers.0.self_attn.{part}_proj.weight"] = heads.transpose(1, 2).reshape(weight.shape)


def _swapped_gate_up(model: ModelConfig, tensors: Tensors) -> None:
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def _shifted_vocabulary(model: ModelConfig, tensors: Tensors) -> None:
    """A row of padding was taken for a token's: everything behind it is one row off."""
    for name in {EMBEDDING, HEAD} & tensors.keys():
        rows, at = tensors[name], model.vocab_size // 2
        tensors[name] = torch.cat([rows[:at], torch.zeros_like(rows[:1]), rows[at:-1]])


def _transposed_groups(model: ModelConfig, tensors: Tensors) -> None:
    """Rows of the keys counted by head dimension first and by group second."""
    weight = tensors["model.layers.0.self_attn.k_proj.weight"]
    groups = weight.view(model.num_query_groups, model.head_dim, model.hidden_size)
    tensors["model.layers.0.self_attn.k_proj.weight"] = groups.transpose(0, 1).reshape(weight.shape)


def _exchanged_groups(model: ModelConfig, tensors: Tensors) -> None:
    """Keys and values of two groups in each other's place."""
    for part in "kv":
        weight = tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
        groups = weight.view(model.num_query_groups, model.head_dim, model.hidden_size)
        tensors[f"model.layers.0.self_attn.{part}_proj.weight"] = groups.flip(0).reshape(weight.shape)


def _one_row(model: ModelConfig, tensors: Tensors) -> None:
    """The last token's row of the head is missing: zeros, as padding has them."""
    name = HEAD if HEAD in tensors else EMBEDDING
    tensors[name] = tensors[name].clone()
    tensors[name][-1] = 0


MISTAKES: dict[str, Callable[[ModelConfig, Tensors], None]] = {
    "interleaved rotary": _interleaved_rotary,
    "swapped gate and up": _swapped_gate_up,
    "shifted vocabulary": _shifted_vocabulary,
    "dropped row": _one_row,
    "transposed KV groups": _transposed_groups,
    "exchanged KV groups": _exchanged_groups,
}
"""What converters get wrong; each changes the tensors in place."""


def mistaken(mistake: str, model: ModelConfig, tensors: Tensors) -> Tensors:
    """The tensors with a mistake made in them."""
    changed = dict(tensors)
    MISTAKES[mistake](model, changed)
    return changed


def read_all(weights: Weights, kind: str = WEIGHT) -> Tensors:
    """Every tensor of a kind, whole, by its Hugging Face name."""
    shapes = hf_shapes(weights.model)
    return {key.name: weights.read(key, 0, shapes[key.name][0]) for key in weights.dtypes if key.kind == kind}


def same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and bits are the same."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )
