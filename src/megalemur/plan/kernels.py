"""Seconds of single kernels on one device: matrix products, attention, and what only moves memory.

A matrix product takes what its arithmetic needs at the achievable share of the peak, lowered where the product is too
small to fill the device, or what its operands' traffic needs, whichever is longer (roofline, Williams et al. 2009).
"""

from dataclasses import dataclass

from megalemur.plan.cluster import Cluster
from megalemur.plan.constants import Constants

_TILE_ROWS, _TILE_COLUMNS = 128, 256
"""Output tile of one multiprocessor's matrix kernel (CUTLASS's and cuBLAS's usual choice on Ampere and Hopper)."""


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU's achievable speeds, as the constants of its architecture say."""

    multiprocessors: int
    memory: float
    """Bytes a second that element-wise kernels reach."""
    flops: float
    """FLOP/s of 16-bit products that are large enough."""
    flops_fp8: float
    flops_fp32: float
    attention: float
    """FLOP/s of the fused attention kernel's forward pass on long sequences."""
    half_wave: float
    half_depth: float
    kernel_gap: float
