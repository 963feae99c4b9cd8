"""The efficiency constants of the time model: what data sheets do not say. Fitted by benchmarks/fit_plan.py, kept in
constants.yaml beside this file."""

from functools import cache
from pathlib import Path

from pydantic import Field

from megalemur.config.load import parse_settings
from megalemur.config.section import Section


class Constants(Section):
    """Shares of a peak, and overheads. The bounds are what is physically plausible; no constant serves one row only."""

    gemm_ampere: float = Field(ge=0.6, le=0.95)
    """Share of the 16-bit peak that a large matrix product reaches on A100 (power and clocks included)."""
    gemm_hopper: float = Field(ge=0.5, le=0.9)
    """The same on H100 and H200."""
    gemm_fp8: float = Field(ge=0.4, le=0.85)
    """Share of the 8-bit peak on Hopper and newer."""
    blackwell: float = Field(ge=0.5, le=1.1)
    """What B200 and GB200 reach of the shares above and of the next one, against Hopper."""
    attention: float = Field(ge=0.35, le=0.85)
    """Share of the 16-bit peak that the forward pass of fused attention reaches on long sequences on its own
    generation of devices (FlashAttention-2 on Ampere, FlashAttention-3 or cuDNN on Hopper)."""
    memory: float = Field(ge=0.5, le=0.95)
    """Share of the memory bandwidth that element-wise kernels reach."""
    links: float = Field(ge=0.5, le=0.95)
    """Share of a link's bandwidth that collectives and messages reach, in a node and between nodes."""
    tensor_exposed: float = Field(ge=0.0, le=0.7)
    """Share of the tensor-parallel traffic that still shows where it is overlapped with the products beside it."""
    step_gap: float = Field(ge=0.0, le=0.02)
    """Seconds a step, times log2 of the processes: waiting for the slowest of all, and what no other term describes."""


@cache
def fitted() -> Constants:
    """The constants in constants.yaml."""
    path = Path(__file__).with_name("constants.yaml")
    return Constants.model_validate(parse_settings(path.read_text(encoding="utf-8"), path.name)["constants"])
