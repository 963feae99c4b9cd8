"""Counts what tensors take, what products cost and what collectives carry, below autograd: for dry runs and proofs."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Sent(NamedTuple):
    """Collectives of one kind in one group."""

    kind: str
    """As torch names it: allreduce_, _allgather_base_, _reduce_scatter_base_, send, recv_, broadcast_ …"""
    group: str
    """Ranks of the group, or `?`."""


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Scores and their product with the values, the causal half not left out."""
    batch, heads, length, size = query.shape
    return 2 * batch * heads * length * key.shape[2] * (size + value.shape[3])


# torch counts the CUDA kernels only. Twice forward for backward: what the kernel computes again does not count as use.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is _ATTENTION:
        return _attention_flops(*args[:3])
    if packet is _ATTENTION_BACKWARD:
        return 2 * _attention_flops(*args[1:4])
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


class Tracer(TorchDispatchMode):
    """Follows every storage from its first tensor to its end. Real and fake tensors alike; no values are read.

    A storage counts once, with all its bytes, however many views there are; what is alive before the mode is entered
    counts from the moment at which an operation returns it.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        """Set up.

        Args:
            names: torch's name of a process group to what it is called in the result.
        """
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Highest `now` since the last `restart`."""
        self.flops = 0
        """Of matrix products and attention, two a multiply-add."""
        self.calls: Counter[Sent] = Counter()
        self.bytes: Counter[Sent] = Counter()
        """Bytes of the tensors that a collective writes."""
        self._names = dict(names or {})
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak and the counts, not what is alive."""
        self.peak, self.flops = self.now, 0
        self.calls.clear()
        self.bytes.clear()

    def follow(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        packet = func._overloadpacket
        if func.namespace == "c10d":
            self._sent(packet.__name__, (args, kwargs))
        else:
            self.flops += _flops(packet, args, kwargs, out)
        return out

    def _sent(self, kind: str, given: Any) -> None:
        leaves = tree_leaves(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
        sent = Sent(kind, next((self._names[name] for name in map(_group_name, groups) if name in self._names), "?"))
        self.calls[sent] += 1
        self.bytes[sent] += max((t.numel() * t.element_size() for t in tensors), default=0)


def _group_name(group: Any) -> str:
    try:
        return str(torch.distributed.ProcessGroup.unbox(group).group_name)
    except (RuntimeError, TypeError):  # another object: a reduction
        return ""
