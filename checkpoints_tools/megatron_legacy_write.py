"""The format `megatron-legacy`, written: a file for each tensor-parallel rank and pipeline stage of one layout.

A `--load` directory of Megatron-LM: `release/` and a tracker that names it. That word says what this is, weights
without an optimizer: Megatron-LM then starts at iteration 0 and looks for no optimizer and no random state.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools.draft import write_frames
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.foreign import Framed, Namespace, PlannedTensor, combined_crc, frame_archive
from checkpoints_tools.layout import Frame, Layout, Options, Stretch, Written
from checkpoints_tools.megatron_args import arguments_of
from checkpoints_tools.megatron_dist import TOKENIZER, TRACKER
from checkpoints_tools.megatron_legacy import NAME
from checkpoints_tools.megatron_ranks import RELEASE, Place, rank_file
from checkpoints_tools.megatron_shards import extra_states, local_shape, parameters
from checkpoints_tools.megatron_tensors import HEAD
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import WEIGHT, Key, Region, contiguous
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.model.hf_config import CARRIED_FILES
from megalemur.model.names import Split, hf_shapes, segments_of
from megalemur.parallel.boxes import Segment

_LAYER = re.compile(r"model\.layers\.\d+\.")
_VERSION = 3.0
"""checkpoint_version of Megatron-LM since 2020."""


def lay_out(weights: Weights, source: Opened, options: Options) -> Layout:
    """The files of all ranks.

    Args:
        weights: what is written.
        source: where it comes from: its tokenizer goes along.
        options: tensor, pipeline, chunks, transformer_engine and pad_vocab_to are used.

    Raises:
        ConversionError: the model cannot be cut so, Megatron has no setting for its rotary scaling, or parts of one
            parameter have two dtypes.
    """
    refuse_unfit(weights.model, options)
    places = product(range(options.tensor), range(options.pipeline))
    ranks = [_plan(weights, options, place) for place in places]
    regions: dict[Key, list[Region]] = {}
    for rank in ranks:
        for key, region in rank.regions():
            regions.setdefault(key, []).append(region)
    small = {f"{RELEASE}/{TOKENIZER}/{name}": d for name, d in source.small_files.items() if name in CARRIED_FILES}
    return Layout(
        format=NAME,
        regions=regions,
        sizes={rank.file: rank.framed.size for rank in ranks},
        units=_units(weights.model),
        small_files={**small, TRACKER: RELEASE.encode()},
        crc=True,
        finish=_Finish(ranks),
    )


def refuse_unfit(model: ModelConfig, options: Options) -> None:
    """Compare the layout with the model.

    Raises:
        ConversionError: lists everything that does not divide.
    """
    found = list(_unfit(model, options))
    if found:
        raise ConversionError("this model cannot be laid out so:" + "".join(f"\n  - {problem}" for problem in found))


def _unfit(model: ModelConfig, options: Options) -> Iterator[str]:
    tensor, groups, parts = options.tensor, model.num_query_groups, options.pipeline * options.chunks
    if min(tensor, options.pipeline, options.chunks, options.pad_vocab_to) < 1:
        yield "--tensor, --pipeline, --chunks and --pad-vocab-to are 1 or more"
        return
    for what, size in (("attention heads", model.num_attention_heads), ("rows of the FFN", model.ffn_hidden_size)):
        if size % tensor:
            yield f"--tensor {tensor} does not divide {size} {what}"
    if groups % tensor and tensor % groups:
        yield f"--tensor {tensor} neither divides {groups} groups of key and value heads nor is a multiple of them"
    if model.num_layers % parts:
        yield f"--pipeline {options.pipeline} x --chunks {options.chunks} does not divide {model.num_layers} layers"
    if options.chunks > 1 and options.pipeline == 1:
        yield f"--chunks {options.chunks} needs --pipeline above 1: Megatron has no virtual chunks on one stage"


class _Planned(NamedTuple):
    """A tensor of a rank's file, and what its rows are made of."""

    tensor: PlannedTensor
    segments: Sequence[Segment]


@dataclass(frozen=True)
class _Rank:
    """A rank's file."""

    file: str
    tensors: Sequence[_Planned]
    framed: Framed

    def regions(self) -> Iterator[tuple[Key, Region]]:
        """Where the Hugging Face boxes go."""
        for tensor, segments in self.tensors:
            row_bytes = tensor.dtype.itemsize * torch.Size(tensor.shape[1:]).numel()
            for segment in segments:
                at = self.framed.offsets[tensor.name] + segment.first_row * row_bytes
                yield Key(WEIGHT, segment.name), contiguous(segment.box, self.file, at, tensor.dtype)

    def frames(self, stretches: Sequence[Stretch]) -> list[Frame]:
        """What stands around the tensors, which holds their CRCs.

        Args:
            stretches: of the file, in the order of their bytes.
        """
        crcs = {}
        for tensor, _ in self.tensors:
            first = self.framed.offsets[tensor.name]
            begin, end = (bisect_left(stretches, (at,)) for at in (first, first + tensor.bytes))
            crcs[tensor.name] = combined_crc(stretches[begin:end], first, tensor.bytes)
        return self.framed.frames(crcs)


class _Part(NamedTuple):
    """Consecutive layers of the model: a stage, or one of its virtual chunks."""

    model: ModelConfig
    options: Options
    number: int
    """In the order of the layers."""

    @property
    def layers(self) -> int:
        """How many."""
        return self.model.num_layers // (self.options.pipeline * self.options.chunks)

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.number == self.options.pipeline * self.options.chunks - 1

    def parameters(self) -> list[str]:
        """megatron-core's names. A stage with both ends has no second copy of a tied embedding."""
        te = self.options.transformer_engine
        names = parameters(self.layers, first=self.number == 0, last=self.is_last, transformer_engine=te)
        has_no_head = self.model.tie_embeddings and self.options.pipeline == 1
        return [name for name in names if name != HEAD or not has_no_head]

    def extra_states(self) -> dict[str, None]:
        """What a strict load looks for besides."""
        te = self.options.transformer_engine
        return dict.fromkeys(extra_states(self.layers, last=self.is_last, transformer_engine=te))

    def segments(self, name: str, split: Split) -> list[Segment]:
        """What a parameter is made of."""
        return segments_of(name, self.number * self.layers, split)


def _plan(weights: Weights, options: Options, place: Place) -> _Rank:
    """The file of one rank."""
    tensor, stage = place
    padded = ParallelConfig(tensor=options.tensor, pad_vocab_to=options.pad_vocab_to).padded_vocab(
        weights.model.vocab_size
    )
    split = Split(weights.model, options.tensor, tensor, padded)
    tree: dict[str, Any] = {
        "args": Namespace(_arguments(weights, options, padded)),
        "checkpoint_version": _VERSION,
        "iteration": 0,  # Megatron-LM wants the key, and takes no step from a release
    }
    tensors: list[_Planned] = []
    for chunk in range(options.chunks):
        key = "model" if options.chunks == 1 else f"model{chunk}"
        part = _Part(weights.model, options, chunk * options.pipeline + stage)
        planned = {
            name: PlannedTensor(f"{key}.{name}", _dtype(weights, part, name, split), local_shape(name, split))
            for name in part.parameters()
        }
        tree[key] = {**planned, **part.extra_states()}
        tensors += [_Planned(tensor, part.segments(name, split)) for name, tensor in planned.items()]
    return _Rank(f"{RELEASE}/{rank_file(place, with_stages=options.pipeline > 1)}", tensors, frame_archive(tree))


def _dtype(weights: Weights, part: _Part, name: str, split: Split) -> torch.dtype:
    """Of a parameter: that of everything it is made of on all ranks.

    Raises:
        ConversionError: there are several.
    """
    whole = part.segments(name, replace(split, tensor=1, tp_rank=0))
    dtypes = {segment.name: weights.dtypes[Key(WEIGHT, segment.name)] for segment in whole}
    if len(set(dtypes.values())) > 1:
        said = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ConversionError(f"{said}; Megatron keeps them in one tensor: ask for one dtype (--dtype)")
    return next(iter(dtypes.values()))


def _arguments(weights: Weights, options: Options, padded: int) -> dict[str, Any]:
    """Megatron-LM's arguments for the model in this layout."""
    dtypes = {dtype for key, dtype in weights.dtypes.items() if key.kind == WEIGHT}
    return {
        **arguments_of(weights.model, padded),
        "tensor_model_parallel_size": options.tensor,
        "pipeline_model_parallel_size": options.pipeline,
        "virtual_pipeline_model_parallel_size": options.chunks if options.chunks > 1 else None,
        "make_vocab_size_divisible_by": options.pad_vocab_to,
        "transformer_impl": "transformer_engine" if options.transformer_engine else "local",
        "bf16": dtypes == {torch.bfloat16},
        "fp16": dtypes == {torch.float16},
        "ckpt_format": "torch",
    }


def _units(model: ModelConfig) -> list[list[Key]]:
    """A layer at a time, and each tensor outside of the layers by itself."""
    units: dict[str, list[Key]] = {}
    for name in hf_shapes(model):
        layer = _LAYER.match(name)
        units.setdefault(layer[0] if layer else name, []).append(Key(WEIGHT, name))
    return list(units.values())


@dataclass(frozen=True)
class _Finish:
    """Writes what stands around the tensors, once their CRCs are known."""

    ranks: Sequence[_Rank]

    def __call__(self, directory: Path, written: Written) -> None:
        for rank in self.ranks:
            write_frames(directory / rank.file, rank.frames(written.stretches[rank.file]))
