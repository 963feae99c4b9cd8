"""The Hugging Face weights of a checkpoint: which tensor goes into which file, gathered tensor by tensor and written.

One rank writes a file. All ranks walk through one and the same order of messages, so that none waits in a circle, and
walk on after an error, so that none waits in vain. Memory above the model: a tensor on the writer, a piece on a sender.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from megalemur.checkpoint.digests import FileEntry
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.placement import Placed
from megalemur.checkpoint.tensor_file import TensorFileWriter, TensorSpec, file_order
from megalemur.config.strict_json import readable_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

PieceReader = Callable[[Placed], torch.Tensor]


class WeightFile(NamedTuple):
    """A file of weights and the rank that writes it."""

    name: str
    writer: int
    specs: dict[str, TensorSpec]
    """In the order of the file."""


SMALL_FILE_BYTES = 64 << 20
"""Weight files are not made smaller than this only to give every rank one."""


def share_out(
    specs: Mapping[str, TensorSpec], max_file_bytes: int, loads: Sequence[int], *, wanted_files: int = 0
) -> list[WeightFile]:
    """Cut the weights into files, in the order of the tensors, and choose a writer for each.

    Args:
        specs: every tensor.
        max_file_bytes: of a file; a larger tensor has a file of its own.
        loads: bytes that each rank writes besides; the files even them out.
        wanted_files: as many files as that, as near as whole tensors allow, where `max_file_bytes` does not ask for
            more; 0: one a rank, as long as a file holds SMALL_FILE_BYTES.
    """
    total, ranks = sum(spec.bytes for spec in specs.values()), len(loads)
    needed = max(wanted_files, len(_filled(specs, max_file_bytes)))
    if not wanted_files:
        needed = max(needed, min(ranks, total // SMALL_FILE_BYTES))
        # some more, rather than ranks with a file less than others
        needed = -(-needed // ranks) * ranks if needed > ranks else needed
    groups = _within(specs, max_file_bytes, needed)
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    writers = _writers([sum(spec.bytes for spec in group.values()) for group in groups], loads)
    return [
        WeightFile(name, writer, file_order(group)) for name, writer, group in zip(names, writers, groups, strict=True)
    ]


def _filled(specs: Mapping[str, TensorSpec], max_file_bytes: int) -> list[dict[str, TensorSpec]]:
    """As few groups as can be."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.bytes > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.bytes
    return groups


def _within(specs: Mapping[str, TensorSpec], max_file_bytes: int, needed: int) -> list[dict[str, TensorSpec]]:
    """`needed` groups of about equal bytes, or as many more as the limit asks for."""
    for count in range(needed, 2 * needed + 1):
        groups = _evenly(specs, count)
        if all(len(group) == 1 or sum(s.bytes for s in group.values()) <= max_file_bytes for group in groups):
            return groups
    return [part for group in _evenly(specs, needed) for part in _filled(group, max_file_bytes)]


def _evenly(specs: Mapping[str, TensorSpec], count: int) -> list[dict[str, TensorSpec]]:
    """At most `count` groups of about equal bytes: a tensor goes where its middle lies."""
    total = max(1, sum(spec.bytes for spec in specs.values()))
    groups: dict[int, dict[str, TensorSpec]] = {}
    before = 0
    for name, spec in specs.items():
        groups.setdefault((2 * before + spec.bytes) * count // (2 * total), {})[name] = spec
        before += spec.bytes
    return list(groups.values())


def _writers(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """A rank for each file: the largest first, to the rank with the least to write."""
    left, writers = list(loads), [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        writer = min(range(len(left)), key=lambda rank: (left[rank], _far_apart(rank)))
        left[writer] += sizes[number]
        writers[number] = writer
    return writers


def _far_apart(rank: int) -> int:
    """An order in which neighbours follow late: they share a node and its network card."""
    return int(f"{rank:032b}"[::-1], 2)


def index_json(files: Sequence[WeightFile]) -> bytes:
    """model.safetensors.index.json, as Hugging Face writes it."""
    specs = [(name, spec, file.name) for file in files for name, spec in file.specs.items()]
    return readable_json(
        {
            "metadata": {"total_size": sum(spec.bytes for _, spec, _ in specs)},
            "weight_map": {name: file for name, _, file in specs},
        }
    )


def _turns(files: Sequence[WeightFile]) -> Iterator[tuple[WeightFile, str]]:
    """The first tensor of every file, then the second of every file, and so on."""
    for row in zip_longest(*(file.specs for file in files)):
        yield from ((file, name) for file, name in zip(files, row, strict=True) if name is not None)


class WeightGatherer:
    """Writes this rank's weight files and sends the others what they need."""

    def __init__(self, peers: Peers, masters: Sequence[Placed], read: PieceReader):
        self._peers = peers
        self._read = read
        self._parts: dict[str, list[Placed]] = {}
        for part in masters:
            self._parts.setdefault(part.name, []).append(part)

    def write(self, directory: Path, files: Sequence[WeightFile], attempt: Attempt) -> dict[str, FileEntry]:
        """Write every file; the entries of those this rank wrote. Errors end up in `attempt`.

        Files take turns tensor by tensor, so that their writers work at the same time.
        """
        writers: dict[str, TensorFileWriter] = {}
        entries = {}
        with ExitStack() as stack:
            for file in files:
                if file.writer == self._peers.rank:
                    with attempt.step():
                        writers[file.name] = stack.enter_context(TensorFileWriter(directory / file.name, file.specs))
            for file, name in _turns(files):
                self._gather(name, file, writers.get(file.name), attempt)
            for name, writer in writers.items():
                with attempt.step():
                    if attempt.error is None:
                        entries[name] = writer.finish()
            with attempt.step():
                stack.close()
        return entries

    def _gather(self, name: str, file: WeightFile, writer: TensorFileWriter | None, attempt: Attempt) -> None:
        """Bring the parts of one tensor together on the file's writer, and write it there."""
        spec = file.specs[name]
        if self._peers.rank != file.writer:
            for part in self._parts[name]:
                if part.rank == self._peers.rank:
                    self._peers.send(self._cast(part, spec, attempt), file.writer)
            return
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for part in self._parts[name]:
            target = tensor[part.box.slices]
            if part.rank == self._peers.rank:
                self._put(part, spec, target, attempt)
            elif target.is_contiguous():
                self._peers.receive(target, part.rank)
            else:
                arrived = torch.empty(part.box.shape, dtype=spec.dtype)
                self._peers.receive(arrived, part.rank)
                target.copy_(arrived)
        with attempt.step():
            if writer is not None and attempt.error is None:
                writer.write(name, tensor, passing=True)

    def _put(self, part: Placed, spec: TensorSpec, target: torch.Tensor, attempt: Attempt) -> None:
        """This rank's own part, cast on the way; no copy of it in between where it lies on the CPU."""
        with attempt.step():
            held = self._read(part)
            if held.device.type == "cpu":
                _refuse_beyond_fp16(part, target.copy_(held))
            else:
                target.copy_(self._cast(part, spec, attempt))

    def _cast(self, part: Placed, spec: TensorSpec, attempt: Attempt) -> torch.Tensor:
        """The part in the export dtype on the CPU; anything of its size after an error, for somebody waits for it."""
        with attempt.step():
            # cast where the tensor lives: half the bytes cross from the device
            cast = self._read(part).to(spec.dtype)
            _refuse_beyond_fp16(part, cast)
            return cast.cpu().contiguous()
        return torch.zeros(part.box.shape, dtype=spec.dtype)


def _refuse_beyond_fp16(part: Placed, cast: torch.Tensor) -> None:
    if cast.dtype == torch.float16 and not torch.isfinite(cast).all():
        raise ValueError(
            f"{part.name}: values beyond ±65504 or not finite do not fit fp16; use checkpoint.export_dtype=bf16"
        )
