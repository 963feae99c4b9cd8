"""megatron-core's global tensors, as torch_dist checkpoints name and shape them, in Hugging Face coordinates.

A global tensor is what a rank without tensor parallelism would hold, so the table of the model's own parameters
(`megalemur.model.names`) says what it is made of. Layers are stacked along a first axis, `decoder.layers.mlp...`, or
numbered, `decoder.layers.3.mlp...`; fc1 is gate above up, or two tensors `_w` and `_v`. Which part of a global tensor
is stored where is the checkpoint's affair: any box of it, or flat ranges of a grid of equal shards.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.regions import WEIGHT, Key, Region
from megalemur.config.model import ModelConfig
from megalemur.model.names import Split, segments_of
from megalemur.parallel.boxes import Box, Segment, flat_boxes, whole

EMBEDDING, HEAD, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)

_KINDS = {"param": "master", "fp32_param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_STATE = re.compile(rf"(?:chained_\d+\.)?optimizer\.state\.({'|'.join(_KINDS)})\.(.+)")
_WRAPPER = re.compile(r"(?:module\.|model\.)+")
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(\D.*)")
# one of two tensors that hold fc1's halves: rows of the one tensor begin here, in halves
_HALVES = {"mlp.linear_fc1.weight_w": 0, "mlp.linear_fc1.weight_v": 1}


class Named(NamedTuple):
    """What a key of a torch_dist checkpoint says."""

    kind: str
    """WEIGHT, or a kind of optimizer state."""
    layer: int | None
    """None: outside of the layers, or all of them stacked."""
    stacked: bool
    name: str
    """Within the layer, or of the whole tensor."""

    @property
    def in_layers(self) -> bool:
        """Whether this is a part of the transformer layers."""
        return self.stacked or self.layer is not None


class Stored(NamedTuple):
    """A box of a global tensor in a file."""

    box: Box
    file: str
    offset: int
    """Of its first element, in bytes."""
    strides: tuple[int, ...]
    """In elements."""
    dtype: torch.dtype

    def part(self, box: Box) -> "Stored":
        """A smaller box."""
        inner = box.relative_to(self.box)
        steps = sum(start * stride for start, stride in zip(inner.start, self.strides, strict=True))
        return self._replace(box=box, offset=self.offset + steps * self.dtype.itemsize)

    def layer(self, number: int) -> "Stored":
        """One layer of a stack, without the axis of the layers."""
        start, stop = (number, *self.box.start[1:]), (number + 1, *self.box.stop[1:])
        part = self.part(Box(start, stop))
        return part._replace(box=Box(start[1:], stop[1:]), strides=self.strides[1:])


def read_key(key: str) -> Named:
    """What a key names. NeMo's wrappers and the optimizer's prefixes are taken off."""
    state = _STATE.fullmatch(key)
    kind, name = (_KINDS[state[1]], state[2]) if state else (WEIGHT, key)
    wrapper = _WRAPPER.match(name)
    name = name[wrapper.end() :] if wrapper else name
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Named(kind, None, False, name)
    return Named(kind, int(layer[1]) if layer[1] else None, not layer[1], layer[2])


class Tensor:
    """A global tensor of a model: its shape, and the Hugging Face boxes that it is made of.

    Args:
        named: what its key says.
        model: the architecture.
        padded_vocab: rows of the embedding, padding included.

    Raises:
        KeyError: no Llama has such a tensor.
    """

    def __init__(self, named: Named, model: ModelConfig, padded_vocab: int):
        self.named, self._model = named, model
        self._split = Split(model, 1, 0, padded_vocab)
        self._half = _HALVES.get(named.name) if named.in_layers else None
        sample = self.segments(0 if named.stacked else named.layer)
        rows = max(segment.first_row + segment.box.shape[0] for segment in sample)
        rows = padded_vocab if named.name in (EMBEDDING, HEAD) and not named.in_layers else rows
        layers = (model.num_layers,) if named.stacked else ()
        self.shape = (*layers, rows, *sample[0].box.shape[1:])

    def segments(self, layer: int | None) -> list[Segment]:
        """What rows of one layer's tensor, or of one outside the layers, are made of."""
        if self._half is not None:
            half = segments_of(f"decoder.layers.{layer}.mlp.linear_fc1.weight", 0, self._split)[self._half]
            return [_at_the_top(half)]
        name = self.named.name if layer is None else f"decoder.layers.{layer}.{self.named.name}"
        return segments_of(name, 0, self._split)

    def regions(self, stored: Stored) -> Iterator[tuple[Key, Region]]:
        """Where the Hugging Face boxes of a stored box lie."""
        if not self.named.stacked:
            yield from self._layer_regions(stored, self.named.layer)
            return
        for layer in range(stored.box.start[0], stored.box.stop[0]):
            yield from self._layer_regions(stored.layer(layer), layer)

    def _layer_regions(self, stored: Stored, layer: int | None) -> Iterator[tuple[Key, Region]]:
        for segment in self.segments(layer):
            shift = (segment.first_row - segment.box.start[0], *(0 for _ in segment.box.start[1:]))
            common = segment.box.moved(shift).intersect(stored.box)
            if common is not None:
                box = common.moved([-step for step in shift])
                part = stored.part(common)
                row_bytes = stored.strides[0] * stored.dtype.itemsize
                yield (
                    Key(self.named.kind, segment.name),
                    Region(box, stored.file, part.offset, row_bytes, stored.dtype),
                )


def _at_the_top(segment: Segment) -> Segment:
    return Segment(segment.name, segment.shape, segment.box, 0)


def grid_boxes(shape: Sequence[int], size: Sequence[int], chunk: Stored) -> Iterator[Stored]:
    """Boxes of a global tensor that was saved as flat ranges: a grid of equal shards, each of them flat.

    Args:
        shape: of the global tensor.
        size: of the saved one: shards along every axis, then elements of a shard.
        chunk: a range of elements of one shard, in the coordinates of `size`.

    Raises:
        ConversionError: the shards do not divide the tensor.
    """
    shards = size[:-1]
    shard = tuple(extent // count if count else 0 for extent, count in zip(shape, shards, strict=True))
    fits = all(count * extent == whole_ for count, extent, whole_ in zip(shards, shard, shape, strict=True))
    if not fits or math.prod(shard) != size[-1] or any(extent != 1 for extent in chunk.box.shape[:-1]):
        raise ConversionError(f"{list(size)} is no grid of flat shards of a tensor of shape {list(shape)}")
    origin = tuple(index * extent for index, extent in zip(chunk.box.start[:-1], shard, strict=True))
    first = chunk.box.start[-1]
    for box, start in flat_boxes(shard, first, chunk.box.stop[-1]):
        offset = chunk.offset + (start - first) * chunk.strides[-1] * chunk.dtype.itemsize
        strides = contiguous_strides(box.shape)
        yield Stored(box.moved(origin), chunk.file, offset, strides, chunk.dtype)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_box_of(box: Box, shape: Sequence[int]) -> bool:
    """Whether a non-empty box lies inside a tensor of this shape."""
    return len(box.start) == len(shape) and whole(shape).intersect(box) == box
