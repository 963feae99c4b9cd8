"""Starts small groups of ranks on this machine, forked from a server that has torch and megatron-core imported.

A cold start of eight processes takes ten seconds and more on two cores, a fork a few hundredths. The server imports and
never computes: a fork of a process whose torch threads have worked can hang.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

_GRACE_SECONDS = 2.0
"""How long the others may still report after the first failure: theirs is often the one that explains."""
_STACK_SECONDS = 0.5
"""How long a rank that is about to be killed has to write down where it is."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_pytest() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _outcome(work: bytes) -> tuple[str, bytes]:
    """What the rank did, pickled by value: torch's own sharing of tensors through files would outlive this process."""
    try:
        # unpickled only here: a module that cannot be imported is reported like any other failure
        function, args = pickle.loads(work)
        return "ok", pickle.dumps(function(*args))
    except BaseException:
        return "error", traceback.format_exc().encode()


def _rank(channel: Connection, environment: dict[str, str], stacks: Path, work: bytes) -> None:
    """The body of one rank: sends how it ended, then what came of it."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        kind, payload = _outcome(work)
        channel.send_bytes(kind.encode())
        channel.send_bytes(payload)
        sys.stdout.flush()
        if kind == "ok":
            threading.Event().wait()  # rank 0 holds the rendezvous: all stay until all have reported, then are killed
    os._exit(1)  # no destructor of a half-built group may hang the test


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Results of `function(*args)` on each of `world_size` ranks.

    Args:
        world_size: processes; each finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment.
        function: a function of a module that the ranks can import; it joins the process group itself.
        args: picklable.
        timeout: seconds.

    Raises:
        AssertionError: a rank failed, died or hung; shows the traceback of each, and the stack of each that still ran.
    """
    work, port = pickle.dumps((function, args)), _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        group = _Group([Path(scratch) / f"rank{rank}" for rank in range(world_size)])
        try:
            for rank in range(world_size):
                group.start(rank, world_size, port=port, work=work)
            group.listen(timeout)
            problems = group.problems(timeout)
        finally:
            group.end()
    if problems:
        raise AssertionError("\n\n".join(problems))
    return [pickle.loads(group.reports[rank].payload) for rank in range(world_size)]


class _Report(NamedTuple):
    kind: str
    payload: bytes


class _Group:
    """The processes of one call, what they said, and where those that said nothing can write their stacks."""

    def __init__(self, stacks: list[Path]):
        self.stacks = stacks
        self.processes: list[Any] = []
        self.channels: dict[int, Connection] = {}
        self.reports: dict[int, _Report] = {}

    def start(self, rank: int, world_size: int, *, port: int, work: bytes) -> None:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(theirs, environment, self.stacks[rank], work), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        self.channels[rank] = ours

    def listen(self, timeout: float) -> None:
        """Collect reports until all are in, time is up, or the grace after the first failure is over."""
        deadline = time.monotonic() + timeout
        silent = dict(self.channels)
        while silent and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(silent.values()), left)
            for rank in [rank for rank, channel in silent.items() if channel in ready]:
                self.reports[rank] = self._hear(rank, silent.pop(rank))
                if self.reports[rank].kind != "ok":
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)

    def _hear(self, rank: int, channel: Connection) -> _Report:
        try:
            return _Report(channel.recv_bytes().decode(), channel.recv_bytes())
        except EOFError:
            self.processes[rank].join(_GRACE_SECONDS)
            code = self.processes[rank].exitcode
            return _Report("died", f"ended without a word, exit code {code}".encode())

    def problems(self, timeout: float) -> list[str]:
        """A paragraph for each rank that failed or still runs; none where all went well."""
        silent = [rank for rank in range(len(self.processes)) if rank not in self.reports]
        failed = [rank for rank, report in sorted(self.reports.items()) if report.kind != "ok"]
        for rank in silent:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        if silent:
            time.sleep(_STACK_SECONDS)
        state = "was ended, since others had failed; it stood" if failed else f"did not end in {timeout:g} s; it stood"
        texts = [f"rank {rank} {self.reports[rank].kind}:\n{self.reports[rank].payload.decode()}" for rank in failed]
        return texts + [f"rank {rank} {state} at\n{self._stack(rank)}" for rank in silent]

    def _stack(self, rank: int) -> str:
        return self.stacks[rank].read_text() if self.stacks[rank].exists() else "its start"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for channel in self.channels.values():
            channel.close()
