"""The format `megatron`, read: torch_dist checkpoints as Megatron-LM, Megatron-Bridge and NeMo save them.

A directory with `metadata.json`, `.metadata` (which box of which global tensor lies where), `__R_N.distcp` files (one
archive of torch.save behind the other) and `common.pt` (what is no tensor). Opens the directory itself, the one above
it with `latest_checkpointed_iteration.txt`, and NeMo's with `weights/` and `context/`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools.errors import ConversionError, UnfitSource
from checkpoints_tools.foreign import (
    DcpChunk,
    DcpMetadata,
    DcpTensor,
    Namespace,
    StoredTensor,
    read_archive,
    read_dcp_metadata,
)
from checkpoints_tools.megatron_args import HOW_TO_GIVE_IT, model_and_notes
from checkpoints_tools.megatron_tensors import (
    EMBEDDING,
    HEAD,
    Named,
    Stored,
    Tensor,
    contiguous_strides,
    grid_boxes,
    is_box_of,
    read_key,
)
from checkpoints_tools.opened import Opened
from checkpoints_tools.regions import WEIGHT, Key, Region, Regions
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.manifest import box_text
from megalemur.checkpoint.opening import SmallFiles
from megalemur.config.load import parse_settings
from megalemur.config.model import ModelConfig
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import parse_json
from megalemur.model.hf_config import CARRIED_FILES
from megalemur.parallel.boxes import Box

NAME = "megatron"
METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
TRACKER, TOKENIZER = "latest_checkpointed_iteration.txt", "tokenizer"
BRIDGE_CONFIG, NEMO_WEIGHTS, NEMO_CONFIG = "run_config.yaml", "weights", "context/model.yaml"

_SMALL = 1 << 20
_MAX_YAML = 16 << 20
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\..*")
# what a model computes again: older checkpoints hold it
_DERIVED = re.compile(r".*rotary_pos_emb\.inv_freq")


def recognises(path: Path) -> bool:
    """Whether this is a torch_dist checkpoint, or a directory that names one."""
    try:
        return _directory_of(path) is not None
    except (OSError, ValueError):
        return False


def open_megatron(path: Path, model: ModelConfig | None = None) -> Opened:
    """Everything but the tensors' bytes.

    Args:
        path: the checkpoint, the directory above it with latest_checkpointed_iteration.txt, or NeMo's with weights/.
        model: the architecture, for a checkpoint that does not say it, or in the place of what it says.

    Raises:
        ConversionError: another model than a Llama, or one that neither the checkpoint nor the caller describes.
        DamagedCheckpoint: files that are missing, cut short, or contradict each other.
    """
    try:
        directory = _directory_of(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path / TRACKER}: says neither a number nor 'release': {error}") from None
    if directory is None:
        raise ConversionError(f"{path}: holds no torch_dist checkpoint ({BACKEND}, {METADATA} and {COMMON})")
    _check_backend(directory)
    metadata = read_dcp_metadata(directory / METADATA)
    common = _common(directory)
    table = _Table(directory, metadata)
    rows = table.vocabulary()
    said, notes = _model(directory, common, rows, model)
    regions = table.regions(said, rows)
    return Opened(
        format=NAME,
        path=directory,
        model=said,
        regions=regions,
        small_files=tokenizer_files(directory),
        facts=_facts(common, metadata),
        notes=(*notes, *table.notes, *metadata.notes),
    )


def _directory_of(path: Path) -> Path | None:
    """The directory with the files, from one that may lie above it."""
    if (path / BACKEND).is_file():
        return path if (path / METADATA).is_file() else None
    if (path / TRACKER).is_file():
        said = read_plain(path / TRACKER, 64).decode("ascii").strip()
        inner = path / ("release" if said == "release" else f"iter_{int(said):07d}")
        return _directory_of(inner) if inner.is_dir() and not (inner / TRACKER).exists() else None
    inner = path / NEMO_WEIGHTS
    return inner if (inner / BACKEND).is_file() and (inner / METADATA).is_file() else None


def _check_backend(directory: Path) -> None:
    file = directory / BACKEND
    try:
        said = parse_json(read_plain(file, _SMALL))
    except OSError as error:
        raise UnreadableCheckpoint(file, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCheckpoint(file, str(error)) from error
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend != "torch_dist":
        raise ConversionError(
            f"{file}: sharded_backend is {backend!r}, only 'torch_dist' is known; "
            "let the Megatron-LM that wrote it save it again with --ckpt-format torch_dist"
        )


def _common(directory: Path) -> Mapping[str, Any]:
    """common.pt's entries; every tensor in it is left where it is."""
    tree = read_archive(directory / COMMON).tree
    if not isinstance(tree, Mapping):
        raise DamagedCheckpoint(directory / COMMON, "is no dictionary")
    return tree


def _model(
    directory: Path, common: Mapping[str, Any], rows: int, given: ModelConfig | None
) -> tuple[ModelConfig, list[str]]:
    """What the checkpoint says about its model, and what is not certain."""
    where, settings = _settings(directory, common)
    if not settings and given is None:
        raise ConversionError(
            f"{directory}: neither {COMMON} nor {BRIDGE_CONFIG} nor NeMo's context says what the model is. Heads, "
            f"groups, rotary base and the epsilon of the norms cannot be told from shapes: {HOW_TO_GIVE_IT}"
        )
    return model_and_notes(settings, where, rows, given)


def _settings(directory: Path, common: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    """The file that says what the model is, and its settings; none where nothing says it."""
    args = common.get("args")
    if isinstance(args, Namespace) and "num_layers" in args.values:
        return directory / COMMON, args.values
    bridge, nemo = directory / BRIDGE_CONFIG, directory.parent / NEMO_CONFIG
    if bridge.is_file():
        return bridge, _yaml_section(bridge, "model")
    if directory.name == NEMO_WEIGHTS and nemo.is_file():
        return nemo, _yaml_section(nemo, "config")
    return directory, {}


def _yaml_section(file: Path, name: str) -> Mapping[str, Any]:
    try:
        values = parse_settings(read_plain(file, _MAX_YAML).decode(), str(file))
    except OSError as error:
        raise UnreadableCheckpoint(file, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{file}: cannot be used; {HOW_TO_GIVE_IT}: {error}") from None
    section = values.get(name) if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def _facts(common: Mapping[str, Any], metadata: DcpMetadata) -> dict[str, Any]:
    args = common.get("args")
    settings = args.values if isinstance(args, Namespace) else {}
    told = {
        "step": common.get("iteration", common.get("global_step")),
        "tensor_parallel": settings.get("tensor_model_parallel_size"),
        "pipeline_parallel": settings.get("pipeline_model_parallel_size"),
        "checkpoint_version": common.get("checkpoint_version"),
    }
    return {name: value for name, value in told.items() if isinstance(value, (int, float)) and value is not True}


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Files that Megatron-LM keeps beside the weights, by the names that Hugging Face gives them."""
    files = SmallFiles(directory / TOKENIZER)
    return {name: data for name in CARRIED_FILES if (data := files.get(name)) is not None}


@dataclass
class _Table:
    """The stored boxes of a checkpoint, and where they lie."""

    directory: Path
    metadata: DcpMetadata
    notes: list[str] = field(default_factory=list)
    _leaves: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    """What an archive holds, by its place: one that is named many times is opened once."""

    def vocabulary(self) -> int:
        """Rows of the embedding, padding included."""
        for key, tensor in self.metadata.tensors.items():
            named = read_key(key)
            if named == Named(WEIGHT, None, False, EMBEDDING) and len(tensor.size) == 2:
                return tensor.size[0]
        raise DamagedCheckpoint(self.directory / METADATA, f"holds no {EMBEDDING}")

    def regions(self, model: ModelConfig, rows: int) -> Regions:
        """Every tensor of every kind; what no Llama has keeps its key, so that it is named as surplus."""
        found: dict[Key, list[Region]] = {}
        for key, tensor in self.metadata.tensors.items():
            if not _DERIVED.fullmatch(key) and not _is_other_state(key):
                for where, region in self._regions_of(key, tensor, model, rows):
                    found.setdefault(where, []).append(region)
        left = [key for key in (*self.metadata.tensors, *self.metadata.objects) if _is_other_state(key)]
        if left:
            self.notes.append(
                f"{len(left)} entries of optimizer state are not read ({left[0]}): only tensors by parameter are, and "
                "a distributed optimizer saves its own buckets unless --dist-ckpt-optim-fully-reshardable is set"
            )
        return found

    def _regions_of(self, key: str, tensor: DcpTensor, model: ModelConfig, rows: int) -> Iterator[tuple[Key, Region]]:
        named = read_key(key)
        if named.name == HEAD and not named.in_layers and model.tie_embeddings:
            raise ConversionError(
                f"{self.directory}: holds {key}, and its settings say that the head is the embedding; "
                f"{HOW_TO_GIVE_IT} with tie_word_embeddings false"
            )
        try:
            known = Tensor(named, model, rows)
        except KeyError:
            yield from ((Key(named.kind, key), _stray(stored)) for stored in self._chunks(key, tensor))
            return
        flat = len(tensor.size) == len(known.shape) + 1
        if not flat and tuple(tensor.size) != known.shape:
            raise UnfitSource(
                f"{self.directory / METADATA}: {key} has shape {list(tensor.size)}, the model wants {list(known.shape)}"
            )
        for chunk in self._chunks(key, tensor):
            for stored in grid_boxes(known.shape, tensor.size, chunk) if flat else (chunk,):
                yield from known.regions(stored)

    def _chunks(self, key: str, tensor: DcpTensor) -> Iterator[Stored]:
        for chunk in tensor.chunks:
            box = Box(tuple(chunk.offsets), tuple(a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)))
            what = f"{key} [{box_text(box)}]"
            if not is_box_of(box, tensor.size):
                raise DamagedCheckpoint(self.directory / METADATA, f"{what} lies outside {list(tensor.size)}")
            yield self._stored(what, box, tensor, chunk)

    def _stored(self, what: str, box: Box, tensor: DcpTensor, chunk: DcpChunk) -> Stored:
        """Where the elements lie: behind the header of the chunk's own archive."""
        file = self.directory / chunk.file
        place = chunk.file, chunk.first, chunk.length
        if place not in self._leaves:
            self._leaves[place] = read_archive(file, chunk.first, chunk.length).tree
        leaf = self._leaves[place]
        if not isinstance(leaf, StoredTensor):
            raise DamagedCheckpoint(file, f"{what}: the archive at byte {chunk.first} holds no tensor")
        if tuple(leaf.shape) != box.shape or leaf.dtype != tensor.dtype:
            said = f"{leaf.dtype} {list(leaf.shape)}"
            raise DamagedCheckpoint(file, f"{what}: {said}, where {METADATA} says {tensor.dtype} {list(box.shape)}")
        if not leaf.is_contiguous:
            raise UnfitSource(f"{file}: {what} is stored with strides {list(leaf.strides)}, not row by row")
        return Stored(box, chunk.file, leaf.offset, contiguous_strides(box.shape), leaf.dtype)


def _is_other_state(key: str) -> bool:
    """Whether this is the optimizer's and no tensor by parameter: buckets, and states of other optimizers."""
    return _OPTIMIZER.fullmatch(key) is not None and read_key(key).kind == WEIGHT


def _stray(stored: Stored) -> Region:
    """Of a tensor that no Llama has: only ever named in an error."""
    return Region(stored.box, stored.file, stored.offset, 0, stored.dtype)
