"""Hugging Face directories: a Llama in one or many safetensors files, read and written."""

from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.layout import Frame, Layout, Options
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.regions import WEIGHT, Key, Region, contiguous
from megalemur.checkpoint.hf_files import INDEX, SINGLE, WeightFile, index_json, share_out
from megalemur.checkpoint.opening import SmallFiles
from megalemur.checkpoint.portions import StoredFile
from megalemur.checkpoint.read import HuggingFaceReader
from megalemur.checkpoint.tensor_file import DTYPES, TensorSpec, header_bytes, offsets
from megalemur.model.hf_config import (
    CARRIED_FILES,
    CONFIG_FILE,
    DERIVED_TENSORS,
    GENERATION_FILE,
    HuggingFaceConfig,
    generation_config_json,
    hf_config_json,
    read_hf_config,
)
from megalemur.model.names import hf_shapes
from megalemur.parallel.boxes import whole

NAME = "hf"
_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def recognises(path: Path) -> bool:
    """Whether the directory holds safetensors weights under the names of Hugging Face."""
    return (path / SINGLE).exists() or (path / INDEX).exists()


def open_hf(path: Path) -> Opened:
    """The model in a directory.

    Raises:
        ConversionError, DamagedCheckpoint: no Llama, or files that do not fit together.
    """
    config = read_config(path)
    reader = HuggingFaceReader(path, derived=DERIVED_TENSORS)
    refuse_dtypes(reader)
    return Opened(
        NAME,
        path,
        config.model,
        regions_of(path, reader.stored_files()),
        config=config.original,
        small_files=carried_files(path),
    )


def read_config(path: Path) -> HuggingFaceConfig:
    """config.json of a directory.

    Raises:
        ConversionError: there is none, or it is no Llama's.
    """
    try:
        return read_hf_config(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def refuse_dtypes(reader: HuggingFaceReader) -> None:
    """Name the tensors whose dtype is none of a weight's.

    Raises:
        ConversionError: there are such.
    """
    odd = [f"{name} ({listed.dtype})" for name, listed in reader.tensors.items() if listed.dtype not in DTYPES]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ConversionError(
            f"{reader.path}: weights are {', '.join(DTYPES)}; {', '.join(odd[:5])}{more} must be converted from the "
            "checkpoint before it was quantized or changed"
        )


def regions_of(path: Path, files: Iterable[StoredFile]) -> dict[Key, list[Region]]:
    """The weights in files."""
    found: dict[Key, list[Region]] = {}
    for file in files:
        for extent in file.extents:
            region = contiguous(extent.box, str(file.path.relative_to(path)), extent.offset, extent.dtype)
            found.setdefault(Key(WEIGHT, extent.name), []).append(region)
    return found


def carried_files(path: Path) -> dict[str, bytes]:
    """Tokenizer and settings that lie beside the weights."""
    files = SmallFiles(path)
    return {name: data for name in CARRIED_FILES if (data := files.get(name)) is not None}


def lay_out(weights: Weights, source: Opened, options: Options) -> Layout:
    """The same model as a Hugging Face directory."""
    files = weight_files(weights, options)
    return Layout(
        NAME,
        regions={Key(WEIGHT, name): [region] for file in files for name, region in _regions(file).items()},
        sizes={file.name: _size(file) for file in files},
        units=[[Key(WEIGHT, name) for name in file.specs] for file in files],
        frames={file.name: [Frame(0, header_bytes(file.specs))] for file in files},
        small_files=small_files(weights, source, files),
        digest_files=True,
    )


def weight_files(weights: Weights, options: Options) -> list[WeightFile]:
    """Which tensor goes into which file."""
    specs = {
        key.name: TensorSpec(shape, weights.dtypes[key])
        for name, shape in hf_shapes(weights.model).items()
        if (key := Key(WEIGHT, name))
    }
    return share_out(specs, options.max_shard_bytes, [0])


def small_files(weights: Weights, source: Opened, files: list[WeightFile]) -> dict[str, bytes]:
    """Everything beside the weights."""
    dtypes = {_WORDS[weights.dtypes[key]] for key in weights.dtypes if key.kind == WEIGHT}
    # a file with several widths says the one that loses nothing
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
    found = {name: data for name, data in source.small_files.items() if name in CARRIED_FILES}
    found[CONFIG_FILE] = hf_config_json(weights.model, dtype=dtype, source=source.config)
    if source.config is None:
        found.setdefault(GENERATION_FILE, generation_config_json())
    if len(files) > 1:
        found[INDEX] = index_json(files)
    return found


def _regions(file: WeightFile) -> dict[str, Region]:
    at = offsets(file.specs)
    return {n: contiguous(whole(spec.shape), file.name, at[n], spec.dtype) for n, spec in file.specs.items()}


def _size(file: WeightFile) -> int:
    return len(header_bytes(file.specs)) + sum(spec.bytes for spec in file.specs.values())
