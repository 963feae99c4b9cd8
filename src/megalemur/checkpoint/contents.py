"""What a checkpoint is made of, as one rank sees it, and what can be wrong with it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from megalemur.checkpoint.cover import inside
from megalemur.checkpoint.manifest import box_text, is_plain_path
from megalemur.checkpoint.placement import Claim
from megalemur.checkpoint.tensor_file import DTYPE_NAMES
from megalemur.config.strict_json import canonical_json
from megalemur.parallel.state import KINDS, Piece

_RESERVED = re.compile(r"manifest\.json|trainer|.*\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, as this rank sees it. Everything but `pieces` is the same on all ranks."""

    step: int
    """Optimizer steps taken."""
    pieces: Sequence[Piece]
    """The fp32 state this rank holds, on any device. Ranks may hold copies of the same boxes; each is written once."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every Hugging Face tensor of the model, in the order of the files. The masters must cover each."""
    dtypes: Mapping[str, torch.dtype]
    """Width of each tensor in the Hugging Face files."""
    files: Mapping[str, bytes]
    """Further files of the top folder by name: config.json, generation_config.json, tokenizer, run.yaml."""
    state: Mapping[str, Any]
    """trainer/state.json: JSON values, finite numbers."""
    record: Mapping[str, Any]
    """Facts about the run for the manifest: layout, backend, optimizer, versions."""

    @property
    def held(self) -> dict[Claim, torch.Tensor]:
        """The tensors of the pieces."""
        return {Claim(piece.name, piece.kind, piece.box): piece.tensor.detach() for piece in self.pieces}


def problems_of(contents: Contents) -> Iterator[str]:
    """What is wrong with this rank's contents."""
    for name in contents.shapes:
        if contents.dtypes.get(name) not in DTYPE_NAMES:
            yield f"{name}: export dtype {contents.dtypes.get(name)}; use fp32, bf16 or fp16"
    for name in contents.files:
        if not is_plain_path(name) or "/" in name or _RESERVED.fullmatch(name):
            yield f"file {name!r}: wants a plain name in the top folder that is not the manifest's or the weights'"
    for piece in contents.pieces:
        shape = contents.shapes.get(piece.name)
        what = f"{piece.name} ({piece.kind}) {box_text(piece.box)}"
        if shape is None or piece.kind not in KINDS:
            yield f"{what}: the model has no such tensor or state of this kind"
        elif tuple(piece.shape) != tuple(shape) or not inside(piece.box, shape):
            yield f"{what} of shape {list(piece.shape)}: the model's tensor has shape {list(shape)}"
        elif tuple(piece.tensor.shape) != piece.box.shape or piece.tensor.dtype != torch.float32:
            yield f"{what}: held as {piece.tensor.dtype} {list(piece.tensor.shape)}; wants fp32 of the box's shape"


def shared_digests(contents: Contents) -> dict[str, str]:
    """Digests of what must be equal on all ranks, by the words used when it is not."""
    files = {name: xxhash.xxh3_128_hexdigest(data) for name, data in contents.files.items()}
    shapes = [[name, list(shape), str(contents.dtypes[name])] for name, shape in contents.shapes.items()]
    parts = {
        "step": contents.step,
        "shapes or dtypes": shapes,
        "files": files,
        "trainer state": contents.state,
        "record": contents.record,
    }
    return {part: xxhash.xxh3_128_hexdigest(canonical_json(value)) for part, value in parts.items()}
