"""Seconds of single kernels on one GPU: matrix products, attention, and what only moves memory.

A matrix product takes what its arithmetic needs at the achievable share of the peak, longer where the product is too
small to fill the device, and what the traffic of its operands needs: the sum, not the maximum of the roofline (Williams
et al. 2009).
"""

from dataclasses import dataclass

from megalemur.plan.cluster import Cluster
from megalemur.plan.constants import Constants
from megalemur.plan.job import Kernels

_TILE = 128 * 256
"""Elements of the output tile of one multiprocessor (CUTLASS's and cuBLAS's usual choice on Ampere and Hopper)."""

_HALF_LENGTH = 512.0
"""Tokens at which causal attention reaches half of what it reaches on long sequences: tiles on the diagonal are half
empty (Dao 2023, figure 4; Shah et al. 2024, figure 5)."""

ATTENTION_BACKWARD = 0.8
"""Rate of attention's backward pass over that of its forward pass (Shah et al. 2024, figures 5 and 6)."""

_OLDER_ATTENTION = 0.6
"""Rate of FlashAttention-2 on Hopper over that of FlashAttention-3 (Shah et al. 2024, figure 5)."""


@dataclass(frozen=True, slots=True)
class Device:
    """What one GPU reaches."""

    multiprocessors: int
    product_flops: float
    """FLOP/s of a large product in 16 bits."""
    fp8_flops: float
    fp32_flops: float
    attention_flops: float
    """FLOP/s of fused attention, forward, on long sequences."""
    bytes_per_second: float
    """Of kernels that only move memory."""

    @classmethod
    def of(cls, cluster: Cluster, constants: Constants) -> "Device":
        """The achievable speeds of a cluster's GPU."""
        scale = cluster.achievable_fraction * (constants.blackwell if cluster.architecture == "blackwell" else 1.0)
        share = scale * (constants.gemm_ampere if cluster.architecture == "ampere" else constants.gemm_hopper)
        peak = cluster.peak_teraflops_16bit * 1e12
        return cls(
            multiprocessors=cluster.multiprocessors,
            product_flops=peak * share,
            fp8_flops=(cluster.peak_teraflops_fp8 or 0.0) * 1e12 * constants.gemm_fp8 * scale,
            fp32_flops=cluster.peak_teraflops_fp32 * 1e12 * share,
            attention_flops=peak * constants.attention * scale,
            bytes_per_second=cluster.memory_gigabytes_per_second * 1e9 * constants.memory,
        )

    def flops(self, precision: str) -> float:
        """FLOP/s of a large product."""
        if precision == "fp8":
            return self.fp8_flops
        return self.fp32_flops if precision == "fp32" else self.product_flops

    def product(self, m: float, n: float, k: float, precision: str, *, batch: int = 1, accumulate: int = 0) -> float:
        """Seconds of `batch` products [m, k] x [k, n].

        Args:
            m: rows of the output.
            n: columns of the output.
            k: terms of each sum.
            precision: of the operands.
            batch: equal products in one kernel.
            accumulate: bytes a element that the output is added to, as the fp32 gradients are; 0: it is written once.
        """
        filled = min(1.0, batch * m * n / (_TILE * self.multiprocessors))
        seconds = batch * 2.0 * m * n * k / (self.flops(precision) * filled)
        size = {"fp8": 1, "fp32": 4}.get(precision, 2)
        output = 2 * accumulate if accumulate else max(size, 2)
        traffic = batch * (size * (m * k + k * n) + output * m * n) / self.bytes_per_second
        return seconds + traffic

    def moved(self, count: float) -> float:
        """Seconds of kernels that read and write `count` bytes together."""
        return count / self.bytes_per_second

    def fused_attention(self, length: float, precision: str, kernels: Kernels, *, hopper: bool) -> float:
        """FLOP/s of fused attention's forward pass: of the scores below the diagonal and their product with the values.

        Args:
            length: tokens of the query block that one kernel sees.
            precision: of the job; in 8 bits attention runs in 16, in fp32 without tensor cores.
            kernels: which generation of it runs.
            hopper: the device is Hopper or newer.
        """
        filled = length / (length + _HALF_LENGTH)
        if precision == "fp32":
            return self.attention_flops * self.fp32_flops / self.product_flops * filled
        return self.attention_flops * filled * (_OLDER_ATTENTION if hopper and kernels.attention_generation == 2 else 1)
