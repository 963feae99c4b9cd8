"""What this machine says about itself, as far as a run depends on it."""

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Site:
    """A machine that is to run a job, or a login node; every figure can be given, for tests."""

    environ: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""
    has_gpus: bool = False
    infiniband: bool = False
    """InfiniBand or RoCE adapters are visible."""
    cores: int = 1
    """That this process may use."""
    shared_memory: int | None = None
    """Size of /dev/shm, bytes; None: there is none."""
    open_files: float = float("inf")
    """Limit of open files a process (ulimit -n)."""
    locked_memory: float = float("inf")
    """Limit of locked memory, bytes (ulimit -l)."""

    @classmethod
    def here(cls) -> "Site":
        """This machine."""
        shm = Path("/dev/shm")
        return cls(
            environ=dict(os.environ),
            has_gpus=any(Path("/dev").glob("nvidia[0-9]*")),
            infiniband=Path("/dev/infiniband").is_dir(),
            cores=len(os.sched_getaffinity(0)),
            shared_memory=_total(shm) if shm.is_dir() else None,
            open_files=_limit(resource.RLIMIT_NOFILE),
            locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        )

    @property
    def is_launch(self) -> bool:
        """Whether GPUs are about to be used: they are here, or a batch job is."""
        return self.has_gpus or "SLURM_JOB_ID" in self.environ

    @property
    def nodes(self) -> int:
        """Nodes of the batch job; 1 where nobody says."""
        text = self.environ.get("SLURM_JOB_NUM_NODES", "1")
        return int(text) if text.isdigit() else 1

    def is_on(self, name: str) -> bool:
        """Whether a variable switches something on."""
        return self.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def _total(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def _limit(kind: int) -> float:
    soft, _ = resource.getrlimit(kind)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
