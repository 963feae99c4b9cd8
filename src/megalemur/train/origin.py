"""Where a run's weights come from: its newest checkpoint, a Hugging Face directory, or nothing.

Looked up and checked before a model is built; refuses what does not fit the run file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalemur.checkpoint.exchange import Peers
from megalemur.checkpoint.load import load_pieces, refuse_table
from megalemur.checkpoint.manifest import MANIFEST
from megalemur.checkpoint.opening import SmallFiles, open_together
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader, TensorReader
from megalemur.config.plain_files import read_plain
from megalemur.config.run import RunConfig
from megalemur.model.hf_config import (
    CARRIED_FILES,
    CONFIG_FILE,
    DERIVED_TENSORS,
    HuggingFaceConfig,
    check_model_matches,
    parse_hf_config,
    read_hf_config,
)
from megalemur.model.initial import InitialWeights
from megalemur.model.names import hf_shapes
from megalemur.parallel.state import MASTER, Piece

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """What a run starts from."""

    reader: TensorReader | None
    """None: from scratch."""
    resumed: bool
    """The reader's run is gone on with: moments, step and data position count too."""
    hf_config: Mapping[str, Any] | None
    """Keys of the config.json that the model came from."""
    dtypes: Mapping[str, torch.dtype]
    """Width of each tensor in the checkpoints that this run writes."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Tokenizer and generation files that each checkpoint carries on."""

    @property
    def state(self) -> dict[str, Any] | None:
        """trainer/state.json of the checkpoint that is resumed."""
        return self.reader.state if self.resumed and isinstance(self.reader, CheckpointReader) else None

    @property
    def record(self) -> Mapping[str, Any]:
        """Facts that the checkpoint holds about the run that wrote it; empty for a start."""
        return self.reader.manifest.record if isinstance(self.reader, CheckpointReader) else {}

    def own_checkpoint(self, directory: Path) -> Path | None:
        """The checkpoint of this run that is gone on with; None where there is none in its own directory."""
        path = self.reader.path if self.resumed and self.reader is not None else None
        return path if path is not None and path.parent == directory else None

    def describe(self) -> str:
        """One line for the log."""
        if self.reader is None:
            return "from scratch"
        return f"{'resuming' if self.resumed else 'starting from'} {self.reader.path}"


def find_origin(config: RunConfig, newest: CheckpointReader | None, peers: Peers | None = None) -> Origin:
    """The newest checkpoint of the run, else `checkpoint.start_from`, else nothing. Reads headers and small files.

    Args:
        config: the run.
        newest: its newest checkpoint that verifies.
        peers: all ranks; a collective. None: this process alone.

    Raises:
        ValueError, CheckpointError: something is there that does not fit the run file.
    """
    path = newest.path if newest is not None else config.checkpoint.start_from
    if path is None:
        shapes = hf_shapes(config.model)
        return Origin(None, False, None, _export_dtypes(config, shapes, None), _tokenizer_files(config))
    if newest is not None:
        return _native_origin(config, newest, resumed=True)
    peers = peers or Peers(None)
    if not peers.all_gather((path / MANIFEST).exists())[0]:
        return _foreign_origin(config, path)
    reader = CheckpointReader(path, opened=open_together(path, peers))
    return _native_origin(config, reader, resumed=_takes_all(config, reader))


def _takes_all(config: RunConfig, reader: CheckpointReader) -> bool:
    """Whether the run found in checkpoint.start_from is gone on with; refuses to guess."""
    load, there = config.checkpoint.load, f"checkpoint.start_from={reader.path}"
    if reader.manifest.dropped and load == "all":
        raise ValueError(
            f"{there} has lost its trainer/ to retention; use checkpoint.load=weights, or a later checkpoint"
        )
    if not reader.manifest.dropped and load is None:
        raise ValueError(
            f"{there} holds the moments and counters of step {reader.manifest.step}; write checkpoint.load=weights to "
            "begin a new run at step 0 with its fp32 masters alone, or checkpoint.load=all to go on with that run"
        )
    return load == "all"


def _native_origin(config: RunConfig, reader: CheckpointReader, *, resumed: bool) -> Origin:
    where = reader.path / CONFIG_FILE
    hf = parse_hf_config(reader.file(CONFIG_FILE), where)
    return _origin(config, reader, hf, SmallFiles(reader.path, reader.opened), resumed=resumed)


def _foreign_origin(config: RunConfig, path: Path) -> Origin:
    hf = read_hf_config(path)
    if config.checkpoint.load == "all":
        raise ValueError(
            f"checkpoint.load=all wants a checkpoint of megalemur, and checkpoint.start_from={path} is a Hugging Face "
            "directory without moments; use checkpoint.load=weights, or leave it out"
        )
    return _origin(config, HuggingFaceReader(path, derived=DERIVED_TENSORS), hf, SmallFiles(path), resumed=False)


def _origin(
    config: RunConfig,
    reader: CheckpointReader | HuggingFaceReader,
    hf: HuggingFaceConfig,
    small: SmallFiles,
    *,
    resumed: bool,
) -> Origin:
    shapes = hf_shapes(config.model)
    check_model_matches(config.model, hf)
    refuse_table(reader, shapes)
    files = {name: data for name in CARRIED_FILES if (data := small.get(name)) is not None}
    return Origin(
        reader,
        resumed=resumed,
        hf_config=hf.original,
        dtypes=_export_dtypes(config, shapes, reader.dtypes),
        files={**files, **_tokenizer_files(config)},
    )


def _export_dtypes(
    config: RunConfig, shapes: Mapping[str, Any], source: Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    wanted = config.checkpoint.export_dtype
    if wanted == "source" and source is not None:
        return {name: source[name] for name in shapes}
    return dict.fromkeys(shapes, _DTYPES[config.precision.dtype if wanted == "source" else wanted])


def _tokenizer_files(config: RunConfig) -> dict[str, bytes]:
    """The tokenizer of data.tokenizer, under the names that Hugging Face looks for."""
    path = config.data.tokenizer
    if path is None:
        return {}
    if path.is_dir():
        return {name: read_plain(path / name) for name in CARRIED_FILES if (path / name).is_file()}
    if not path.is_file():
        raise ValueError(f"data.tokenizer={path}: no such file")
    return {"tokenizer.json" if path.suffix == ".json" else "tokenizer.model": read_plain(path)}


def fill_pieces(origin: Origin, config: RunConfig, pieces: Sequence[Piece], group: dist.ProcessGroup) -> None:
    """Write the origin's values into this rank's masters and moments; moments of a new run are zero. A collective over
    `group`; may be called again and again in a process."""
    wanted = pieces if origin.resumed else [piece for piece in pieces if piece.kind == MASTER]
    for piece in pieces:
        if not origin.resumed and piece.kind != MASTER:
            piece.tensor.zero_()
    if origin.reader is not None:
        load_pieces(origin.reader, wanted, shapes=hf_shapes(config.model), group=group)
        return
    initial = InitialWeights(config.model, config.run.seed)
    for piece in wanted:
        piece.tensor.copy_(initial.read(piece.name, piece.kind, piece.box))
