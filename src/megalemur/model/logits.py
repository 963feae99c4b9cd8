"""Logits over the true vocabulary: of a whole sequence, or token by token with kept keys and values.

Shapes: b batch, s sequence, v true vocabulary.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megalemur.model.llama import Llama


def true_logits(chunk: Llama, local: torch.Tensor) -> torch.Tensor:
    """[b, s, v] from the last stage's output [b, s, padded vocabulary / t]; gathered over the tensor-parallel ranks."""
    return gather_from_tensor_model_parallel_region(local)[..., : chunk.true_vocab]


class Decoder:
    """Feeds a model without pipeline stages piece by piece."""

    def __init__(self, chunk: Llama, *, max_length: int):
        self._chunk = chunk
        self._context = StaticInferenceContext(max_batch_size=1, max_sequence_length=max_length)

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, v] behind the last of `tokens`, [b, s]: the prompt first, then one token a call."""
        seen = self._context.sequence_len_offset
        assert seen == 0 or tokens.shape[1] == 1
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        logits = self._chunk(tokens, positions, None, inference_context=self._context, runtime_gather_output=True)
        self._context.sequence_len_offset += tokens.shape[1]
        if seen == 0:
            self._context.enable_decode_mode()
        return logits[:, -1, : self._chunk.true_vocab]
