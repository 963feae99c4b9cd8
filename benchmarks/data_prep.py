"""The preprocessor beside the usual shape of one, beside its engine alone, and beside cp; its memory; opening its data.

    python benchmarks/data_prep.py                      # everything but the long memory runs
    python benchmarks/data_prep.py memory --megabytes 10000

Text is what the machine has: Python's standard library, installed packages, their documentation; repeated with edits.
Times are those of whole processes, in turns; ratios are of pairs.
"""

import argparse
import glob
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# run by path, this file would stand for the package of the same name
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).parent)]
WORKERS = 2
_ROUNDS = 9
console = Console()


def tokenizer_path() -> Path:
    """A Llama-style SentencePiece model of 32,000 pieces."""
    import importlib.resources

    return Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


def texts() -> Iterator[str]:
    """Real text, without end: from the second time on with edits, so that no document comes twice."""
    folders = [sysconfig.get_paths()[key] for key in ("stdlib", "purelib")]
    patterns = ("**/*.py", "**/*.md", "**/*.rst", "**/*.txt")
    files = sorted({f for folder in folders for p in patterns for f in glob.glob(f"{folder}/{p}", recursive=True)})
    turn = 0
    while True:
        for file in files:
            try:
                text = Path(file).read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if 0 < len(text) < 400_000:
                yield f"# edit {turn}\n{text.replace('self', f'self{turn}', 3)}" if turn else text
        turn += 1


def write_corpus(path: Path, megabytes: int) -> int:
    """JSON lines of so many megabytes of text; returns the documents."""
    size = count = 0
    with path.open("w") as stream:
        for text in texts():
            stream.write(json.dumps({"text": text}) + "\n")
            size, count = size + len(text), count + 1
            if size >= megabytes * 1_000_000:
                return count
    raise AssertionError("texts never end")


def write_tiny(path: Path, documents: int) -> None:
    """So many documents of a few words each."""
    words = [word for text in (next(texts()),) for word in text.split() if word.isalnum()]
    with path.open("w") as stream:
        for number in range(documents):
            stream.write(f'{{"text": "{words[number % 97]} {words[number % 89]} {number}"}}\n')


def ours(source: Path, output: Path, *options: str) -> list[str]:
    """The command line of our preprocessor."""
    script = [sys.executable, str(ROOT / "data_prep" / "build_index.py"), "--input", str(source)]
    return [*script, "--tokenizer", str(tokenizer_path()), "--output", str(output), "--workers", str(WORKERS), *options]


_MODEL = None


def _load() -> None:
    global _MODEL  # what multiprocessing's initializer is for
    import sentencepiece

    _MODEL = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path()))


def _encode(line: str) -> list[int]:
    assert _MODEL is not None
    return [*_MODEL.encode(json.loads(line)["text"]), 2]


def baseline(source: Path, output: Path) -> None:
    """The usual shape: a pool that encodes lines, and one process that writes what comes back."""
    lengths = []
    with (
        source.open() as lines,
        Path(f"{output}.bin").open("wb") as stream,
        multiprocessing.Pool(WORKERS, _load) as pool,
    ):
        for ids in pool.imap(_encode, lines, 32):
            stream.write(np.array(ids, np.uint16).tobytes())
            lengths.append(len(ids))
    np.array(lengths, np.int32).tofile(f"{output}.idx")


def seconds_of(command: list[str]) -> float:
    """Wall time of a whole process."""
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def against_baseline(directory: Path, megabytes: int, pairs: int) -> None:
    """Whole processes in turns."""
    source = directory / "corpus.jsonl"
    documents = write_corpus(source, megabytes)
    times: dict[str, list[float]] = {"ours": [], "pool": []}
    commands = {
        "ours": ours(source, directory / "ours", "--overwrite"),
        "pool": [sys.executable, __file__, "baseline", "--source", str(source), "--output", str(directory / "pool")],
    }
    for number in range(pairs):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_of(commands[name]))
    same = (directory / "ours.bin").read_bytes() == (directory / "pool.bin").read_bytes()
    ratio = statistics.median(theirs / mine for mine, theirs in zip(times["ours"], times["pool"], strict=True))
    console.print(
        f"{source.stat().st_size / 1e6:.0f} MB, {documents:,} documents, {WORKERS} workers, {pairs} pairs: "
        f"ours {statistics.median(times['ours']):.2f} s, pool and one writer {statistics.median(times['pool']):.2f} s: "
        f"{ratio:.2f} times as fast (bar: 6); same tokens: {same}"
    )


def _encode_alone(part: list[str], pipe) -> None:
    """A process that encodes texts it has in memory, in batches of a megabyte."""
    from data_prep.engine import ONE_THREAD, fast_engine

    os.environ |= ONE_THREAD
    engine = fast_engine(tokenizer_path())
    assert engine is not None
    batches: list[list[str]] = [[]]
    size = 0
    for text in part:
        batches[-1].append(text)
        size += len(text)
        if size > 1 << 20:
            batches.append([])
            size = 0
    pipe.send("ready")
    pipe.recv()
    for batch in batches:
        engine.encode(batch)
    pipe.send("done")


def against_engine(directory: Path, megabytes: int) -> None:
    """Our whole process beside the engine alone on texts in memory, as many processes."""
    source = directory / "large.jsonl"
    write_corpus(source, megabytes)
    whole = seconds_of(ours(source, directory / "large", "--overwrite"))
    with source.open() as lines:
        everything = [json.loads(line)["text"] for line in lines]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for number in range(WORKERS):
        here, there = context.Pipe()
        processes.append(context.Process(target=_encode_alone, args=(everything[number::WORKERS], there)))
        processes[-1].start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    began = time.monotonic()
    for pipe in pipes:
        pipe.send("go")
    for pipe in pipes:
        pipe.recv()
    alone = time.monotonic() - began
    for process in processes:
        process.join()
    megabytes_of_text = sum(map(len, everything)) / 1e6
    console.print(
        f"{megabytes_of_text:,.0f} MB of text: ours {whole:.1f} s ({megabytes_of_text / whole:.0f} MB/s), the engine "
        f"alone {alone:.1f} s ({megabytes_of_text / alone:.0f} MB/s): {alone / whole:.2f} of its speed (bar: 0.8)"
    )
    join_and_verify(directory / "large")


def join_and_verify(prefix: Path) -> None:
    """Merging one data set into a new file beside cp and sync, in turns, and verifying it; all from a warm cache."""
    size = Path(f"{prefix}.bin").stat().st_size
    copies: list[float] = []
    merges: list[float] = []
    rates = []
    for number in range(_ROUNDS):
        turns = [(copies, lambda: copy_and_sync(prefix)), (merges, lambda: merge_in_process(prefix))]
        for times, work in turns[:: 1 if number % 2 == 0 else -1]:
            # both make a new file on a disk that has nothing else to write
            for left in prefix.parent.glob(f"{prefix.name}-again*"):
                left.unlink()
            os.sync()
            times.append(seconds_in(work))
        rates.append(size / seconds_in(lambda: verify_in_process(prefix)) / 1e9)
    whole = seconds_of([sys.executable, str(ROOT / "data_prep" / "verify_index.py"), str(prefix), "--workers", "1"])
    ratio = statistics.median(copied / merged for copied, merged in zip(copies, merges, strict=True))
    console.print(
        f"{size / 1e6:.0f} MB of tokens, {_ROUNDS} rounds: cp and sync {statistics.median(copies):.2f} s, joining and "
        f"index {statistics.median(merges):.2f} s: {ratio:.2f} of cp's speed (bar: 0.6)"
    )
    console.print(
        f"verify {statistics.median(rates):.2f} GB/s on one core (bar: 1), as a whole process {size / whole / 1e9:.2f}"
    )


def seconds_in(work: Callable[[], None]) -> float:
    """Wall time of a call."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def copy_and_sync(prefix: Path) -> None:
    """What a join cannot be faster than."""
    subprocess.run(["cp", f"{prefix}.bin", f"{prefix}-again.bin"], check=True)
    subprocess.run(["sync", f"{prefix}-again.bin"], check=True)


def merge_in_process(source: Path) -> None:
    """What build and merge do at their end."""
    from data_prep.merge import append_all
    from megalemur.data.indexed import IndexedFile
    from megalemur.data.writer import IndexedWriter

    with IndexedWriter(Path(f"{source}-again"), vocab_size=32000) as writer:
        append_all(IndexedFile(source), writer)
        writer.commit()


def verify_in_process(prefix: Path) -> None:
    """The whole verification, on one thread."""
    from data_prep.verify import verify

    assert not verify(prefix, threads=1).problems


def tree_bytes(pid: int) -> tuple[int, int]:
    """(anonymous and shared memory, mapped file pages) of a process and its children, bytes."""
    held = mapped = 0
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        held = sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024
        mapped = int(fields["RssFile"].split()[0]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            below = tree_bytes(int(child))
            held, mapped = held + below[0], mapped + below[1]
    except (OSError, KeyError):  # it has just ended
        pass
    return held, mapped


def peak_of(command: list[str]) -> tuple[int, int, float]:
    """(peak of held memory, peak of mapped pages, seconds) of a process tree, looked at every 20 ms."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    held = mapped = 0
    while process.poll() is None:
        now = tree_bytes(process.pid)
        held, mapped = max(held, now[0]), max(mapped, now[1])
        time.sleep(0.02)
    assert process.returncode == 0, command
    return held, mapped, time.monotonic() - began


def memory(directory: Path, megabytes: int, documents: int) -> None:
    """Peak memory of a build of so much text, or of so many tiny documents."""
    source = directory / "memory.jsonl"
    if documents:
        write_tiny(source, documents)
    else:
        write_corpus(source, megabytes)
    held, mapped, seconds = peak_of(ours(source, directory / "memory", "--overwrite"))
    what = f"{documents / 1e6:.0f} M tiny documents" if documents else f"{source.stat().st_size / 1e6:,.0f} MB"
    console.print(
        f"memory, {what}: {held / 1e6:.0f} MB held by the process tree (bar: 700), {mapped / 1e6:.0f} MB of file pages "
        f"mapped, {seconds:.1f} s"
    )
    source.unlink()


def engines(megabytes: int) -> None:
    """Engines on one core, and whether their ids are sentencepiece's."""
    from data_prep.engine import ONE_THREAD, fast_engine
    from data_prep.tokenizer import Encoded, load_tokenizer

    os.environ |= ONE_THREAD
    sample: list[str] = []
    for text in texts():
        sample.append(text)
        if sum(map(len, sample)) > megabytes * 1_000_000:
            break
    reference = load_tokenizer(tokenizer_path())
    wanted = reference.encode(sample)
    contestants: dict[str, Callable[[], Encoded]] = {"sentencepiece": lambda: reference.encode(sample)}
    fast = fast_engine(tokenizer_path())
    assert fast is not None
    contestants["fastokens"] = lambda: fast.encode(sample)
    import gigatoken
    import kitoken

    kit = kitoken.Kitoken.from_sentencepiece_file(str(tokenizer_path()))
    contestants["kitoken"] = lambda: Encoded.of(kit.encode_all(sample))
    giga = gigatoken.Tokenizer.from_sentencepiece(tokenizer_path())
    contestants["gigatoken"] = lambda: Encoded.of([np.asarray(giga.backend.encode(text)) for text in sample])
    table = Table(title=f"{sum(map(len, sample)) / 1e6:.0f} MB of code and documentation, one core")
    for column in ("engine", "MB/s", "documents with sentencepiece's ids"):
        table.add_column(column)
    for name, encode in contestants.items():
        encode()
        began = time.monotonic()
        found = encode()
        rate = sum(map(len, sample)) / 1e6 / (time.monotonic() - began)
        equal = sum(np.array_equal(found.text(k), wanted.text(k)) for k in range(len(sample)))
        table.add_row(name, f"{rate:.1f}", f"{equal:,} of {len(sample):,}")
    console.print(table)


def opening(directory: Path, documents: int) -> None:
    """Opening a data set of many documents and the first 1,000 samples of a 10-source blend, beside megatron-core's."""
    from megalemur.data.indexed import HEADER

    for number in range(10):
        count = documents if number == 0 else 10_000
        lengths = np.random.default_rng(number).integers(100, 1900, count).astype("<i4")
        pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
        with (directory / f"s{number}.idx").open("wb") as stream:
            stream.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, count, count + 1))
            for column in (lengths, pointers, np.arange(count + 1)):
                stream.write(column.data)
        with (directory / f"s{number}.bin").open("wb") as stream:
            stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    for vouched in (False, True):
        times = [float(_child("open", directory, str(int(vouched)))) for _ in range(3)]
        bar = 0.1 if vouched else 4
        console.print(
            f"{documents / 1e6:.0f} M documents, {'vouched for' if vouched else 'whole index checked'}, 1,000 samples "
            f"of 10 sources: {statistics.median(times):.3f} s (bar: {bar})"
        )
    theirs = float(_child("gpt-dataset", directory, "0"))
    console.print(f"megatron-core's GPTDataset over the large source alone, 1,000 samples: {theirs:.1f} s")


def _child(role: str, directory: Path, flag: str) -> str:
    """What a fresh process measures and prints last."""
    command = [sys.executable, "-W", "ignore", __file__, role, "--source", str(directory), "--output", flag]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "WORLD_SIZE": "1"})
    return done.stdout.split()[-1]


def open_blend(directory: Path, vouched: bool) -> None:
    """Open ten sources and draw 1,000 samples; prints the seconds."""
    from megalemur.config.data import SourceConfig
    from megalemur.data.history import History
    from megalemur.data.indexed import IndexedFile
    from megalemur.data.order import Order
    from megalemur.data.sources import OpenSource, shares_of
    from megalemur.data.windows import Windows

    began = time.monotonic()
    opened = []
    for number in range(10):
        prefix = directory / f"s{number}"
        file = IndexedFile(prefix, vouched_digest=f"{number:032x}" if vouched else None)
        config = SourceConfig(name=prefix.name, path=prefix)
        opened.append(OpenSource(config, Windows(file, 4096, seed=1), None, 32000))
    order = Order(History.begin(1, 4096, shares_of(opened)))
    by_key = {source.key: source for source in opened}
    for n in range(1000):
        draw = order(n)
        by_key[draw.key].sample(draw.ordinal)
    console.print(time.monotonic() - began)


def open_gpt_dataset(directory: Path) -> None:
    """megatron-core's data set over the first source; prints the seconds."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        """What GPTDataset asks of one."""

        eod, pad, vocab_size, unique_identifiers = 2, 0, 32000, {"class": "none"}

    began = time.monotonic()
    low = IndexedDataset(str(directory / "s0"), mmap=True)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=4096,
        blend=([str(directory / "s0")], None),
        split="1,0,0",
        path_to_cache=str(directory / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=Tokenizer(),
    )
    data = GPTDataset(low, str(directory / "s0"), np.arange(len(low)), 1000, Split.train, config)
    for n in range(1000):
        _ = data[n]
    console.print(time.monotonic() - began)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    roles = ("all", "pairs", "engine", "engines", "join", "memory", "opening", "baseline", "open", "gpt-dataset")
    parser.add_argument("role", nargs="?", choices=roles, default="all")
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--output")
    args = parser.parse_args()
    if args.role == "baseline":
        baseline(args.source, Path(args.output))
    elif args.role == "join":
        join_and_verify(args.source)
    elif args.role == "open":
        open_blend(args.source, args.output == "1")
    elif args.role == "gpt-dataset":
        open_gpt_dataset(args.source)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="bench-data-"))
        try:
            _measure(args, scratch)
        finally:
            shutil.rmtree(scratch)


def _measure(args: argparse.Namespace, scratch: Path) -> None:
    if args.role in ("all", "engines"):
        engines(args.megabytes or 24)
    if args.role in ("all", "pairs"):
        against_baseline(scratch, args.megabytes or 200, args.pairs)
    if args.role in ("all", "engine"):
        against_engine(scratch, args.megabytes or 2000)
    if args.role in ("all", "memory"):
        memory(scratch, args.megabytes or 200, args.documents)
    if args.role in ("all", "opening"):
        opening(scratch, args.documents or 100_000_000)


if __name__ == "__main__":
    main()
