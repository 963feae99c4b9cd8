"""The torch backend: RMSNorm and attention without a compiled extra, where megatron-core's spec wants them.

Shapes: s sequence, b micro-batch, n heads on this rank, d head size, t = b * s tokens of a packed micro-batch.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import rms_norm, scaled_dot_product_attention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019). megatron-core's own refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(ones)
        # its gradient is a sum over this rank's part of the sequence: where it sees this, megatron-core adds them up
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] to the same shape; the sum is taken in fp32."""
        return rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention; [b, n, s, d] each, key and value with fewer heads. One new query attends to all keys."""
    whole_prefix = query.shape[2] == key.shape[2]
    return scaled_dot_product_attention(query, key, value, is_causal=whole_prefix, enable_gqa=True)


class CoreAttention(torch.nn.Module):
    """Causal grouped-query attention on torch's scaled_dot_product_attention.

    Packed micro-batches come as [t, n, d] with their document lengths: each document then is a call of its own, the
    work of the documents' squares instead of a dense mask over the whole window.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any):
        super().__init__()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """[s, b, n, d] or, packed, [t, n, d] to [s, b, n * d] or [t, n * d]."""
        if packed_seq_params is None:
            heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return _causal(*heads_first).permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()  # a CPU tensor: no sync
        # split, not slices: the gradient of a slice is as long as the whole window, once a document
        split = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        documents = [_causal(*(x.transpose(0, 1)[None] for x in document)) for document in split]
        return torch.cat(documents, dim=2)[0].transpose(0, 1).flatten(1)
