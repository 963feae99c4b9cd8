"""Starts small groups of ranks on this machine, forked from a server that has torch and megatron-core imported.

A cold start of eight processes takes ten seconds and more on two cores, a fork a few hundredths.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 3.0
"""How long the others may still report after the first failure: theirs is often the one that explains."""

_context = multiprocessing.get_context("forkserver")
# imported by the server once; it never computes, so that no thread of torch's is alive when it forks
_context.set_forkserver_preload(["tests.support.preload"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(channel: Connection, environment: dict[str, str], stacks: str, limit: float, work: Any) -> None:
    """The body of one rank: run the function, send ("ok", result) or ("error", traceback)."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.dump_traceback_later(limit, file=file)
        function, args = work
        try:
            message = ("ok", function(*args))
        except BaseException:
            message = ("error", traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
    # by value: torch's own sharing of tensors through files would outlive this process
    channel.send_bytes(pickle.dumps(message))
    channel.close()
    sys.stdout.flush()
    os._exit(0)  # no destructor of a half-built group may hang the test


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Results of `function(*args)` on each of `world_size` ranks.

    Args:
        world_size: processes; each finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment.
        function: a function of a module that the ranks can import.
        args: picklable.
        timeout: seconds.

    Raises:
        AssertionError: a rank failed, died or hung; shows the traceback of each, or its stack where it hung.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        stacks = [Path(scratch) / f"rank{rank}" for rank in range(world_size)]
        ranks, channels = [], []
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            ours, theirs = _context.Pipe(duplex=False)
            work = (theirs, environment, str(stacks[rank]), max(0.1, timeout - 2), (function, args))
            process = _context.Process(target=_rank, args=work, daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            channels.append(ours)
        try:
            messages = _collect(channels, timeout)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
        problems = _problems(messages, stacks)
    assert not problems, "\n\n".join(problems)
    return [messages[rank][1] for rank in range(world_size)]


def _collect(channels: list[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    """What each rank said; ("died", …) for one that went without a word. Silent ones are missing."""
    messages: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout
    open_channels = dict(enumerate(channels))
    while open_channels and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(open_channels.values()), left)
        for rank in [r for r, channel in open_channels.items() if channel in ready]:
            try:
                messages[rank] = pickle.loads(open_channels.pop(rank).recv_bytes())
            except EOFError:
                messages[rank] = ("died", "ended without a word")
            if messages[rank][0] != "ok":
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return messages


def _problems(messages: dict[int, tuple[str, Any]], stacks: list[Path]) -> list[str]:
    failed = [f"rank {rank}:\n{text}" for rank, (kind, text) in sorted(messages.items()) if kind != "ok"]
    silent = [rank for rank in range(len(stacks)) if rank not in messages]
    if failed:
        return failed + ([f"ranks {silent} were still waiting and were ended"] if silent else [])
    return [f"rank {rank} hung:\n{stacks[rank].read_text() if stacks[rank].exists() else ''}" for rank in silent]
