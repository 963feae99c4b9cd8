"""The seam between CUDA and CPU: where there is no GPU, megatron-core's own code is led to the CPU and to gloo.

Each redirect names what megatron-core asks of CUDA; on a machine with a GPU none is installed. The function mode is
thread-local: threads that never opened the seam must not touch megatron-core.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core.tensor_parallel.random as mcore_random
import torch
from torch.overrides import TorchFunctionMode

from megalemur.config.parallel import ParallelConfig

Rewrite = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Redirect:
    """One thing that megatron-core asks of CUDA and that a CPU answers instead."""

    name: str
    reason: str
    install: Callable[[], None] | None = None
    """Replaces functions for the life of the process."""
    rewrite: Rewrite | None = None
    """Changes a torch call on its way: (function, args, kwargs) to the same."""


def _identity(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _cuda_type_name(tensor: torch.Tensor) -> str:
    return tensor.type().replace("torch.", "torch.cuda.")


def _is_cuda(device: Any) -> bool:
    """True for "cuda", "cuda:1", torch.device("cuda") and bare GPU numbers."""
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) or getattr(device, "type", "") == "cuda"


def _rewrite_device(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs and _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": "cpu"}
    return function, args, kwargs


def _rewrite_cuda_copy(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (_identity if function is torch.Tensor.cuda else function), args, kwargs


def _rewrite_type_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function is torch.Tensor.type and len(args) == 1 and not kwargs:
        return _cuda_type_name, args, kwargs
    return function, args, kwargs


def _install_current_device() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _install_synchronize() -> None:
    torch.cuda.synchronize = lambda *_, **__: None


def _seed_cpu(seed: int) -> None:
    torch.manual_seed(seed)


def _install_generator() -> None:
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.manual_seed = _seed_cpu
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


REDIRECTS: tuple[Redirect, ...] = (
    Redirect(
        "current_device", "buffers and weights are allocated on current_device()", install=_install_current_device
    ),
    Redirect("device_literals", 'the pipeline schedules allocate on device="cuda"', rewrite=_rewrite_device),
    Redirect("cuda_copies", "tied embeddings are moved with .cuda()", rewrite=_rewrite_cuda_copy),
    Redirect(
        "type_names", "the optimizers compare tensor.type() with torch.cuda.FloatTensor", rewrite=_rewrite_type_name
    ),
    Redirect("synchronize", "batched pipeline messages end in torch.cuda.synchronize()", install=_install_synchronize),
    Redirect("generator", "seeds and generator states are those of the CUDA device", install=_install_generator),
)


class _CudaMeansCpu(TorchFunctionMode):
    """Apply the rewrites to every torch call of this thread. Costs a Python call a torch function, on CPU only."""

    def __init__(self, rewrites: Sequence[Rewrite]):
        super().__init__()
        self.rewrites = tuple(rewrites)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for rewrite in self.rewrites:
            func, args, kwargs = rewrite(func, args, kwargs)
        return func(*args, **kwargs)


def has_gpu() -> bool:
    """Whether this process computes on CUDA."""
    return torch.cuda.is_available()


def gpu_name() -> str | None:
    """This process's GPU as CUDA names it; None: there is none."""
    return torch.cuda.get_device_name() if has_gpu() else None


@functools.cache
def open_seam(redirects: tuple[Redirect, ...] = REDIRECTS) -> None:
    """Install the redirects in this process and thread, once; nothing on a machine with a GPU.

    Args:
        redirects: all of them, but in the tests that prove each one necessary.
    """
    if has_gpu():
        return
    for redirect in redirects:
        if redirect.install:
            redirect.install()
    # entered for the life of the process: megatron-core calls torch from everywhere
    _CudaMeansCpu([redirect.rewrite for redirect in redirects if redirect.rewrite]).__enter__()


def device_of(local_rank: int) -> torch.device:
    """The device of a process: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")


def collective_backend() -> str:
    """Backend of the collectives."""
    return "nccl" if has_gpu() else "gloo"


def batched_p2p(pipeline: int, chunks: int) -> bool:
    """Whether pipeline messages go out as one batch.

    With two stages and chunks, forward and backward messages between the same two peers pair up wrongly under gloo and
    nothing complains (measured: loss off by 8e-3), so there they are sent one by one, on every device alike.
    """
    return not (pipeline == 2 and chunks > 1)


def describe(parallel: ParallelConfig) -> dict[str, str]:
    """What CPU and cluster do differently, as resolved here for this layout."""
    gpu = has_gpu()
    batched = batched_p2p(parallel.pipeline, parallel.chunks) and not parallel.overlap_p2p
    return {
        "device": gpu_name() or "cpu",
        "collectives": collective_backend(),
        "redirects of megatron-core": "none" if gpu else ", ".join(redirect.name for redirect in REDIRECTS),
        "pipeline messages": "none" if parallel.pipeline == 1 else "batched" if batched else "one by one",
        "attention kernel": "scaled_dot_product_attention, " + ("CUDA" if gpu else "CPU"),
    }
