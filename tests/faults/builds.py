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
print("modules are imported", flush=True)
build_index.app(sys.argv[1:])
"""


class _Shared(NamedTuple):
    inputs: Path
    wanted: dict[str, bytes]
    seconds: float
    """From the imports to the end, undisturbed, with one worker."""
    units: int


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


def build(inputs: Path, output: Path, workers: int) -> tuple[float, int]:
    """(seconds behind the imports, units that were seen done) of a build that nobody disturbs."""
    process = start(inputs, output, workers)
    process.stdout.readline()
    began, units = time.monotonic(), 0
    while process.poll() is None:
        units = max(units, _units(output))
        time.sleep(0.001)
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {process.communicate()[0]}")
    return time.monotonic() - began, units


def await_moment(process: subprocess.Popen[str], output: Path, shared: _Shared, chance: random.Random) -> None:
    """A random time, or just behind a random further unit of work: most of the time passes before the first one."""
    if chance.random() < 0.3:
        wait, units = chance.uniform(0, shared.seconds), 0
    else:
        wait, units = chance.uniform(0, 0.008), _units(output) + chance.randrange(1, shared.units + 1)
    while process.poll() is None and _units(output) < units and not Path(f"{output}.bin").exists():
        time.sleep(0.0005)
    time.sleep(wait)


def _units(output: Path) -> int:
    """Units of work that are done."""
    try:
        return Path(f"{output}.work/journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_complete(output: Path) -> bool:
    """A data set is there, and nothing beside it."""
    return Path(f"{output}.idx").exists() and not Path(f"{output}.work").exists()


def prepare(directory: Path) -> _Shared:
    """The input, and what an undisturbed build makes of it."""
    inputs = directory / "in"
    inputs.mkdir()
    write_input(inputs)
    seconds, units = build(inputs, directory / "whole", 1)
    wanted = {ending: (directory / f"whole.{ending}").read_bytes() for ending in ("bin", "idx")}
    return _Shared(inputs, wanted, seconds, units)


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
        process.stdout.readline()  # nothing is written while modules are imported
        await_moment(process, output, shared, chance)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            hits.append(_state_of(output))
            if is_complete(output):
                break
        else:
            said, _ = process.communicate()
            assert process.returncode == 0, said
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
