"""One reader a portion, then scatter: each byte is read from the disk once, compared with its digest, and handed to the
ranks that want it.

All ranks walk through one and the same order of messages, so that none waits in a circle, and walk on after an error,
so that none waits in vain. Memory above the pieces: two chunks that are read, one that is sent, one that arrives.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from megalemur.checkpoint.errors import CheckpointError
from megalemur.checkpoint.exchange import Attempt, Peers
from megalemur.checkpoint.portions import Part, Portion, StoredFile, Wanted, parts_of, portions_for, share_out
from megalemur.checkpoint.read_ahead import Buffer, ReadAhead
from megalemur.parallel.boxes import Box
from megalemur.parallel.state import Piece

_ALIGNMENT = 8
"""Bytes: parts of several dtypes share a message, and each begins where its elements may."""


class Traffic(NamedTuple):
    """What a load cost this rank."""

    read_bytes: int
    """From the disk."""
    sent_bytes: int
    """To other ranks."""


class Scatter:
    """Fills the pieces of all ranks from files. Every rank builds it from the same files and claims."""

    def __init__(self, files: Sequence[StoredFile], peers: Peers, wanted: Sequence[Wanted], *, everything: bool):
        """Plan who reads what.

        Args:
            files: where from.
            peers: the ranks.
            wanted: what each rank wants, in the order of ranks.
            everything: read and compare also what no rank wants. Otherwise for a process alone.
        """
        assert everything or peers.size == 1
        self._peers, self._wanted = peers, wanted
        portions = share_out(files, peers.size)
        incoming = portions_for(portions, wanted[peers.rank])
        own = [portion for portion in portions if portion.reader == peers.rank]
        self._own = own if everything else incoming
        self._turns = 1 + max((portion.turn for portion in portions), default=-1) if everything else len(self._own)
        self._incoming = {(p.turn, p.reader): p for p in incoming if p.reader != peers.rank}
        self._sent = 0
        self._filled = [0] * sum(map(len, wanted[peers.rank].values()))
        self._outbox, self._inbox = Buffer(), Buffer()

    def run(self, pieces: Sequence[Piece], attempt: Attempt) -> Traffic:
        """Read, compare, hand out. Errors end up in `attempt`; the pieces are then worth nothing, on any rank."""
        with ReadAhead(self._own, attempt) as ahead:
            for turn in range(self._turns):
                self._take_turn(turn, ahead, pieces, attempt)
        with attempt.step():
            self._refuse_gaps(pieces)
        return Traffic(ahead.read_bytes, self._sent)

    def _take_turn(self, turn: int, ahead: ReadAhead, pieces: Sequence[Piece], attempt: Attempt) -> None:
        """One portion a rank: read, keep what is for this rank, exchange the rest."""
        rank, size = self._peers.rank, self._peers.size
        outgoing: dict[int, list[Part]] = {}
        data = torch.empty(0, dtype=torch.uint8)
        if turn < len(self._own):
            data = ahead.next()
            outgoing = self._outgoing(self._own[turn])
            with attempt.step():
                self._deliver(data, outgoing.pop(rank, []), pieces)
        for shift in range(1, size):
            # in a ring, so that at each shift all ranks send to different ones
            target, source = (rank + shift) % size, (rank - shift) % size
            arriving = self._incoming.get((turn, source))
            parts = [] if arriving is None else list(parts_of(arriving, self._wanted[rank]))
            self._exchange((target, outgoing.get(target, []), data), (source, parts), pieces, attempt)

    def _outgoing(self, portion: Portion) -> dict[int, list[Part]]:
        """What each rank wants of a portion; nothing for those that want nothing."""
        found = {rank: list(parts_of(portion, wanted)) for rank, wanted in enumerate(self._wanted)}
        return {rank: parts for rank, parts in found.items() if parts}

    def _exchange(
        self,
        outgoing: tuple[int, list[Part], torch.Tensor],
        incoming: tuple[int, list[Part]],
        pieces: Sequence[Piece],
        attempt: Attempt,
    ) -> None:
        (target, leaving, data), (source, arriving) = outgoing, incoming
        works = []
        if arriving:
            inbox = self._inbox.of(_message_bytes(arriving))
            works.append(self._peers.begin_receive(inbox, source))
        if leaving:
            outbox = self._outbox.of(_message_bytes(leaving))
            with attempt.step():
                for (start, stop), part in zip(_places(leaving), leaving, strict=True):
                    _view(outbox[start:stop], part, part.box).copy_(_wanted_of(data, part))
            self._sent += len(outbox)
            works.append(self._peers.begin_send(outbox, target))
        for work in works:
            work.wait()
        with attempt.step():
            for (start, stop), part in zip(_places(arriving), arriving, strict=True):
                self._fill(pieces[part.piece], part, _view(inbox[start:stop], part, part.box))

    def _deliver(self, data: torch.Tensor, parts: Iterable[Part], pieces: Sequence[Piece]) -> None:
        for part in parts:
            self._fill(pieces[part.piece], part, _wanted_of(data, part))

    def _fill(self, piece: Piece, part: Part, values: torch.Tensor) -> None:
        """Cast and copy, on whatever device the piece lives."""
        piece.tensor[part.box.relative_to(piece.box).slices].copy_(values)
        self._filled[part.piece] += part.box.size

    def _refuse_gaps(self, pieces: Sequence[Piece]) -> None:
        """Where a directory and its tensors were checked, this cannot happen; a piece half filled would look loaded."""
        for piece, filled in zip(pieces, self._filled, strict=True):
            if filled != piece.box.size:
                raise CheckpointError(f"{piece.name} ({piece.kind}): {filled} of {piece.box.size} elements were found")


def _wanted_of(data: torch.Tensor, part: Part) -> torch.Tensor:
    """The part's box out of a portion's bytes."""
    run = data[part.offset : part.offset + part.run.size * part.dtype.itemsize]
    if run.storage_offset() % part.dtype.itemsize:
        run = run.clone()  # other programs' files begin their elements anywhere
    return _view(run, part, part.run)[part.box.relative_to(part.run).slices]


def _view(data: torch.Tensor, part: Part, box: Box) -> torch.Tensor:
    return data.view(part.dtype).view(box.shape)


def _places(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Where each part lies in its message."""
    at = 0
    for part in parts:
        yield at, at + part.bytes
        at += -(-part.bytes // _ALIGNMENT) * _ALIGNMENT


def _message_bytes(parts: Sequence[Part]) -> int:
    return sum(-(-part.bytes // _ALIGNMENT) * _ALIGNMENT for part in parts)
