"""The processes that encode. Each loads the tokenizer, then turns units into tokens in a shard of its own.

They are forked before anything here starts a thread, hold no lock of the parent's, and end when it does.
"""

import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.documents import Bad, Batch, read_lines, read_unit
from data_prep.encode import Encoder, Extent, Settings, Shard
from data_prep.engine import ONE_THREAD, Choice, Engine, choose_engine, fast_engine
from data_prep.errors import DiskError, PrepError, WorkError
from data_prep.feed import Chunk
from data_prep.inputs import Source
from data_prep.plan import Unit
from data_prep.tokenizer import load_tokenizer
from megalemur.data.manifest import TokenizerRecord

_AHEAD = 2  # units that a worker holds: it never waits for the next


class Start(NamedTuple):
    """What a worker needs before its first unit."""

    settings: Settings
    sources: list[Source]
    shard: Path


class Task(NamedTuple):
    """A unit to encode, or a chunk of one."""

    number: int
    unit: Unit
    chunk: Chunk | None
    digest: str
    """Of the chunk's text."""


class Ready(NamedTuple):
    """What a worker knows of the tokenizer."""

    record: TokenizerRecord
    name: str


class Pool:
    """Some workers and their pipes."""

    def __init__(self, count: int, tokenizer: Path, choice: Choice):
        """Fork them; they begin to load the tokenizer."""
        context = multiprocessing.get_context("fork")
        self._load: dict[Connection, int] = {}
        self._processes: dict[Connection, Any] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            others = [ours, *self._processes]
            process = context.Process(target=_work, args=(theirs, others, tokenizer, choice), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours], self._load[ours] = process, 0

    def ready(self) -> Ready:
        """What the tokenizer is, once all have loaded it.

        Raises:
            ValueError: it cannot be loaded.
        """
        answers = [self._receive(pipe) for pipe in self._processes]
        return answers[0]

    def choose(self, choice: Choice, sample: Iterable[list[str]]) -> tuple[str, str]:
        """(engine, reason), tried by one of the workers."""
        first = next(iter(self._processes))
        first.send((choice, list(sample)))
        return self._receive(first)

    def start(self, settings: Settings, sources: list[Source], shards: Sequence[Path]) -> None:
        """Make all ready for units."""
        for pipe, shard in zip(self._processes, shards, strict=True):
            pipe.send(Start(settings, sources, shard))

    def idle(self) -> Connection | None:
        """A worker that can take a unit."""
        pipe = min(self._load, key=self._load.__getitem__)
        return pipe if self._load[pipe] < _AHEAD else None

    @property
    def busy(self) -> bool:
        """Units are under way."""
        return any(self._load.values())

    def give(self, pipe: Connection, task: Task) -> None:
        """Hand out a unit."""
        try:
            pipe.send(task)
        except OSError:
            raise self._death(pipe) from None
        self._load[pipe] += 1

    def finished(self) -> list[Extent]:
        """Wait until at least one unit is done.

        Raises:
            PrepError: what a worker met, or that one died.
        """
        done = []
        for pipe in wait([pipe for pipe, load in self._load.items() if load]):
            assert isinstance(pipe, Connection)
            done.append(self._receive(pipe))
            self._load[pipe] -= 1
        return done

    def _receive(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._death(pipe) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _death(self, pipe: Connection) -> WorkError:
        process = self._processes[pipe]
        process.join(5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return WorkError(f"a worker process {how} (out of memory?); run the same command again: what was done stays")

    def close(self) -> None:
        """End all workers at once."""
        for pipe, process in self._processes.items():
            process.kill()
            pipe.close()
        for process in self._processes.values():
            process.join()


def _work(pipe: Connection, others: list[Connection], tokenizer: Path, choice: Choice) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    for other in others:  # else a dead parent's pipes would stay open in its other children
        other.close()
    gc.disable()  # nothing here makes cycles, and a million small dicts a unit keep the collector busy
    os.environ |= ONE_THREAD
    try:
        _serve(pipe, tokenizer, choice)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except OSError as error:
        pipe.send(DiskError(_disk(error)))
    except Exception as error:
        pipe.send(
            error if isinstance(error, (PrepError, ValueError)) else WorkError(f"{type(error).__name__}: {error}")
        )


def _serve(pipe: Connection, tokenizer: Path, choice: Choice) -> None:
    reference = load_tokenizer(tokenizer)
    fast = fast_engine(tokenizer) if choice != "reference" else None
    pipe.send(Ready(reference.record, reference.name))
    message = pipe.recv()
    if not isinstance(message, Start):
        pipe.send(choose_engine(fast, reference, *message))
        message = pipe.recv()
    settings, sources, path = message
    engine: Engine = reference if fast is None or settings.engine == "reference" else fast
    encoder, shard = Encoder(settings, engine, reference), Shard(path)
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        extent = shard.write(_batches(task, sources, settings.text_key), encoder, sources)
        extent.unit = task.number
        if task.chunk is not None:
            extent.chunk, extent.last, extent.source_digest = task.chunk.number, task.chunk.last, task.digest
        pipe.send(extent)


def _listen(pipe: Connection, tasks: "queue.SimpleQueue[Task | None]") -> None:
    """Take tasks off the pipe while a unit is encoded: a chunk does not fit into it, and the parent would wait."""
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        tasks.put(None)


def _batches(task: Task, sources: list[Source], key: str) -> Iterable[Batch]:
    if task.chunk is None:
        yield from read_unit(task.unit, sources, key)
        return
    lines = 0
    for batch in read_lines(task.chunk.data, task.unit.first, key, begins=task.chunk.number == 0):
        lines += batch.lines_read
        yield batch
    if task.chunk.damage:
        yield Batch(task.unit.first, bad=[Bad(lines + 1, task.chunk.damage)])


def _disk(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else "the shard of a worker: "
    return (
        f"{name}{error.strerror}; make room and run the same command again: what was done stays "
        "(the shards take as much as the data set, and joining them as much again)"
    )
