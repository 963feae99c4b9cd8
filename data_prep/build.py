"""A build from its input to its manifest: plan, encode and join. Whatever is finished is not encoded twice."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash
from rich.console import Console

from data_prep.documents import read_unit
from data_prep.encode import Extent, Settings
from data_prep.engine import Choice
from data_prep.errors import BadDocumentError, ChangedError
from data_prep.feed import CHUNK_BYTES, Chunk, chunks_of
from data_prep.inputs import Format, Source, find_inputs
from data_prep.join import Joiner, copy_shuffled, input_records
from data_prep.plan import Unit, make_units, part_of
from data_prep.progress import BuildProgress
from data_prep.tokenizer import tokenizer_file
from data_prep.work import Work, refuse_other_plan
from data_prep.workers import Pool, Ready, Task
from megalemur.data.errors import DamagedDataError
from megalemur.data.indexed import IndexedFile, optimal_dtype
from megalemur.data.manifest import BadDocument, Manifest, Origin, read_manifest
from megalemur.data.writer import IndexedWriter, Written

# several batches in a row: an engine whose cache degenerates shows it only after some tens of thousands of words
_SAMPLED_UNITS, _SAMPLED_BATCHES = 2, 4
_JOINED_AT_ONCE = 8  # units


class Request(NamedTuple):
    """What is to be built."""

    inputs: Sequence[str]
    format: Format | None
    text_key: str
    tokenizer: Path
    engine: Choice
    output: Path
    prepend_bos: bool
    append_eos: bool
    workers: int
    skip_bad: int
    """Bad documents that are left out and listed; one more ends the build."""
    part: tuple[int, int] | None
    """(number from 0, of how many)."""
    shuffle: int | None
    """Seed of the documents' order; None: as they come."""
    restart: bool
    """Throw away what an interrupted build left."""


@dataclass
class Frontier:
    """Looks at finished units in their order: what is said of bad documents does not depend on who was faster."""

    sources: Sequence[Source]
    units: Sequence[Unit]
    mine: range
    allowed: int
    bad: list[tuple[int, BadDocument]] = field(default_factory=list)
    _at: tuple[int, int] = (-1, 0)
    _lines: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._at = (self.mine.start, 0)
        if self.mine and self.units[self.mine.start].start:
            unit = self.units[self.mine.start]
            self._lines[unit.first] = lines_before(self.sources[unit.first], unit)

    def advance(self, done: dict[tuple[int, int], Extent]) -> Iterator[Extent]:
        """The units that are finished and have no unfinished one before them, in order, each once.

        Raises:
            BadDocumentError: more bad documents than are allowed.
        """
        while (extent := done.get(self._at)) is not None:
            for source, line, reason in extent.bad:
                where = self.sources[source].name
                if line is not None:
                    where += f":{line + self._lines[source]}"
                self.bad.append((source, BadDocument(where=where, reason=reason)))
                self._refuse_too_many()
            for source, tally in extent.tallies.items():
                self._lines[source] += tally.lines
            unit, chunk = self._at
            self._at = (unit + 1, 0) if extent.last else (unit, chunk + 1)
            yield extent

    def _refuse_too_many(self) -> None:
        if len(self.bad) <= self.allowed:
            return
        last = self.bad[-1][1]
        count = f" ({len(self.bad):,} bad documents so far)" if self.allowed else ""
        raise BadDocumentError(
            f"{last.where}: {last.reason}{count}; mend it and start with --restart, or leave out up to N such "
            "documents with --skip-bad N, which goes on from here"
        )


def lines_before(source: Source, unit: Unit) -> int:
    """Lines or rows of a source before one of its units."""
    if unit.kind == "rows":
        import pyarrow.parquet as parquet

        with source.open() as stream:
            facts = parquet.ParquetFile(stream).metadata
            return sum(facts.row_group(k).num_rows for k in range(unit.start))
    count, left = 1, unit.start - 1
    with source.open() as stream:
        while left > 0 and (data := stream.read(min(left, 1 << 22))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def build(request: Request, console: Console) -> Manifest:
    """Build the data set that is asked for.

    Raises:
        ValueError: something in the request.
        PrepError: see errors.py; what is finished stays.
        OSError: a file of the output.
    """
    began = time.monotonic()
    pool = Pool(request.workers, request.tokenizer, request.engine)
    try:
        sources = find_inputs(request.inputs, request.format)
        refuse_output_below_input(request)
        units = make_units(sources)
        ready = pool.ready()
        refuse_missing_tokens(request, ready)
        work = Work(request.output, optimal_dtype(ready.record.vocab_size).itemsize)
        try:
            plan, reason = begin(request, work, pool, _plan(request, sources, units, ready.record.sha256))
            console.print(f"{len(sources):,} files; {reason}", highlight=False, soft_wrap=True)
            with Joiner(work, _joined(request, work), ready.record.vocab_size) as joiner:
                frontier = encode_all(request, joiner, pool, sources, units, plan, console)
                pool.close()
                refuse_changed(sources)
                encoded = time.monotonic()
                manifest = _finish(request, joiner, sources, frontier, ready, plan, (began, encoded))
        except BaseException:
            work.close()
            raise
        work.remove()
    finally:
        pool.close()
    return manifest


def _joined(request: Request, work: Work) -> Path:
    """Where the units are joined: in the end already, or where their documents still have to be put into order."""
    return request.output if request.shuffle is None else work.path / "ordered"


def complete_already(request: Request) -> Manifest | None:
    """The data set where this very command has built it before, as when it was killed when only tidying up was left.

    None where there is none, or another one.
    """
    try:
        manifest = read_manifest(request.output)
    except DamagedDataError:
        return None
    if manifest is None or not manifest.vouches(request.output):
        return None
    same = {key: value for key, value in _arguments(request).items() if key != "workers"}
    if any(manifest.origin.arguments.get(key) != value for key, value in same.items()):
        return None
    if not Path(f"{request.output}.work").exists():
        return manifest if _digest_now(request) == manifest.plan else None
    work = Work(request.output, 1)
    plan = work.plan()
    if (_plan_digest(plan) if plan else _digest_now(request)) != manifest.plan:
        work.close()
        return None
    work.remove()
    return manifest


def _digest_now(request: Request) -> str | None:
    """What a manifest of this request would have as its plan; None where a pipe is read, which nobody can look up."""
    sources = find_inputs(request.inputs, request.format)
    if any(source.size is None for source in sources):
        return None
    tokenizer = hashlib.sha256(tokenizer_file(request.tokenizer).read_bytes()).hexdigest()
    return _plan_digest(_plan(request, sources, make_units(sources), tokenizer))


def refuse_output_below_input(request: Request) -> None:
    """Refuse an output in a directory that is an input: a second run would find the shards of the first among it."""
    output = request.output.resolve()
    for text in request.inputs:
        if "://" not in text and Path(text).is_dir() and output.is_relative_to(Path(text).resolve()):
            raise ValueError(
                f"--output {request.output}: lies in --input {text} and would become input; choose another"
            )


def refuse_missing_tokens(request: Request, ready: Ready) -> None:
    """Refuse BOS or EOS of a tokenizer that has none."""
    if request.prepend_bos and ready.record.bos_id is None:
        raise ValueError(f"--tokenizer {request.tokenizer}: has no BOS; leave out --prepend-bos")
    if request.append_eos and ready.record.eos_id is None:
        raise ValueError(f"--tokenizer {request.tokenizer}: has no EOS; use --no-append-eos")


def _plan(request: Request, sources: Sequence[Source], units: Sequence[Unit], tokenizer: str) -> dict[str, Any]:
    """What the bytes of the output are a function of."""
    settings = {
        "text key": request.text_key,
        "tokenizer": tokenizer,
        "prepend BOS": request.prepend_bos,
        "append EOS": request.append_eos,
        "part": list(request.part) if request.part else None,
        "chunk bytes": CHUNK_BYTES,
    }
    return {
        "format": 1,
        "settings": settings,
        "sources": [source._asdict() for source in sources],
        "units": [list(unit) for unit in units],
    }


def begin(request: Request, work: Work, pool: Pool, plan: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Resume what was begun, or begin; (plan with its engine, what to say).

    Raises:
        ChangedError: what was begun was something else.
    """
    begun = None if request.restart else work.plan()
    if begun is None:
        engine, reason = pool.choose(request.engine, _sample(request, plan))
        plan |= {"engine": engine, "reason": reason}
        work.begin(plan)
        return plan, reason
    refuse_other_plan(begun, plan, work.path)
    if request.engine not in ("auto", begun["engine"]):
        raise ChangedError(
            f"{work.path} was begun with the {begun['engine']} engine, which never changes within a build; "
            "leave out --engine, or throw the begun build away with --restart"
        )
    try:
        pool.choose(begun["engine"], _sample(request, plan))
    except ValueError as error:
        raise ChangedError(
            f"{work.path} was begun with the {begun['engine']} engine, and now {error}; the engine never changes "
            "within a build: install what was there, or throw the begun build away with --restart"
        ) from None
    work.resume()
    return begun, f"going on with {len(work.extents):,} finished units; {begun['reason']}"


def _sample(request: Request, plan: dict[str, Any]) -> Iterator[list[str]]:
    """Batches of texts from all over the input; pipes, which are read once, are left to the checks on the way."""
    sources = [Source(**source) for source in plan["sources"]]
    units = [unit for unit in (Unit(*unit) for unit in plan["units"]) if sources[unit.first].size is not None]
    step = max(1, len(units) // _SAMPLED_UNITS)
    for unit in units[::step][:_SAMPLED_UNITS]:
        whole = unit._replace(kind="files") if unit.kind == "stream" else unit
        yield from (batch.texts for batch in islice(read_unit(whole, sources, request.text_key), _SAMPLED_BATCHES))


def encode_all(
    request: Request,
    joiner: Joiner,
    pool: Pool,
    sources: list[Source],
    units: list[Unit],
    plan: dict[str, Any],
    console: Console,
) -> Frontier:
    """Have every unit of this part encoded that is not in the journal, and join them meanwhile."""
    work = joiner.work
    settings = Settings(request.tokenizer, plan["engine"], request.text_key, request.prepend_bos, request.append_eos)
    pool.start(settings, sources, [work.new_shard(k) for k in range(request.workers)])
    mine = part_of(units, *request.part) if request.part else range(len(units))
    frontier = Frontier(sources, units, mine, request.skip_bad)
    total = sum(units[number].weight for number in mine)
    finished = sum(units[unit].weight for (unit, _), extent in work.extents.items() if extent.last)
    with BuildProgress(console, total, finished) as progress:
        tasks = _tasks(sources, units, mine, work)
        while True:
            while (pipe := pool.idle()) is not None and (task := next(tasks, None)) is not None:
                pool.give(pipe, task)
            # the disk writes while the workers encode; a few at a time, so that they never wait for their next unit
            for extent in islice(frontier.advance(work.extents), _JOINED_AT_ONCE if pool.busy else None):
                joiner.add(extent)
            if not pool.busy:
                return frontier
            for extent in pool.finished():
                work.add(extent)
                _show(progress, units, extent)


def _show(progress: BuildProgress, units: Sequence[Unit], extent: Extent) -> None:
    unit = units[extent.unit]
    text = sum(tally.text_bytes for tally in extent.tallies.values())
    stored = unit.weight if unit.kind != "stream" or extent.last else 0
    progress.add(
        stored_bytes=stored, text_bytes=text, documents=extent.documents, tokens=extent.tokens, bad=len(extent.bad)
    )


def _tasks(sources: Sequence[Source], units: Sequence[Unit], mine: range, work: Work) -> Iterator[Task]:
    """What is left to do, in order."""
    for number in mine:
        unit = units[number]
        if unit.kind != "stream":
            if (number, 0) not in work.extents:
                yield Task(number, unit, None, "")
            continue
        if _stream_is_done(number, work) and sources[unit.first].size is not None:
            continue
        for chunk in chunks_of(sources[unit.first]):
            digest = xxhash.xxh3_128_hexdigest(chunk.data)
            done = work.extents.get((number, chunk.number))
            if done is None:
                yield Task(number, unit, chunk, digest)
            else:
                _refuse_other_text(sources[unit.first], chunk, digest, done)


def _stream_is_done(number: int, work: Work) -> bool:
    chunk = 0
    while (extent := work.extents.get((number, chunk))) is not None:
        if extent.last:
            return True
        chunk += 1
    return False


def _refuse_other_text(source: Source, chunk: Chunk, digest: str, done: Extent) -> None:
    if digest != done.source_digest or chunk.last != done.last:
        raise ChangedError(
            f"{source.name}: its text is not the one with which the build began, from chunk {chunk.number} "
            f"({CHUNK_BYTES >> 20} MiB each) on; put it back as it was, or start with --restart"
        )


def refuse_changed(sources: Sequence[Source]) -> None:
    """Refuse to join what was read from files that changed meanwhile.

    Raises:
        ChangedError: names them.
    """
    said = [f"{source.name} {change}" for source in sources if (change := source.changed())]
    if said:
        listing = "".join(f"\n  - {one}" for one in said[:20])
        raise ChangedError(f"the input changed while it was read:{listing}\nstart again with --restart")


def _finish(
    request: Request,
    joiner: Joiner,
    sources: list[Source],
    frontier: Frontier,
    ready: Ready,
    plan: dict[str, Any],
    clock: tuple[float, float],
) -> Manifest:
    """Put the documents into their order where one is asked for, and write the manifest."""
    work = joiner.work
    extents = [extent for _, extent in sorted(work.extents.items())]
    # a part may be empty: there may be fewer units than parts
    if request.part is None and not any(extent.tokens for extent in extents):
        empty = sum(tally.empty for extent in extents for tally in extent.tallies.values())
        raise ValueError(f"{request.output}: the input has {empty} documents and no text; give files with text in them")
    control = sum((Counter(extent.control) for extent in extents), Counter[str]())

    def manifest(written: Written) -> Manifest:
        seconds = {"encode": clock[1] - clock[0], "join": time.monotonic() - clock[1]}
        return Manifest(
            **written._asdict(),
            tokenizer=ready.record,
            prepend_bos=request.prepend_bos,
            append_eos=request.append_eos,
            unknown_tokens=sum(extent.unknown for extent in extents),
            control_strings=dict(control),
            inputs=input_records(sources, extents, frontier.bad),
            bad=tuple(bad for _, bad in frontier.bad),
            part=request.part,
            plan=_plan_digest(plan),
            origin=_origin(request, plan, seconds),
        )

    if request.shuffle is None:
        joiner.writer.commit(manifest)
        return _read_back(request.output)
    joiner.writer.commit()
    vocab_size = ready.record.vocab_size
    with IndexedWriter(request.output, vocab_size=vocab_size, scratch=work.path / "shuffled") as writer:
        copy_shuffled(IndexedFile(joiner.writer.prefix), request.shuffle, writer)
        writer.commit(manifest)
    return _read_back(request.output)


def _read_back(prefix: Path) -> Manifest:
    manifest = read_manifest(prefix)
    assert manifest is not None
    return manifest


def _plan_digest(plan: dict[str, Any]) -> str:
    """The same for all parts of one data set."""
    settings = {key: value for key, value in plan["settings"].items() if key != "part"}
    return xxhash.xxh3_128_hexdigest(orjson.dumps([settings, plan["sources"], plan["units"]]))


def _arguments(request: Request) -> dict[str, Any]:
    return {
        "input": list(request.inputs),
        "format": request.format,
        "text_key": request.text_key,
        "tokenizer": str(request.tokenizer),
        "output": str(request.output),
        "prepend_bos": request.prepend_bos,
        "append_eos": request.append_eos,
        "skip_bad": request.skip_bad,
        "shuffle": request.shuffle,
        "workers": request.workers,
    }


def _origin(request: Request, plan: dict[str, Any], seconds: dict[str, float]) -> Origin:
    return Origin(
        tool="build_index",
        version=version("megalemur"),
        arguments=_arguments(request),
        facts={"engine": plan["engine"], "reason": plan["reason"]},
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
