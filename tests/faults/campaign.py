"""Campaigns: many trials of one promise, each a function of (campaign, seed, number), added up over several runs.

    python -m tests.faults.campaign kills --trials 100 --seed 1
    python -m tests.faults.campaign --minutes 60        # a tenth of every campaign, an hour in all
    python -m tests.faults.campaign --write             # docs/reliability.md from the results

Results are appended to tests/faults/results/NAME.jsonl, a line a minute and at the end; the next run of the same seed
goes on behind them. A trial that fails is recorded with its number, and the campaign goes on.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "builds",
    "resume_same_layout",
    "resume_other_layout",
    "kills",
    "crash_points",
    "damage",
    "disk_full",
    "deaths",
    "signals",
    "stalls",
    "clean_steps",
    "nans",
    "replica_flips",
    "retention",
    "conversions",
    "soak",
)
"""Modules of this folder, each with a CAMPAIGN."""
_REAL_EVERY = 10
_FLUSH_SECONDS = 60


class Trial(NamedTuple):
    """What one trial is given."""

    number: int
    chance: random.Random
    """Seeded by (campaign, seed, number)."""
    directory: Path
    """Its own, empty; removed behind it."""
    real: bool
    """Through the real launcher, with real processes and a state of 50 MB or more; every tenth trial is."""


@dataclass(frozen=True)
class Campaign:
    """One row of docs/reliability.md."""

    target: int
    """Trials in full."""
    what: str
    """What is done to the program."""
    passes: str
    """What must hold."""
    prepare: Callable[[Path], Any]
    """Makes what all trials of a run share, in a directory that lasts as long."""
    trial: Callable[[Any, Trial], str | list[str]]
    """One trial; returns a word for what was hit (a phase, a layout), raises AssertionError where it did not pass.
    A real one of a campaign that makes several at once returns a word for each."""
    real_every: int = _REAL_EVERY
    """One trial in so many is real; 0: none, they run in one process."""
    at_once: int = 1
    """Trials that one launched run makes: so many faults, each of which must be found."""


@dataclass
class Batch:
    """A line of a results file: consecutive trials of one run."""

    seed: int
    first: int
    """Number of the first trial."""
    trials: int = 0
    real: int = 0
    seconds: float = 0.0
    spread: dict[str, int] = field(default_factory=dict)
    """How often each phase or layout was hit."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Number and last lines of what was said; `mended`, by hand: what it was, once that is known."""
    when: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """Machine and versions."""


def load(name: str) -> Campaign:
    """A campaign by its module's name."""
    return import_module(f"tests.faults.{name}").CAMPAIGN


def read_batches(name: str, results: Path = RESULTS) -> list[Batch]:
    """What was recorded."""
    path = results / f"{name}.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [Batch(**values) for values in map(orjson.loads, lines)]


def next_number(batches: list[Batch], seed: int) -> int:
    """The first trial of this seed that was not made."""
    return max((batch.first + batch.trials for batch in batches if batch.seed == seed), default=0)


def run(name: str, *, trials: int, seed: int, seconds: float | None = None, results: Path = RESULTS) -> list[Batch]:
    """Make up to so many further trials, or as many as begin within the time; the batches that were added."""
    campaign, made = load(name), []
    number = next_number(read_batches(name, results), seed)
    stop, end = number + trials, time.monotonic() + (seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="megalemur-faults-") as scratch:
        shared = campaign.prepare(Path(scratch))
        while number < stop and time.monotonic() < end:
            batch, until = Batch(seed, number), min(end, time.monotonic() + _FLUSH_SECONDS)
            while number < stop and time.monotonic() < until:
                number += _try(name, campaign, shared, number, batch, Path(scratch))
            made.append(batch)
            _append(name, batch, results)
    return made


def _try(name: str, campaign: Campaign, shared: Any, number: int, batch: Batch, scratch: Path) -> int:
    """Make a trial, or those that are made at once; how many they were."""
    chance = random.Random(f"{name}/{batch.seed}/{number}")
    real = campaign.real_every > 0 and number % (campaign.real_every * campaign.at_once) == 0
    numbers = range(number, number + (campaign.at_once if real else 1))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        try:
            hit = campaign.trial(shared, Trial(number, chance, Path(directory), real))
            for word in [hit] if isinstance(hit, str) else hit:
                batch.spread[word] = batch.spread.get(word, 0) + 1
        except Exception:
            said = _without_places(traceback.format_exc(), scratch)[-2000:]
            batch.failures += [{"trial": each, "said": said} for each in numbers]
    batch.trials += len(numbers)
    batch.real += len(numbers) if real else 0
    batch.seconds += time.monotonic() - began
    return len(numbers)


def _without_places(text: str, scratch: Path) -> str:
    """Without the folders of this machine."""
    for folder, word in (
        (scratch, "SCRATCH"),
        (RESULTS.parents[2], "."),
        (sys.prefix, "PYTHON"),
        (sys.base_prefix, "PYTHON"),
    ):
        text = text.replace(str(folder), word)
    return text


def _append(name: str, batch: Batch, results: Path) -> None:
    batch.when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    batch.seconds = round(batch.seconds, 1)
    batch.facts = {"cores": str(os.cpu_count()), **{name: version(name) for name in ("torch", "megatron-core")}}
    results.mkdir(parents=True, exist_ok=True)
    with (results / f"{name}.jsonl").open("ab") as stream:
        stream.write(orjson.dumps(asdict(batch), option=orjson.OPT_APPEND_NEWLINE))


def main() -> int:
    """Parse, try, print; 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=NAMES, help="unset: a tenth of each")
    parser.add_argument("--trials", type=int, help="unset: a tenth of the campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="begin no trial after so many, shared out over the campaigns")
    parser.add_argument("--write", action="store_true", help="only write docs/reliability.md")
    args = parser.parse_args()
    console = Console()
    names = [args.name] if args.name else NAMES
    failed = 0
    for name in () if args.write else names:
        share = args.minutes * 60 / len(names) if args.minutes else None
        made = run(name, trials=args.trials or -(-load(name).target // 10), seed=args.seed, seconds=share)
        failures = [failure for batch in made for failure in batch.failures]
        trials, seconds = sum(batch.trials for batch in made), sum(batch.seconds for batch in made)
        console.print(f"{name}: {trials} trials in {seconds:.0f} s, {len(failures)} failed", highlight=False)
        for failure in failures:
            console.print(f"trial {failure['trial']}:\n{failure['said']}", highlight=False, markup=False)
        failed += len(failures)
    from tests.faults.reliability import write

    write()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
