"""Hugging Face directories whose weights are pickles (pytorch_model.bin, one or many files): read, never written."""

import re
from pathlib import Path

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.foreign import Archive, StoredTensor, read_archive
from checkpoints_tools.hf import carried_files, read_config
from checkpoints_tools.opened import Opened
from checkpoints_tools.regions import WEIGHT, Key, Region
from checkpoints_tools.stored import region_of, stored_tensors, stub_notes
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.checkpoint.manifest import is_plain_path
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import parse_json
from megalemur.model.hf_config import DERIVED_TENSORS
from megalemur.model.names import EMBEDDING, HEAD
from megalemur.parallel.boxes import whole

NAME = "hf-bin"
SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def recognises(path: Path) -> bool:
    """Whether the directory holds such weights."""
    return (path / SINGLE).exists() or (path / INDEX).exists()


def open_hf_bin(path: Path) -> Opened:
    """The model in a directory.

    Raises:
        ConversionError, DamagedCheckpoint: no Llama, or files that do not fit together.
    """
    config = read_config(path)
    archives = _archives(path)
    notes = stub_notes(archives)
    found: dict[Key, list[Region]] = {}
    for file, archive in archives.items():
        for name, stored in _weights(path / file, archive).items():
            if config.model.tie_embeddings and name == HEAD:
                notes.append(f"{HEAD} of {file} is not read: config.json ties it to {EMBEDDING}")
                continue
            if Key(WEIGHT, name) in found:
                raise DamagedCheckpoint(path / file, f"holds {name}, and so does another file")
            found[Key(WEIGHT, name)] = [region_of(stored, (path / file, name), whole(stored.shape))]
    return Opened(
        NAME,
        path,
        config.model,
        found,
        config=config.original,
        small_files=carried_files(path),
        notes=notes,
    )


def _weights(file: Path, archive: Archive) -> dict[str, StoredTensor]:
    found = stored_tensors(archive, file)
    return {name: stored for name, stored in found.items() if not re.fullmatch(DERIVED_TENSORS, name)}


def _archives(path: Path) -> dict[str, Archive]:
    """File to archive; with an index, each holds what the index says."""
    if (path / SINGLE).exists() and (path / INDEX).exists():
        raise ConversionError(f"{path} holds {SINGLE} and {INDEX}; remove the one that is not meant")
    if (path / SINGLE).exists():
        return {SINGLE: read_archive(path / SINGLE)}
    named: dict[str, set[str]] = {}
    for name, file in _weight_map(path / INDEX).items():
        named.setdefault(file, set()).add(name)
    missing = sorted(file for file in named if not (path / file).exists())
    if missing:
        raise DamagedCheckpoint(path / INDEX, f"names files that are not there: {', '.join(missing[:5])}")
    found = {}
    for file, names in sorted(named.items()):
        found[file] = read_archive(path / file)
        odd = sorted(names ^ stored_tensors(found[file], path / file).keys())
        if odd:
            raise DamagedCheckpoint(
                path / file, f"holds other tensors than {INDEX} says; first of them: {odd[0][:200]}"
            )
    return found


def _weight_map(where: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(read_plain(where))["weight_map"]
        for name, file in weight_map.items():
            plain = isinstance(file, str) and is_plain_path(file) and "/" not in file
            if not plain or not file.endswith(".bin"):
                raise ValueError(f"{name} lies in {str(file)[:200]!r}, which is no .bin file of this directory")
        return dict(weight_map)
    except OSError as error:
        raise UnreadableCheckpoint(where, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(where, f"is no usable index: {error}") from error
