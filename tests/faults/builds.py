"""Builds of a data set that are killed at random moments and started again: no byte may change."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import orjson

from tests.faults.campaign import Campaign, Trial
from tests.support.datasets import MODEL

ROOT = Path(__file__).parents[2]
_SMALL = """
import sys
from data_prep import build_index, feed, plan
plan._SMALLEST, plan.STREAM_BYTES, feed.CHUNK_BYTES = 60_000, 20_000, 40_000
build_index.app(sys.argv[1:])
"""


class _Shared(NamedTuple):
    inputs: Path
    wanted: dict[str, bytes]
    seconds: float


def write_input(directory: Path) -> None:
    """A plain file of many ranges, a compressed one of many chunks, and small files."""
    import zstandard

    chance = random.Random(0)
    words = ["def", "return", "lemur", "héllo", "\t", "x = 1\n", "你好", "self.", "    ", "<s>", "🙂"]
    lines = [
        orjson.dumps({"text": " ".join(chance.choices(words, k=chance.randrange(1, 300)))}) + b"\n" for _ in range(2000)
    ]
    (directory / "a.jsonl").write_bytes(b"".join(lines[:1200]))
    (directory / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[1200:])))
    for number in range(20):
        (directory / f"c{number:02d}.py").write_text(" ".join(chance.choices(words, k=500)))


def start(inputs: Path, output: Path, workers: int) -> subprocess.Popen[str]:
    """A build in a process group of its own."""
    arguments = ["--input", str(inputs), "--tokenizer", str(MODEL), "--output", str(output), "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", _SMALL, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def build(inputs: Path, output: Path, workers: int) -> tuple[float, str]:
    """(seconds, output) of a build that nobody disturbs."""
    began = time.monotonic()
    process = start(inputs, output, workers)
    said, _ = process.communicate(timeout=120)
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {said}")
    return time.monotonic() - began, said


def is_complete(output: Path) -> bool:
    """A data set is there, and nothing beside it."""
    return Path(f"{output}.idx").exists() and not Path(f"{output}.work").exists()


def prepare(directory: Path) -> _Shared:
    """The input, and what an undisturbed build makes of it."""
    inputs = directory / "in"
    inputs.mkdir()
    write_input(inputs)
    seconds, _ = build(inputs, directory / "whole", 2)
    wanted = {ending: (directory / f"whole.{ending}").read_bytes() for ending in ("bin", "idx")}
    return _Shared(inputs, wanted, seconds)


def trial(shared: _Shared, trial: Trial) -> str:
    """A few kills, each followed by the same command, then one that nobody disturbs."""
    hits = interrupt(shared, trial.directory, trial.chance)
    return f"{len(hits) - hits.count('it was done')} kills, the last: {hits[-1]}"


def interrupt(shared: _Shared, directory: Path, chance: random.Random) -> list[str]:
    """How far the build had come at each kill; wrong bytes and what was left behind raise AssertionError."""
    output = directory / "out"
    hits = []
    for _ in range(chance.randrange(1, 6)):
        process = start(shared.inputs, output, chance.randrange(1, 4))
        try:  # the beginning, where only modules are imported, is not worth many kills
            said, _ = process.communicate(timeout=chance.uniform(0.4, 1.1) * shared.seconds)
            assert process.returncode == 0, said
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            hits.append(_state_of(output))
            if is_complete(output):
                break
    if not is_complete(output):
        build(shared.inputs, output, chance.randrange(1, 4))
    for ending, data in shared.wanted.items():
        assert Path(f"{output}.{ending}").read_bytes() == data, f"{output}.{ending} differs"
    left = {path.name for path in directory.iterdir()} - {"out.bin", "out.idx", "out.manifest.json"}
    assert not left, f"left behind: {left}"
    return hits or ["it was done"]


def _state_of(output: Path) -> str:
    """How far the build had come."""
    work = Path(f"{output}.work")
    if not work.exists():
        return "nothing begun" if not Path(f"{output}.idx").exists() else "complete"
    if not (work / "plan.json").exists():
        return "before the plan"
    if Path(f"{output}.bin").exists() or Path(f"{output}.idx").exists():
        return "while its files appeared"
    journal = work / "journal.jsonl"
    return "some units done" if journal.exists() and journal.stat().st_size else "no unit done"


CAMPAIGN = Campaign(
    target=1000,
    what="up to five times kill -9 of a build of a data set with all its workers, and the same command again",
    passes="the bytes of an undisturbed build, nothing left behind",
    prepare=prepare,
    trial=trial,
)
