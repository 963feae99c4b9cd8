"""Runs that the campaigns share: layouts, a small state and one of 50 MB, a run that records every bit of each step."""

import hashlib
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

from megalemur.config.load import dump_run
from megalemur.config.run import RunConfig
from megalemur.optim.schedule import learning_rate
from megalemur.supervise.process import descendants
from megalemur.train.loop import advance
from megalemur.train.saving import save_run
from megalemur.train.step import train_step
from tests.support.launched import is_running, wait_for
from tests.support.tiny import tiny_run
from tests.support.training import start

ROOT = Path(__file__).parents[2]
_P = "parallel."
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one process": (),
    "tp2": (f"{_P}tensor=2",),
    "pp2": (f"{_P}pipeline=2",),
    "dp2": (f"{_P}data=2",),
    "dp2 replicated": (f"{_P}data=2", f"{_P}distributed_optimizer=false"),
    "tp2 pp2": (f"{_P}tensor=2", f"{_P}pipeline=2"),
    "pp4 uneven": (f"{_P}pipeline=4", f"{_P}first_stage_layers=1", f"{_P}last_stage_layers=1"),
    "tp2 pp2 chunks2 dp2": (f"{_P}tensor=2", f"{_P}pipeline=2", f"{_P}chunks=2", f"{_P}data=2"),
    "tp4": (f"{_P}tensor=4",),
    "dp4": (f"{_P}data=4",),
}
"""Layouts of at most 8 processes."""


def world(layout: str) -> int:
    """Processes of a layout."""
    sizes = dict(setting.removeprefix(_P).split("=") for setting in LAYOUTS[layout])
    return math.prod(int(sizes.get(part, 1)) for part in ("tensor", "pipeline", "data"))


BIG = {"hidden_size": 256, "ffn_hidden_size": 704}
"""With this width the 8 layers, their masters and moments take 80 MB in a checkpoint."""


class Seen(NamedTuple):
    """A step, to the bit."""

    step: int
    loss: str
    """Raw float, hexadecimal."""
    grad_norm: str
    """Raw float, hexadecimal."""
    samples: int
    """Drawn so far."""
    state: str
    """Digest of everything that this rank holds: names, boxes, masters, moments."""


def state_digest(run) -> str:
    """sha256 of this rank's pieces."""
    digest = hashlib.sha256()
    for piece in sorted(run.pieces(), key=lambda piece: (piece.name, piece.kind, piece.box)):
        digest.update(f"{piece.name}|{piece.kind}|{piece.box}".encode())
        digest.update(piece.tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def steps_to_the_bit(config: RunConfig, last_step: int, save_at: int | None = None) -> list[Seen]:
    """What a rank sees of every step up to the last; a checkpoint behind one of them. Resumes where there is one."""
    run = start(config)
    seen = []
    while run.state.step < last_step:
        rate = learning_rate(run.state.step, config.optim, config.schedule, config.run.steps)
        result = train_step(run.engine, run.data.training.micro_batches(run.state.samples, run.portion), rate)
        advance(run, result)
        seen.append(
            Seen(run.state.step, result.loss.hex(), result.grad_norm.hex(), run.state.samples, state_digest(run))
        )
        if run.state.step == save_at:
            save_run(run)
    return seen


def write_run(directory: Path, *overrides: str, **shape: int) -> Path:
    """A run file of the tiny run in a directory."""
    path = directory / "run.yaml"
    path.write_text(dump_run(tiny_run(directory, *overrides, **shape)))
    return path


def launch(processes: int, run_file: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """The real launcher, in a process group of its own; what it says is in a file beside the run file."""
    command = ["bash", str(ROOT / "launch/local.sh"), str(processes), str(run_file), *overrides]
    with run_file.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, **environment},
        )


def steps_logged(directory: Path) -> int:
    """Lines of the run's metrics."""
    metrics = directory / "log/metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def process_of(everyone: list[int], rank: int) -> tuple[int, int]:
    """(the process that computes, its supervisor) of a rank among those of a launcher."""
    for pid in everyone:
        if f"RANK={rank}".encode() in _lines(pid, "environ") and any(b"megalemur" in w for w in _lines(pid, "cmdline")):
            below = descendants(pid)
            if below:
                return below[0], pid
    raise AssertionError(f"no processes of rank {rank}")


def _lines(pid: int, what: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher and everything it started; returns when all of it is gone.

    Ranks have a session of their own and die of their supervisor's death, a moment later.
    """
    everyone = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: [pid for pid in everyone if is_running(pid)], lambda left: not left, seconds=10)


PATIENCE = 900
"""Seconds that a launched run may take."""


def finish(layout: str, run_file: Path, expected: int = 0, **environment: str) -> str:
    """Launch a run and wait for its end, with this exit code; everything that it said."""
    log = run_file.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    code = launch(world(layout), run_file, **environment).wait(PATIENCE)
    said = log.read_text()[before:]
    assert code == expected, f"exit code {code}: {said[-2000:]}"
    return said


def end_at(layout: str, run_file: Path, chance: Random) -> None:
    """Launch a run and kill everything, at a random moment behind the beginning of its first save."""
    process = launch(world(layout), run_file)
    try:
        while not any((run_file.parent / "checkpoints").glob("step_*")):
            assert process.poll() is None, run_file.with_suffix(".log").read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3))
    finally:
        if process.poll() is None:
            kill_group(process)
