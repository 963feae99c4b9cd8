"""The files that Megatron-LM's ranks save, one each: which there are, and what one says.

`iter_0000100/mp_rank_01_003/model_optim_rng.pt` is tensor-parallel rank 1 of stage 3; without pipeline parallelism
there is no second number. `model` in it is the rank's state, or `model0`, `model1` ... are those of its virtual chunks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from checkpoints_tools.errors import UnfitSource
from checkpoints_tools.foreign import Namespace, StoredTensor, read_archive
from checkpoints_tools.megatron_dist import TRACKER
from checkpoints_tools.megatron_shards import LAYER, core_name, flat_keys, is_stateless
from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.tensor_file import DTYPES
from megalemur.config.plain_files import read_plain

RANK_FILE, RELEASE = "model_optim_rng.pt", "release"

_FOLDER = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?")
_CHUNK = re.compile(r"model(\d{0,3})")
_READ = ("args", "checkpoint_version", "iteration")

Place = tuple[int, int]
"""Tensor-parallel rank and pipeline stage."""


@dataclass(frozen=True)
class RankFile:
    """What one file says."""

    path: Path
    chunks: Mapping[int, Mapping[str, StoredTensor]]
    """Number of the virtual chunk to its parameters, by megatron-core's names."""
    settings: Mapping[str, Any]
    """Megatron-LM's arguments; empty where there are none."""
    iteration: Any
    version: Any
    """checkpoint_version; 0 where there is none, as Megatron-LM takes it."""
    has_old_names: bool
    others: tuple[str, ...]
    """Entries that are no weights: optimizer, random states."""
    stubs: tuple[str, ...]
    """Classes that were not called."""

    @property
    def file(self) -> str:
        """Relative to the directory of the iteration."""
        return f"{self.path.parent.name}/{self.path.name}"

    def chunk(self, number: int) -> Mapping[str, StoredTensor]:
        """Parameters of a virtual chunk; a stage may have fewer chunks than others."""
        return self.chunks.get(number, {})

    def layers(self, number: int) -> int:
        """How many layers a chunk holds."""
        return len(_layer_numbers(self.chunk(number)))


def rank_file(place: Place, *, with_stages: bool) -> str:
    """A rank's file, relative to the directory of the iteration."""
    tensor, stage = place
    return f"mp_rank_{tensor:02d}{f'_{stage:03d}' if with_stages else ''}/{RANK_FILE}"


def iteration_directory(path: Path) -> Path | None:
    """The directory with the ranks' folders, from one that may lie above it; None: there is none.

    Raises:
        OSError, ValueError: the tracker cannot be read, or names nothing.
    """
    if (path / TRACKER).is_file():
        said = read_plain(path / TRACKER, 64).decode("ascii").strip()
        path = path / (RELEASE if said == RELEASE else f"iter_{int(said):07d}")
    return path if path.is_dir() and any(_FOLDER.match(folder.name) for folder in path.iterdir()) else None


def read_ranks(directory: Path) -> dict[Place, RankFile]:
    """Every rank's file: a whole grid of ranks and stages.

    Raises:
        UnfitSource: one is missing, or the folders are those of another kind of parallelism.
        DamagedCheckpoint: a file is cut short, or is not what torch.save writes.
    """
    folders: dict[Place, Path] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            raise UnfitSource(f"{folder}: a rank of a Llama has one or two numbers, experts have a third")
        place = int(match[1]), int(match[2] or 0)
        if place in folders:
            raise UnfitSource(f"{folder}: is the same rank as {folders[place]}; remove the one that is left over")
        folders[place] = folder
    tensor, stages = (max(numbers) + 1 for numbers in zip(*folders, strict=True))
    with_stages = any(folder.name.count("_") > 2 for folder in folders.values())
    # the first gap is near, however high the numbers of the folders are
    for place in product(range(tensor), range(stages)):
        if place not in folders or not (folders[place] / RANK_FILE).is_file():
            raise UnfitSource(f"{directory / rank_file(place, with_stages=with_stages)} is missing")
    return {place: _read_rank(folder / RANK_FILE) for place, folder in sorted(folders.items())}


def _read_rank(path: Path) -> RankFile:
    archive = read_archive(path)
    tree = archive.tree
    if not isinstance(tree, Mapping):
        raise DamagedCheckpoint(path, "holds no dictionary")
    numbers = {key: int(match[1] or 0) for key in tree if isinstance(key, str) and (match := _CHUNK.fullmatch(key))}
    if not numbers or len(set(numbers.values())) < len(numbers):
        raise DamagedCheckpoint(path, "holds neither 'model' nor 'model0', 'model1' ...")
    states = {number: dict(_state(path, tree[key])) for key, number in numbers.items()}
    args = tree.get("args")
    return RankFile(
        path,
        {number: _by_core_name(path, state) for number, state in states.items()},
        args.values if isinstance(args, Namespace) else {},
        tree.get("iteration"),
        tree.get("checkpoint_version", 0),
        any(core_name(key) != key for state in states.values() for key in state),
        tuple(str(key) for key in tree if key not in (*numbers, *_READ)),
        archive.stubs,
    )


def _state(path: Path, state: Any) -> Iterator[tuple[str, StoredTensor]]:
    """A chunk's tensors by their keys."""
    if not isinstance(state, Mapping):
        raise DamagedCheckpoint(path, "the model's state is no dictionary")
    for key, value in flat_keys(state):
        if is_stateless(key):
            continue
        if not isinstance(value, StoredTensor):
            raise UnfitSource(f"{path}: {key} is no tensor")
        if value.dtype not in DTYPES.values():
            raise UnfitSource(f"{path}: {key} is {value.dtype}; weights are {', '.join(map(str, DTYPES.values()))}")
        if not value.is_contiguous:
            raise UnfitSource(f"{path}: {key} is stored with strides {list(value.strides)}, not row by row")
        yield key, value


def _by_core_name(path: Path, state: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for key, value in state.items():
        if core_name(key) in found:
            raise UnfitSource(f"{path}: {core_name(key)} is there under two names, {key} is one")
        found[core_name(key)] = value
    numbers = _layer_numbers(found)
    if numbers != set(range(len(numbers))):
        raise UnfitSource(
            f"{path}: layers are numbered {', '.join(map(str, sorted(numbers)))}; every chunk counts its own from 0"
        )
    return found


def _layer_numbers(names: Mapping[str, Any]) -> set[int]:
    return {int(layer[1]) for name in names if (layer := LAYER.fullmatch(name))}
