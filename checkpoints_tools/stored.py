"""From tensors in foreign archives to regions: which rows of a stored tensor are a box of a Hugging Face tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.errors import UnfitSource
from checkpoints_tools.foreign import Archive, StoredTensor
from checkpoints_tools.regions import Region
from megalemur.checkpoint.tensor_file import DTYPE_NAMES
from megalemur.parallel.boxes import Box


def stored_tensors(archive: Archive, path: Path) -> dict[str, StoredTensor]:
    """Name to tensor of an archive that is one dict of tensors; other values are no matter.

    Raises:
        UnfitSource: it is no dict.
    """
    if not isinstance(archive.tree, dict):
        raise UnfitSource(f"{path} holds a {type(archive.tree).__name__} where tensors by name are expected")
    return {
        name: value for name, value in archive.tree.items() if isinstance(name, str) and isinstance(value, StoredTensor)
    }


def stub_notes(archives: Mapping[str, Archive]) -> list[str]:
    """What to say of classes that were not called.

    Args:
        archives: by file.
    """
    names = sorted({name for archive in archives.values() for name in archive.stubs})
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [f"classes and functions that the files name and that were not called: {shown}"] if names else []


def region_of(stored: StoredTensor, what: tuple[Path, str], box: Box, *, first: int = 0, step: int = 1) -> Region:
    """Where the rows of a box lie.

    Args:
        stored: rows of the box's columns, and perhaps other rows.
        what: file and name of the tensor, for the region and for messages.
        box: of the Hugging Face tensor; its rows are rows first, first + step, ... of what is stored.
        first: row.
        step: from a row of the box to the next, in stored rows.

    Raises:
        UnfitSource: its dtype is no weight's, it has other columns or fewer rows, or its rows are not in one piece.
    """
    path, name = what
    if stored.dtype not in DTYPE_NAMES:
        raise UnfitSource(
            f"{path}: {name} is {_short(stored.dtype)}; weights are {', '.join(map(_short, DTYPE_NAMES))}, so convert "
            "the checkpoint from before it was quantized"
        )
    if not stored.shape:
        raise UnfitSource(f"{path}: {name} is a single number, where a matrix or a vector is expected")
    rows, *columns = box.shape
    if stored.shape[1:] != tuple(columns) or stored.shape[0] < first + (rows - 1) * step + 1:
        raise UnfitSource(f"{path}: {name} has shape {list(stored.shape)}, where {list(box.shape)} is expected")
    width, row = 1, stored.strides[0]
    for extent, stride in zip(reversed(columns), reversed(stored.strides[1:]), strict=True):
        if extent != 1 and stride != width:
            row = -1
        width *= extent
    if row < width and stored.shape[0] > 1:
        raise UnfitSource(
            f"{path}: {name} is stored transposed or expanded (strides {list(stored.strides)}); load the file where it "
            "was made, call .contiguous() on its tensors and save it again"
        )
    item = stored.dtype.itemsize
    distance = max(row, width)  # the stride of a single row says nothing
    return Region(box, path.name, stored.offset + first * distance * item, step * distance * item, stored.dtype)


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
