"""A Llama's forward pass in fp32, straight from a checkpoint: of its weights, a block of rows is in memory at a time.

Written down from the architecture and sharing no code with the model that is trained, so that neither can hide a
mistake of the other. RMSNorm (arXiv 1910.07467), rotary embeddings with a head's halves as pairs, as Hugging Face's
weights want it (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).

n tokens of all prompts together; h hidden, H query heads in G groups of head size d, f FFN, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from checkpoints_tools.errors import RequestError
from checkpoints_tools.mover import Progress, row_blocks
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.config.model import ModelConfig, RopeScaling
from megalemur.model.names import EMBEDDING, HEAD, NORM, hf_shapes

Prompts = Sequence[Sequence[int]]
"""Token ids, each prompt from position 0."""


def bytes_to_read(weights: Weights) -> int:
    """Of the layers, the last norm and the head: what a whole pass reports as progress."""
    shapes, head = hf_shapes(weights.model), head_of(weights.model)
    names = [name for name in shapes if name not in (EMBEDDING, HEAD)] + [head]
    return sum(math.prod(shapes[name]) * weights.dtypes[Key(WEIGHT, name)].itemsize for name in names)


def logits(weights: Weights, prompts: Prompts) -> torch.Tensor:
    """Logits of every token, [n, V]: for vocabularies whose rows fit into memory."""
    return head_columns(weights, last_hidden(weights, prompts), 0, weights.model.vocab_size)


def last_hidden(weights: Weights, prompts: Prompts, progress: Progress = lambda count: None) -> torch.Tensor:
    """What the head is applied to, [n, h]: behind the last layer and the final norm.

    Args:
        weights: the checkpoint.
        prompts: at least one token each.
        progress: told of the bytes that were read.

    Raises:
        RequestError: a prompt is empty, longer than the model's context, or has an id outside its vocabulary.
        DamagedCheckpoint: the checkpoint cannot be read, or is not what it says.
    """
    refuse_prompts(weights.model, prompts)
    model = weights.model
    streams = _Streams(weights, progress)
    lengths = [len(ids) for ids in prompts]
    rotary = _rotary(model, max(lengths))
    x = streams.embed([token for ids in prompts for token in ids])
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        x = x + _attention(streams, prefix, x, lengths, rotary)
        x = x + _mlp(streams, prefix, x)
    return streams.norm(x, NORM)


def head_columns(
    weights: Weights, hidden: torch.Tensor, first: int, last: int, progress: Progress = lambda count: None
) -> torch.Tensor:
    """Logits [n, last - first] of the ids [first, last).

    Args:
        weights: the checkpoint.
        hidden: of `last_hidden`, [n, h].
        first: id of the first column.
        last: the id behind the last column's.
        progress: told of the bytes that were read.
    """
    return hidden @ _Streams(weights, progress).rows(head_of(weights.model), first, last).T


def head_of(model: ModelConfig) -> str:
    """The tensor that makes logits."""
    return EMBEDDING if model.tie_embeddings else HEAD


def refuse_prompts(model: ModelConfig, prompts: Prompts) -> None:
    """Name what cannot be computed.

    Raises:
        RequestError: no prompts, an empty one, a longer one than the model's context, an id outside its vocabulary.
    """
    if not prompts:
        raise RequestError("there is no prompt to run; give at least one")
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise RequestError(f"prompt {number} is empty; write at least one token")
        if len(ids) > model.max_position_embeddings:
            limit = model.max_position_embeddings
            raise RequestError(f"prompt {number} has {len(ids)} tokens, the model's context {limit}; shorten it")
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise RequestError(f"prompt {number} has the id {wrong}, and the model knows 0 to {model.vocab_size - 1}")


class _Streams:
    """Products with matrices that are read a block of rows at a time."""

    def __init__(self, weights: Weights, progress: Progress):
        self.weights, self.model, self._progress = weights, weights.model, progress
        self._shapes = hf_shapes(weights.model)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows of the embedding, [n, h]; in their order in the file, for a row that is verified brings its chunk."""
        rows = {token: self.weights.read(Key(WEIGHT, EMBEDDING), token, token + 1).float() for token in sorted({*ids})}
        return torch.cat([rows[token] for token in ids])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of a weight in fp32."""
        found = self.weights.read(Key(WEIGHT, name), first, last)
        self._progress(found.nbytes)
        return found.float()

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """[first, last) of the rows that are in memory at once."""
        return row_blocks(self._shapes[name], torch.float32.itemsize)

    def products(self, x: torch.Tensor, name: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, last, x times the transposed rows), block by block."""
        for first, last in self.blocks(name):
            yield first, last, x @ self.rows(name, first, last).T

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x times the transposed weight, [n, rows of the weight]."""
        out = torch.empty(len(x), self._shapes[name][0])
        for first, last, columns in self.products(x, name):
            out[:, first:last] = columns
        return out

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.norm_eps)
        return self.rows(name, 0, self.model.hidden_size) * (x * scale)


def _attention(
    streams: _Streams,
    prefix: str,
    x: torch.Tensor,
    lengths: Sequence[int],
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The attention block's contribution, [n, h]; a prompt sees itself alone, and no token the ones behind it."""
    model, normed = streams.model, streams.norm(x, prefix + "input_layernorm.weight")
    parts = [streams.linear(normed, f"{prefix}self_attn.{part}_proj.weight") for part in "qkv"]
    heads = [part.view(len(x), -1, model.head_dim) for part in parts]
    repeat = model.num_attention_heads // model.num_query_groups
    out = torch.empty_like(heads[0])
    first = 0
    for length in lengths:
        q, k, v = (part[first : first + length].transpose(0, 1) for part in heads)
        q, k = _rotated(q, rotary, length), _rotated(k, rotary, length)
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        seen = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        out[first : first + length] = seen.transpose(0, 1)
        first += length
    return streams.linear(out.view(len(x), -1), prefix + "self_attn.o_proj.weight")


def _mlp(streams: _Streams, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """The SwiGLU block's contribution, [n, h]; gate and up meet block by block, so that one of them is whole."""
    normed = streams.norm(x, prefix + "post_attention_layernorm.weight")
    inner = silu(streams.linear(normed, prefix + "mlp.gate_proj.weight"), inplace=True)
    for first, last, columns in streams.products(normed, prefix + "mlp.up_proj.weight"):
        inner[:, first:last] *= columns
    return streams.linear(inner, prefix + "mlp.down_proj.weight")


def _rotary(model: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, [length, d / 2] each."""
    exponents = torch.arange(0, model.head_dim, 2).float() / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    if model.rope_scaling is not None:
        frequencies = _stretched(frequencies, model.rope_scaling)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3's scaling: a frequency that turns seldom within the original context is divided by the factor, one that
    turns often is kept, and between the two bounds it goes over from one to the other, linearly in the turns."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _rotated(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], length: int) -> torch.Tensor:
    """Queries or keys [heads, length, d], turned: element i of the first half and i of the second are a pair."""
    cos, sin = (angles[:length] for angles in rotary)
    a, b = heads.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
