"""Host memory that this machine can still give, and the refusal of a copy that does not fit. Free of torch."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from megalemur.checkpoint.errors import CheckpointError

_CGROUPS = Path("/sys/fs/cgroup")
_GIB = 1 << 30


class Need(NamedTuple):
    """What one rank wants of its machine."""

    host: str
    wanted_bytes: int
    available_bytes: int
    """What the machine, or the job's share of it, can still give."""


def need_of(wanted_bytes: int) -> Need:
    """Of this process, now."""
    return Need(socket.gethostname(), wanted_bytes, available_bytes())


def available_bytes() -> int:
    """Free memory of the machine, or of the tightest control group around this process where that is less."""
    return min([psutil.virtual_memory().available, *_group_limits()])


def _group_limits() -> list[int]:
    """What each control group (version 2) leaves: its limit, less what it uses and could not drop."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    inner = next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/")
    places = [_CGROUPS / inner, *(_CGROUPS / inner).parents]
    found = []
    for place in places:
        if not place.is_relative_to(_CGROUPS):
            break
        try:
            limit = int((place / "memory.max").read_text())
            used = int((place / "memory.current").read_text())
            counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no limit, or no such file at the root
        found.append(max(0, limit - used + int(counts.get("inactive_file", 0))))
    return found


def refuse_scarce(needs: Sequence[Need]) -> None:
    """Compare what the ranks of each machine want together with what it has.

    Args:
        needs: of every rank, in the order of ranks, so that all ranks refuse alike.

    Raises:
        CheckpointError: names the machine, the sizes and the setting.
    """
    for host in sorted({need.host for need in needs}):
        here = [need for need in needs if need.host == host]
        wanted, available = sum(need.wanted_bytes for need in here), min(need.available_bytes for need in here)
        if wanted > available:
            raise CheckpointError(
                f"checkpoint.asynchronous=true copies {wanted / _GIB:.2f} GiB for the {len(here)} ranks of {host} "
                f"({max(need.wanted_bytes for need in here) / _GIB:.2f} GiB the largest), which has "
                f"{available / _GIB:.2f} GiB of memory left; use checkpoint.asynchronous=false, or spread the run over "
                "more machines"
            )
