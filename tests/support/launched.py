"""Real `megalemur train` processes, a supervisor and a rank each, forked from the server of tests/support/ranks.py.

They can be signalled, stopped and killed like those of a launcher; only the import of torch is saved.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megalemur.config.load import dump_run
from megalemur.config.run import RunConfig
from megalemur.supervise.process import descendants, end_with_parent
from tests.support.ranks import _context, _free_port


class Fault(NamedTuple):
    """Something that a rank does instead of, or before, one call of a function of the program."""

    rank: int
    """-1: all."""
    function: str
    """`module:name`, as the caller of the function sees it."""
    call: int
    """Which call it is, from 1."""
    action: str
    """`sleep SECONDS`, `spin`, `read PATH`, `kill` or `raise`."""

    def install(self) -> None:
        """In the process that is to have it."""
        module_name, name = self.function.split(":")
        module = importlib.import_module(module_name)
        original: Callable[..., Any] = getattr(module, name)
        calls = 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                self.happen()
            return original(*args, **kwargs)

        setattr(module, name, faulty)

    def happen(self) -> None:
        """Do it."""
        verb, _, argument = self.action.partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "spin":
            while True:
                pass
        elif verb == "read":
            Path(argument).read_bytes()
        elif verb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise RuntimeError("injected")


def _start(run_file: Path, environment: dict[str, str], output: Path, faults: tuple[Fault, ...]) -> None:
    end_with_parent(os.getppid())
    handle = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    for fault in faults:
        if fault.rank in (-1, int(environment["RANK"])):
            fault.install()
    sys.argv = ["megalemur", "train", str(run_file)]
    from megalemur.cli.main import main

    main()


class Launched:
    """The processes of one run."""

    def __init__(self, directory: Path, world_size: int):
        self.directory = directory
        self.processes: list[Any] = []
        self.outputs = [directory / f"output-{rank}.txt" for rank in range(world_size)]
        self.everyone: set[int] = set()
        """Processes that were seen."""

    def supervisor(self, rank: int) -> int:
        """Process id."""
        return self.processes[rank].pid

    def worker(self, rank: int) -> int:
        """Process id of the rank itself."""
        return wait_for(lambda: descendants(self.supervisor(rank)), bool)[0]

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 has logged it."""
        metrics = self.directory / "log/metrics.jsonl"
        wait_for(lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0, lambda n: n >= step, self.output)
        for process in self.processes:
            self.everyone |= {process.pid, *descendants(process.pid)}

    def output(self) -> str:
        """What all ranks have said."""
        return "\n".join(f"--- rank {n}\n{o.read_text()}" for n, o in enumerate(self.outputs) if o.exists())

    def codes(self, seconds: float = 90.0) -> list[int]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in self.processes), self.output()
        return [process.exitcode for process in self.processes]

    def living(self) -> list[int]:
        """Processes of this run that are still there."""
        return [pid for pid in self.everyone if is_running(pid)]

    def checkpoints(self) -> list[int]:
        """Steps of the committed checkpoints."""
        found = (self.directory / "checkpoints").glob("step_??????")
        return sorted(int(path.name.removeprefix("step_")) for path in found)


@contextmanager
def launched(config: RunConfig, *faults: Fault, **environment: str) -> Iterator[Launched]:
    """Start every rank of a run that lives in the folder of its log; whatever still runs in the end is killed."""
    directory, world_size = config.log.directory.parent, config.parallel.world_size
    run_file = directory / "run.yaml"
    run_file.write_text(dump_run(config))
    this = Launched(directory, world_size)
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "MEGALEMUR_SUPERVISOR_PORT": str(_free_port()),
        "MEGALEMUR_TOKEN": "only for this test",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    try:
        for rank in range(world_size):
            mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_start, args=(run_file, mine, this.outputs[rank], faults))
            process.start()
            this.processes.append(process)
        yield this
    finally:
        for process in this.processes:
            process.kill()  # its rank goes with it
            process.join()


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely unburied."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(
    look: Callable[[], Any], enough: Callable[[Any], bool], explain: Callable[[], str] = str, seconds: float = 90.0
) -> Any:
    """What `look` sees once it is enough."""
    deadline = time.monotonic() + seconds
    while not enough(seen := look()):
        assert time.monotonic() < deadline, (seen, explain())
        time.sleep(0.02)
    return seen
