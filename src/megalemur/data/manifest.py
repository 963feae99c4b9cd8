"""PREFIX.manifest.json: what made a data set. Torch-free. Refuses a manifest that does not belong to its files."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from megalemur.data.errors import DamagedDataError
from megalemur.data.indexed import bin_path, idx_path


class Manifest(BaseModel):
    """What made a data set, and how large it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    """Version of this file's format."""
    tokenizer_sha256: str
    """Digest of the tokenizer's model file, hex."""
    vocab_size: PositiveInt
    """Pieces of the tokenizer."""
    bos_id: NonNegativeInt | None
    """Id of the beginning-of-document token; null: the tokenizer has none."""
    eos_id: NonNegativeInt | None
    """Id of the end-of-document token."""
    unk_id: NonNegativeInt | None
    """Id of the unknown token."""
    pad_id: NonNegativeInt | None
    """Id of the padding token."""
    prepend_bos: bool
    """Every document begins with bos_id."""
    append_eos: bool
    """Every document ends with eos_id."""
    documents: NonNegativeInt
    """Documents written."""
    empty_documents: NonNegativeInt
    """Documents without text, left out."""
    tokens: NonNegativeInt
    """Tokens written, bos and eos counted."""
    unknown_tokens: NonNegativeInt
    """How many of them are unk_id."""
    dtype: str
    """numpy's name of the .bin's dtype."""
    bin_bytes: NonNegativeInt
    """Size of PREFIX.bin."""
    idx_bytes: NonNegativeInt
    """Size of PREFIX.idx."""


def manifest_path(prefix: Path | str) -> Path:
    """The manifest of a prefix."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: Path | str) -> Manifest | None:
    """The manifest of a data set, or None where nobody wrote one.

    Raises:
        DamagedDataError: not a manifest of version 1, or its sizes are not those of the files beside it.
    """
    path = manifest_path(prefix)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedDataError(f"{path}: {where}: {first['msg']}; build the data set again") from None
    for file, wanted in ((bin_path(prefix), manifest.bin_bytes), (idx_path(prefix), manifest.idx_bytes)):
        if file.exists() and file.stat().st_size != wanted:
            raise DamagedDataError(
                f"{path}: says that {file.name} has {wanted} bytes, but it has {file.stat().st_size}; "
                "one of them belongs to another data set: build it again"
            )
    return manifest
