"""Where a run's weights come from: its newest checkpoint, a Hugging Face directory, or nothing.

Looked up and checked before a model is built; refuses what does not fit the run file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalemur.checkpoint.load import load_pieces, refuse_table
from megalemur.checkpoint.manifest import MANIFEST
from megalemur.checkpoint.read import CheckpointReader, HuggingFaceReader, TensorReader
from megalemur.config.run import RunConfig
from megalemur.model.hf_config import DERIVED_TENSORS, check_model_matches, read_hf_config
from megalemur.model.initial import InitialWeights
from megalemur.model.names import hf_shapes
from megalemur.parallel.state import MASTER, Piece

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KEPT = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Origin:
    """What a run starts from."""

    reader: TensorReader | None
    """None: from scratch."""
    resumed: bool
    """The reader is a checkpoint of this run: moments, step and data position count too."""
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

    def describe(self) -> str:
        """One line for the log."""
        if self.reader is None:
            return "from scratch"
        return f"{'resuming' if self.resumed else 'starting from'} {self.reader.path}"


def find_origin(config: RunConfig, newest: Path | None) -> Origin:
    """The newest checkpoint of the run, else `checkpoint.start_from`, else nothing. Reads headers and small files.

    Args:
        config: the run.
        newest: its newest checkpoint that verifies.

    Raises:
        ValueError, CheckpointError: something is there that does not fit the run file.
    """
    path = newest or config.checkpoint.start_from
    shapes = hf_shapes(config.model)
    if path is None:
        return Origin(None, False, None, _export_dtypes(config, shapes, None), _tokenizer_files(config))
    hf = read_hf_config(path)
    check_model_matches(config.model, hf)
    native = (path / MANIFEST).exists()
    weights = HuggingFaceReader(path, derived=DERIVED_TENSORS)
    reader: TensorReader = CheckpointReader(path) if native else weights
    refuse_table(reader, shapes)
    files = {name: (path / name).read_bytes() for name in _KEPT if (path / name).is_file()}
    return Origin(
        reader,
        resumed=newest is not None,
        hf_config=hf.original,
        dtypes=_export_dtypes(config, shapes, weights.dtypes),
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
        return {name: (path / name).read_bytes() for name in _KEPT if (path / name).is_file()}
    if not path.is_file():
        raise ValueError(f"data.tokenizer={path}: no such file")
    return {"tokenizer.json" if path.suffix == ".json" else "tokenizer.model": path.read_bytes()}


def fill_pieces(origin: Origin, config: RunConfig, pieces: Sequence[Piece], group: dist.ProcessGroup) -> None:
    """Write the origin's values into this rank's masters and, when resuming, moments. A collective over `group`."""
    wanted = pieces if origin.resumed else [piece for piece in pieces if piece.kind == MASTER]
    if origin.reader is not None:
        load_pieces(origin.reader, wanted, shapes=hf_shapes(config.model), group=group)
        return
    initial = InitialWeights(config.model, config.run.seed)
    for piece in wanted:
        piece.tensor.copy_(initial.read(piece.name, piece.kind, piece.box))
