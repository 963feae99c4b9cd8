"""What this machine brings to a run: versions, what is missing, what that costs and how to get it.

Looks and reports; a package that is half installed is a finding, never an exception. Changes nothing.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "absent", "incomplete", "unsupported"]

PYTHON = (3, 10)
"""Oldest Python."""
TORCH = (2, 10)
"""Oldest torch: the first with variable-length attention and a loader that refuses code by default."""
MEGATRON_CORE = ((0, 16), (0, 20))
"""Oldest megatron-core, and the first that is too new."""
SHARED_MEMORY_BYTES = 1 << 30
"""Enough of /dev/shm: what NCCL's guide asks for in containers, whose default is 64 MB."""

_GUIDE = "docs/installation.md"


@dataclass(frozen=True)
class Finding:
    """One thing that a run may use."""

    name: str
    """What was looked at."""
    status: Status
    """ok; absent; incomplete: there, but it cannot be used; unsupported: works, but not with this program."""
    version: str = ""
    """As the thing itself says; empty when it is absent."""
    missing: str = ""
    """What is not there; empty when all is well."""
    cost: str = ""
    """What a run loses by that."""
    install: str = ""
    """How to get it."""


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cu128"; pre-release and local parts are passed over."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def _is_there(module: str) -> bool:
    """Whether a top-level module can be found; nothing of it is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: something put a module without a spec into sys.modules
        return module in sys.modules


def _import_error(module: str) -> str | None:
    """Why `module` cannot be imported, on one line, or None. Whatever its import raises is an answer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return None


def _version(module: str, *distributions: str) -> str:
    """Version of the first distribution that is installed, else what the imported module says."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(sys.modules.get(module), "__version__", ""))


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return Finding(
            "Python", "unsupported", version, f"{wanted} or newer", "nothing runs", f"install Python {wanted}"
        )
    return Finding("Python", "ok", version)


def _torch() -> Finding:
    install = "pip install torch, in the build for this machine's CUDA"
    if not _is_there("torch"):
        return Finding("torch", "absent", missing="the package", cost="nothing runs", install=install)
    error = _import_error("torch")
    version = _version("torch", "torch")
    if error:
        return Finding("torch", "incomplete", version, f"import torch: {error}", "nothing runs", install)
    if _numbers(version)[:2] < TORCH:
        wanted = ".".join(map(str, TORCH))
        return Finding("torch", "unsupported", version, f"{wanted} or newer", "nothing runs", install)
    return Finding("torch", "ok", sys.modules["torch"].__version__)


def _megatron_core() -> Finding:
    oldest, too_new = (".".join(map(str, bound)) for bound in MEGATRON_CORE)
    install = f"pip install 'megatron-core>={oldest},<{too_new}'"
    if not _is_there("megatron"):
        return Finding("megatron-core", "absent", missing="the package", cost="nothing runs", install=install)
    error = _import_error("megatron.core")
    version = _version("megatron.core", "megatron-core", "megatron_core")
    if error:
        return Finding(
            "megatron-core", "incomplete", version, f"import megatron.core: {error}", "nothing runs", install
        )
    if not MEGATRON_CORE[0] <= _numbers(version)[:2] < MEGATRON_CORE[1]:
        return Finding(
            "megatron-core",
            "unsupported",
            version,
            f">={oldest},<{too_new}",
            "names that are used here may have moved; results were compared on supported releases only",
            install,
        )
    return Finding("megatron-core", "ok", version)


def _transformer_engine() -> Finding:
    name, cost = (
        "Transformer Engine",
        "no model.backend=transformer_engine, parallel.context above 1 or precision.fp8; model.backend=torch runs",
    )
    if not _is_there("transformer_engine"):
        return Finding(name, "absent", missing="the package", cost=cost, install=_GUIDE)
    error = _import_error("transformer_engine.pytorch")
    version = _version("transformer_engine", "transformer-engine", "transformer_engine")
    if error:
        missing = f"its PyTorch part does not load: {error}"
        return Finding(name, "incomplete", version, missing, cost, _GUIDE + " (built for another torch or CUDA?)")
    return Finding(name, "ok", version)


def _apex() -> Finding:
    """NVIDIA's Apex. The package index's `apex` is a web toolkit, and a Python-only build has none of the kernels."""
    cost = "megatron-core takes norms of and scales gradients one tensor after another; the same up to rounding"
    if not _is_there("apex"):
        return Finding("Apex", "absent", missing="the package", cost=cost, install=_GUIDE)
    error = _import_error("apex")
    version = _version("apex", "apex")
    if error:
        return Finding("Apex", "incomplete", version, f"import apex: {error}", cost, _GUIDE)
    if _import_error("apex.multi_tensor_apply"):
        missing = "this `apex` is another program, not NVIDIA's"
        return Finding("Apex", "incomplete", version, missing, cost, f"pip uninstall apex, then {_GUIDE}")
    absent = [kernel for kernel in ("amp_C", "fused_weight_gradient_mlp_cuda") if _import_error(kernel)]
    if absent:
        missing = f"compiled kernels {', '.join(absent)}: built for Python only, or for another torch"
        return Finding("Apex", "incomplete", version, missing, cost, _GUIDE)
    return Finding("Apex", "ok", version)


def _flash_attention() -> Finding:
    name, cost = "flash attention", "none with model.backend=torch: scaled_dot_product_attention carries its own"
    install = "pip install --no-build-isolation flash-attn, or let Transformer Engine use cuDNN's"
    if not _is_there("flash_attn"):
        return Finding(name, "absent", missing="the package", cost=cost, install=install)
    error = _import_error("flash_attn")
    version = _version("flash_attn", "flash-attn", "flash_attn")
    if error:
        return Finding(name, "incomplete", version, f"import flash_attn: {error}", cost, install)
    return Finding(name, "ok", version)


def _nccl() -> Finding:
    cost = "several GPUs cannot train together; on CPU gloo is used"
    if _import_error("torch"):
        return Finding("NCCL", "absent", missing="torch, which carries it", cost=cost, install="pip install torch")
    import torch

    if not torch.distributed.is_nccl_available():
        missing = "this torch was built without it"
        return Finding("NCCL", "absent", missing=missing, cost=cost, install="a CUDA build of torch")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _gpus() -> Finding:
    cost = "training runs on CPU: for tests and the quickstart"
    if _import_error("torch"):
        return Finding("GPUs", "absent", missing="torch, which finds them", cost=cost, install="pip install torch")
    import torch

    if torch.version.cuda is None:
        missing = "this torch was built for CPU"
        return Finding(
            "GPUs", "absent", missing=missing, cost=cost, install="a CUDA build of torch, where there is a GPU"
        )
    if not torch.cuda.is_available():
        missing = f"no device that CUDA {torch.version.cuda} can use"
        return Finding("GPUs", "absent", missing=missing, cost=cost, install="a GPU, its driver, and access to both")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in found]
    counted = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return Finding("GPUs", "ok", f"{counted}, CUDA {torch.version.cuda}")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("CPU cores", "ok", f"{usable} of {os.cpu_count() or usable} usable by this process")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB available")


def shared_memory(directory: Path = Path("/dev/shm")) -> Finding:
    """The memory that processes of one machine share as files."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        missing, cost = f"cannot be read: {error.strerror}", "NCCL between the GPUs of one node does not start"
        return Finding(str(directory), "absent", missing=missing, cost=cost, install="mount a tmpfs there")
    if free < SHARED_MEMORY_BYTES:
        return Finding(
            str(directory),
            "incomplete",
            f"{free / 2**20:.0f} MiB free",
            f"{SHARED_MEMORY_BYTES / 2**30:.0f} GiB",
            "NCCL between the GPUs of one node may fail with 'No space left on device'",
            "docker run --shm-size=16g, or --ipc=host",
        )
    return Finding(str(directory), "ok", f"{free / 2**30:.1f} GiB free")


_EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _megatron_core,
    _transformer_engine,
    _apex,
    _flash_attention,
    _nccl,
    _gpus,
    _cores,
    _memory,
    shared_memory,
)


def examine() -> list[Finding]:
    """What is here, in the order in which a run needs it. Imports torch and megatron-core: some seconds."""
    return [look() for look in _EXAMINATIONS]


def render(findings: list[Finding]) -> Table:
    """One row a finding; what is missing, what it costs and how to get it share the last column."""
    colours: dict[Status, str] = {"ok": "green", "absent": "yellow", "incomplete": "red", "unsupported": "red"}
    table = Table("", "status", "version", "missing, its cost, how to get it", show_lines=True)
    for finding in findings:
        notes = [
            f"{word}: {text}"
            for word, text in (("missing", finding.missing), ("cost", finding.cost), ("install", finding.install))
            if text
        ]
        # Text: plain strings are read as markup, and error texts hold brackets
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.version), Text("\n".join(notes)))
    return table
