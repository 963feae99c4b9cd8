"""How long a plan takes, start to end, each in a process of its own on one core.

    python benchmarks/plan.py

The search over all layouts on 2,048 GPUs is meant to end within 10 s of processor time; ends with 1 where it does not.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = "launch/runs/llama2_70b_pretrain.yaml"
LIMIT_SECONDS = 10.0
LINES: dict[str, tuple[str, ...]] = {
    "a plan of 64 GPUs": (),
    "--search --gpus 64": ("--search", "--gpus", "64"),
    "--search --gpus 2048": ("--search", "--gpus", "2048"),
    "--search --gpus 2048, Transformer Engine": ("model.backend=transformer_engine", "--search", "--gpus", "2048"),
}


def _taken(arguments: tuple[str, ...]) -> tuple[float, float]:
    """(processor seconds, seconds) of one command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    line = [sys.executable, "-W", "ignore", "-m", "megalemur.cli.main", "plan", RUN, *arguments]
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return processor, time.monotonic() - started


def main() -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        page = ("--html", str(Path(folder) / "plan.html"))
        for name, arguments in {**LINES, "a plan of 64 GPUs, --html": page}.items():
            processor, seconds = _taken(arguments)
            print(f"{name:42} {processor:5.2f} s of one core, {seconds:5.2f} s in all")
            slow |= processor > LIMIT_SECONDS
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
