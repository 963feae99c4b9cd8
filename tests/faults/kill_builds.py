"""Kills builds of a data set at random moments, starts them again, and compares the bytes. Run by `make faults`.

python -m tests.faults.kill_builds --kills 1000
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import orjson

from tests.support.datasets import MODEL

ROOT = Path(__file__).parents[2]
_SMALL = """
import sys
from data_prep import build_index, feed, plan
plan._SMALLEST, plan.STREAM_BYTES, feed.CHUNK_BYTES = 60_000, 20_000, 40_000
build_index.app(sys.argv[1:])
"""


class Tried(NamedTuple):
    """What a campaign did."""

    kills: int
    builds: int
    """Finished, each equal to the undisturbed one."""
    resumed: int
    """Starts that found finished units."""


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


def campaign(directory: Path, kills: int, seed: int) -> Tried:
    """Kill and start again until so many kills are done.

    Raises:
        AssertionError: a build gave other bytes, left something behind, or could not go on.
    """
    chance = random.Random(seed)
    inputs = directory / "in"
    inputs.mkdir()
    write_input(inputs)
    seconds, _ = build(inputs, directory / "whole", 2)
    wanted = {ending: (directory / f"whole.{ending}").read_bytes() for ending in ("bin", "idx")}
    done = builds = resumed = 0
    while done < kills:
        output = directory / f"out{builds}"
        for _ in range(chance.randrange(1, 5)):
            process = start(inputs, output, chance.randrange(1, 4))
            try:  # the beginning, where only modules are imported, is not worth many kills
                said, _ = process.communicate(timeout=chance.uniform(0.4, 1.1) * seconds)
                assert process.returncode == 0, said
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                done += 1
                if is_complete(output):
                    break
        if not is_complete(output):
            _, said = build(inputs, output, chance.randrange(1, 4))
            resumed += "going on with" in said
        for ending, data in wanted.items():
            assert Path(f"{output}.{ending}").read_bytes() == data, f"{output}.{ending} differs"
        expected = {f"{output.name}.{ending}" for ending in ("bin", "idx", "manifest.json")}
        left = {path.name for path in directory.iterdir() if output.name in path.name} - expected
        assert not left, f"left behind: {left}"
        for path in directory.glob(f"{output.name}.*"):
            path.unlink()
        builds += 1
    return Tried(done, builds, resumed)


def main() -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tried = campaign(Path(scratch), args.kills, args.seed)
    sys.stdout.write(f"{tried.kills} kills, {tried.builds} builds, all equal; {tried.resumed} resumed\n")


if __name__ == "__main__":
    main()
