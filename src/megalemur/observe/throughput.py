"""How much arithmetic a token is, and how much of a device's peak a run uses. No torch.

Model FLOPs only: what recompute repeats, vocabulary padding and optimizer arithmetic do not count as use.
Letters: L layers, h hidden, f FFN width, g key/value groups, d head size, V vocabulary, s sequence length.
"""

import re
from typing import NamedTuple

from megalemur.config.model import ModelConfig


class FlopsPerToken(NamedTuple):
    """FLOPs a token, forward and backward, in the two conventions that published tables use."""

    full_attention: float
    """Every token attends to all s tokens (Narayanan et al. 2021, appendix; NVIDIA's tables until mid 2025)."""
    causal_attention: float
    """Only the causal half of the scores counts (NVIDIA's tables since)."""


def flops_per_token(model: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """Model FLOPs a token: 6 (L (2h² + 2hgd + 3hf) + Vh) + c L h s, with c = 12 or 6.

    The 6 is two FLOPs a multiply-add, once forward and twice backward (Kaplan et al. 2020, section 2.1). The embedding
    is a look-up and counts nothing; the output layer counts, tied or not. Windows are counted at their full length
    also where data.document_mask keeps documents apart, which computes less.

    Args:
        model: the architecture.
        sequence_length: s, tokens.
    """
    h, kv = model.hidden_size, model.num_query_groups * model.head_dim
    layer = 2 * h * h + 2 * h * kv + 3 * h * model.ffn_hidden_size
    matrices = 6 * (model.num_layers * layer + model.vocab_size * h)
    scores = 6 * model.num_layers * h * sequence_length
    return FlopsPerToken(full_attention=matrices + 2 * scores, causal_attention=matrices + scores)


def utilisation(tokens_per_second: float, flops_a_token: float, *, devices: int, peak_teraflops: float) -> float:
    """Model-FLOP utilisation (Chowdhery et al. 2022, section 4.1): the used share, 0 to 1, of all devices' peak.

    Args:
        tokens_per_second: of the whole run.
        flops_a_token: in either convention.
        devices: that the run holds.
        peak_teraflops: of one device, dense, in the precision that is used (TFLOP/s).
    """
    return tokens_per_second * flops_a_token / (devices * peak_teraflops * 1e12)


class Peak(NamedTuple):
    """Dense bf16 peak of the devices whose name has all these words."""

    words: frozenset[str]
    teraflops: float


def _peak(words: str, teraflops: float) -> Peak:
    return Peak(frozenset(words.split()), teraflops)


# Dense bf16 tensor-core peaks in TFLOP/s from NVIDIA's data sheets; where a sheet prints only the sparse figure, half
# of it. Narrow names stand before wide ones: the first that fits is taken.
PEAKS: tuple[Peak, ...] = (
    _peak("GB200", 2500.0),  # GB200 NVL72 data sheet: 5,000 sparse a GPU
    _peak("B200", 2250.0),  # DGX B200 data sheet: 36,000 sparse for eight
    _peak("GH200", 989.4),  # GH200 data sheet: 1,979 sparse
    _peak("H200 NVL", 835.5),  # H200 data sheet: 1,671 sparse
    _peak("H200", 989.4),  # H200 data sheet: 1,979 sparse
    _peak("H100 NVL", 835.5),  # H100 data sheet: 1,671 sparse
    _peak("H100 PCIe", 756.0),  # H100 data sheet: 1,513 sparse
    _peak("H100 HBM3", 989.4),  # H100 data sheet, SXM: 1,979 sparse; the SXM board calls itself "H100 80GB HBM3"
    _peak("A100", 312.0),  # A100 data sheet, SXM and PCIe alike
)


def known_peak_teraflops(device_name: str) -> float | None:
    """Dense bf16 peak (TFLOP/s) of a GPU by the name that CUDA gives it; None: unknown, set log.peak_teraflops.

    A slice of a GPU (MIG) is unknown: its name is the whole GPU's.
    """
    words = set(re.split(r"[\s/-]+", device_name))
    if "MIG" in words:
        return None
    return next((peak.teraflops for peak in PEAKS if peak.words <= words), None)
