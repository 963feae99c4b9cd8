"""Which files are the input: paths, directories, globs, URLs of any fsspec file system, standard input.

Refuses what names no file, and files that are named twice.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

Format = Literal["jsonl", "text", "parquet", "arrow"]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
STDIN = "-"


class Source(NamedTuple):
    """One input file as it was found."""

    name: str
    """Path, URL, or - for standard input."""
    format: Format
    compression: str | None
    """gzip, zstd, xz or bz2."""
    size: int | None
    """Bytes; None where nobody can say."""
    version: str
    """What changes when the file does: time of change (ns) or the store's tag; empty where there is none."""

    @property
    def remote(self) -> bool:
        """A URL."""
        return "://" in self.name

    def open(self) -> IO[bytes]:
        """The file's bytes as they are stored."""
        if self.name == STDIN:
            return open(0, "rb", closefd=False)
        if self.remote:
            import fsspec

            return fsspec.open(self.name, "rb").open()
        return open(self.name, "rb", buffering=1 << 18)

    def changed(self) -> str | None:
        """What about the file is no longer as it was found; None: nothing that can be seen."""
        if self.size is None:
            return None
        try:
            size, version = _look(self.name)
        except OSError as error:
            return f"cannot be found any more ({error})"
        if size != self.size:
            return f"had {self.size} bytes and has {size}"
        return None if version == self.version else "was changed since"


def find_inputs(inputs: Sequence[str], format: Format | None = None) -> list[Source]:
    """All files that the inputs name, sorted within each input; hidden files below directories are passed over.

    Args:
        inputs: files, directories, globs, URLs, or - for standard input.
        format: of all of them; None: by their endings, and JSON lines for standard input.

    Raises:
        ValueError: an input names no file, or two inputs name the same one.
    """
    names = [name for text in inputs for name in _names(text)]
    seen: set[str] = set()
    for name in names:
        if name.encode(errors="replace").decode() != name:
            raise ValueError(f"--input: the name {name!a} is not UTF-8, which a manifest cannot hold; rename the file")
        identity = name if "://" in name or name == STDIN else str(Path(name).resolve())
        if identity in seen:
            raise ValueError(f"--input: {name} is named more than once; its documents would count double")
        seen.add(identity)
    return [_source(name, format) for name in names]


def _names(text: str) -> list[str]:
    if text == STDIN:
        return [STDIN]
    try:
        found = sorted(_remote_names(text) if "://" in text else _local_names(text)) if text else []
    except PermissionError as error:  # passing over a directory would lose its documents without a word
        raise ValueError(
            f"--input {text}: {error.filename} cannot be read ({error.strerror}); mend its rights, or name other input"
        ) from None
    if not found:
        raise ValueError(f"--input {text}: no such file; give a file, a directory, a quoted glob, a URL or -")
    return found


def _local_names(text: str) -> Iterator[str]:
    path = Path(text)
    if path.is_dir():
        below = _files_below(path)
    else:
        # a file whose name looks like a glob is that file
        below = iter([path] if path.exists() else [Path(one) for one in glob.glob(text, recursive=True)])
    # a link to nothing is told when it is read, with the other bad documents
    return (str(one) for one in below if one.is_file() or one.is_fifo() or (one.is_symlink() and not one.exists()))


def _files_below(directory: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """What is no directory, through links too, as globs do; but for links to a directory around them."""
    here = directory.resolve()
    if here in around:
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            path = directory / entry.name
            if entry.name.startswith("."):
                continue
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                yield from _files_below(path, (*around, here))
            else:
                yield path


def _remote_names(text: str) -> Iterator[str]:
    system, path = _remote(text)
    found = system.find(path) if system.isdir(path) else system.glob(path) if glob.has_magic(path) else [path]
    return (system.unstrip_protocol(one) for one in found if system.isfile(one))


def _remote(text: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"--input {text}: {error}; pip install 'megalemur[remote]' brings s3://, gs:// and hf://"
        ) from None


def _source(name: str, format: Format | None) -> Source:
    stem, dot, ending = name.lower().rpartition(".")
    compression = COMPRESSIONS.get(dot + ending)
    inner = stem if compression else name.lower()
    chosen = format or _FORMATS.get("." + inner.rpartition(".")[2], "jsonl" if name == STDIN else "text")
    if name == STDIN or Path(name).is_fifo():
        if chosen != "jsonl":
            raise ValueError(f"--input {name}: only JSON lines can be read from a pipe; give a file, or --format jsonl")
        return Source(name, chosen, compression, None, "")
    try:
        size, version = _look(name)
    except OSError:  # told when it is read, with the other bad documents
        if "://" in name:
            raise
        size, version = None, ""
    return Source(name, chosen, compression, size, version)


def _look(name: str) -> tuple[int | None, str]:
    """(size, version) of a file now."""
    if "://" in name:
        system, path = _remote(name)
        facts = system.info(path)
        tag = next((str(facts[key]) for key in ("etag", "ETag", "LastModified", "mtime") if facts.get(key)), "")
        return facts.get("size"), tag
    status = Path(name).stat()
    return status.st_size, str(status.st_mtime_ns)
