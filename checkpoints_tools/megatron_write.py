"""The format `megatron`, written: a torch_dist checkpoint of the weights, for any layout that loads it.

A `--load` directory of Megatron-LM: `release/` and a tracker that names it. That word says what this is, weights
without an optimizer: Megatron-LM then starts at iteration 0 and looks for no optimizer and no random state, with no
further flag. megatron-core itself loads from `release/`.

One file for the embedding, one a layer, one for the final norm and the head; in a file one archive a parameter, as a
job without tensor parallelism would save it: fc1 as two boxes, gate above up. Layers are stacked along a first axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints_tools.draft import write_frames
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.foreign import (
    DcpChunk,
    DcpMetadata,
    DcpTensor,
    Framed,
    Namespace,
    PlannedTensor,
    combined_crc,
    dump_archive,
    dump_dcp_metadata,
    frame_archive,
)
from checkpoints_tools.layout import Frame, Layout, Options, Written
from checkpoints_tools.megatron_args import arguments_of
from checkpoints_tools.megatron_dist import BACKEND, COMMON, METADATA, NAME, TOKENIZER, TRACKER
from checkpoints_tools.megatron_tensors import EMBEDDING, FINAL_NORM, HEAD
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import WEIGHT, Key, Region, contiguous
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.config.strict_json import readable_json
from megalemur.model.hf_config import CARRIED_FILES
from megalemur.model.names import Split, segments_of
from megalemur.parallel.boxes import Segment

RELEASE = "release"

_IN_A_LAYER = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
# modules that ask for an extra state when a checkpoint is loaded; without FP8 there is nothing in it
_STATEFUL = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_NO_STATE = [None]
_STATEFUL_IN_TE = "decoder.final_layernorm"


class _Box(NamedTuple):
    """A box of a global tensor that gets an archive of its own."""

    key: str
    size: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    segments: tuple[Segment, ...]
    """Rows counted from the box's first."""


@dataclass(frozen=True)
class _Archive:
    """A box with its place in a file."""

    box: _Box
    dtype: torch.dtype
    file: str
    at: int
    framed: Framed

    @property
    def first(self) -> int:
        """Byte of the file where the elements begin."""
        return self.framed.offsets[self.box.key]

    @property
    def bytes(self) -> int:
        """Of the elements."""
        return torch.Size(self.box.sizes).numel() * self.dtype.itemsize

    def regions(self) -> Iterator[tuple[Key, Region]]:
        """Where the Hugging Face boxes go."""
        row_bytes = torch.Size(self.box.segments[0].box.shape[1:]).numel() * self.dtype.itemsize
        for segment in self.box.segments:
            offset = self.first + segment.first_row * row_bytes
            yield (
                Key(WEIGHT, segment.name),
                contiguous(segment.box, f"{RELEASE}/{self.file}", offset, self.dtype),
            )


def lay_out(weights: Weights, source: Opened, options: Options) -> Layout:
    """The files of a torch_dist checkpoint.

    Args:
        weights: what is written.
        source: where it comes from: tokenizer and step.
        options: transformer_engine, pad_vocab_to and tensor are used.

    Raises:
        ConversionError: rotary scaling that Megatron has no setting for, or parts of one parameter in two dtypes.
    """
    model = weights.model
    padded = ParallelConfig(tensor=options.tensor, pad_vocab_to=options.pad_vocab_to).padded_vocab(model.vocab_size)
    state = dump_archive(_NO_STATE)
    archives = list(_archives(_boxes(model, padded), weights, len(state)))
    regions: dict[Key, list[Region]] = {}
    units: dict[str, dict[Key, None]] = {}
    for archive in archives:
        for key, region in archive.regions():
            regions.setdefault(key, []).append(region)
            units.setdefault(archive.file, {})[key] = None
    sizes = {f"{RELEASE}/{archive.file}": archive.at + archive.framed.size for archive in archives}
    return Layout(
        format=NAME,
        regions=regions,
        sizes=sizes,
        units=[list(keys) for keys in units.values()],
        frames={f"{RELEASE}/{archives[0].file}": [Frame(0, state)]},
        small_files=_small_files(model, padded, source, _metadata(archives, model, len(state), options)),
        crc=True,
        finish=_Finish(archives),
    )


def _boxes(model: ModelConfig, padded: int) -> Iterator[tuple[int, _Box]]:
    """(number of the file, box) in the order of the files' bytes."""
    split = Split(model, 1, 0, padded)
    h, layers = model.hidden_size, model.num_layers
    yield 0, _Box(EMBEDDING, (padded, h), (0, 0), (padded, h), tuple(segments_of(EMBEDDING, 0, split)))
    for layer in range(layers):
        for name in _IN_A_LAYER:
            segments = segments_of(f"decoder.layers.{layer}.{name}", 0, split)
            shape = (sum(segment.box.shape[0] for segment in segments), *segments[0].box.shape[1:])
            for part in [[one] for one in segments] if name == "mlp.linear_fc1.weight" else [segments]:
                first = part[0].first_row
                moved = tuple(Segment(s.name, s.shape, s.box, s.first_row - first) for s in part)
                rows = sum(segment.box.shape[0] for segment in part)
                offsets = (layer, first, *(0 for _ in shape[1:]))
                yield layer + 1, _Box(f"decoder.layers.{name}", (layers, *shape), offsets, (1, rows, *shape[1:]), moved)
    yield layers + 1, _Box(FINAL_NORM, (h,), (0,), (h,), tuple(segments_of(FINAL_NORM, 0, split)))
    if not model.tie_embeddings:
        yield layers + 1, _Box(HEAD, (padded, h), (0, 0), (padded, h), tuple(segments_of(HEAD, 0, split)))


def _archives(boxes: Iterator[tuple[int, _Box]], weights: Weights, before: int) -> Iterator[_Archive]:
    """Boxes one behind the other in their files; the first file begins with `before` other bytes."""
    ends = {0: before}
    for number, box in boxes:
        dtypes = {segment.name: weights.dtypes[Key(WEIGHT, segment.name)] for segment in box.segments}
        if len(set(dtypes.values())) > 1:
            said = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
            raise ConversionError(f"{said}; Megatron keeps them in one tensor: ask for one dtype (--dtype)")
        dtype = dtypes[box.segments[0].name]
        at = ends.get(number, 0)
        framed = frame_archive(PlannedTensor(box.key, dtype, box.sizes), at)
        ends[number] = at + framed.size
        yield _Archive(box, dtype, f"__0_{number}.distcp", at, framed)


def _metadata(archives: Sequence[_Archive], model: ModelConfig, state_bytes: int, options: Options) -> bytes:
    """`.metadata`: every box of every global tensor, and the extra states, which are one and the same archive."""
    tensors: dict[str, DcpTensor] = {}
    for archive in archives:
        box = archive.box
        known = tensors.setdefault(box.key, DcpTensor(box.size, archive.dtype, ()))
        if known.dtype != archive.dtype:
            raise ConversionError(
                f"{box.key} would be {known.dtype} in one layer and {archive.dtype} in another, and Megatron stacks "
                "the layers: ask for one dtype (--dtype)"
            )
        chunk = DcpChunk(box.offsets, box.sizes, archive.file, archive.at, archive.framed.size)
        tensors[box.key] = known._replace(chunks=(*known.chunks, chunk))
    names = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{model.num_layers}"
        for module in _STATEFUL
        for layer in range(model.num_layers)
    ]
    names += [f"{_STATEFUL_IN_TE}._extra_state/shard_0_1"] if options.transformer_engine else []
    return dump_dcp_metadata(DcpMetadata(tensors, {name: (archives[0].file, 0, state_bytes) for name in names}))


def _small_files(model: ModelConfig, padded: int, source: Opened, metadata: bytes) -> dict[str, bytes]:
    # Megatron-LM wants the key, and takes no step from a release
    common = {"args": Namespace(arguments_of(model, padded)), "checkpoint_version": 3.0, "iteration": 0}
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    files = {METADATA: metadata, COMMON: dump_archive(common), BACKEND: readable_json(backend)}
    files |= {f"{TOKENIZER}/{name}": data for name, data in source.small_files.items() if name in CARRIED_FILES}
    return {**{f"{RELEASE}/{name}": data for name, data in files.items()}, TRACKER: RELEASE.encode()}


@dataclass(frozen=True)
class _Finish:
    """Writes what stands around the tensors in their archives: it holds their CRCs."""

    archives: Sequence[_Archive]

    def __call__(self, directory: Path, written: Written) -> None:
        by_file: dict[str, list[Frame]] = {}
        for archive in self.archives:
            stretches = written.stretches[f"{RELEASE}/{archive.file}"]
            crc = combined_crc(stretches, archive.first, archive.bytes)
            by_file.setdefault(archive.file, []).extend(archive.framed.frames({archive.box.key: crc}))
        for file, frames in by_file.items():
            write_frames(directory / RELEASE / file, frames)
