"""A Llama on megatron-core's GPTModel: the chunks that one rank holds, and their parameters' names outside.

Refuses nothing that config has not refused; owns the two places where GPTModel alone would be wrong for a Llama:
padding columns in the loss, and rotary scaling other than megatron-core's constants.
"""

import math
from collections.abc import Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megalemur.config.layers import chunk_layers
from megalemur.config.model import ModelConfig, RopeScaling
from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig
from megalemur.model.backend import block_spec, resolve_backend
from megalemur.model.mcore_config import mcore_config
from megalemur.model.names import Split, segments_of
from megalemur.parallel.groups import holds_first_layer, holds_last_layer, pipeline_rank, tensor_rank
from megalemur.parallel.state import Segment


def scaled_frequencies(inverse: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Rotary frequencies after Llama-3 scaling.

    Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in the number of turns
    that they make within the original context (Llama 3 Herd of Models, section 3.2; the reference code's constants are
    settings here). megatron-core's own scaling fixes three of the four.

    Args:
        inverse: inverse frequencies, [d / 2], fp32.
        scaling: the four constants.
    """
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position_embeddings / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - kept) * inverse / scaling.factor + kept * inverse
    long = turns < scaling.low_freq_factor
    short = turns > scaling.high_freq_factor
    return torch.where(long, inverse / scaling.factor, torch.where(short, inverse, blended))


class Llama(GPTModel):
    """One chunk of a Llama: consecutive layers, and the embedding or the output layer where it has them."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        num_layers: int,
        padded_vocab: int,
        ends: tuple[bool, bool],
        vp_stage: int | None,
    ):
        """Build the chunk.

        Args:
            config: megatron-core's config.
            model: the architecture.
            num_layers: layers in this chunk.
            padded_vocab: rows of the embedding over all ranks, padding included.
            ends: whether the embedding and whether the output layer are here.
            vp_stage: number of this chunk on its stage; None without chunks.
        """
        super().__init__(
            config,
            block_spec(resolve_backend(model), num_layers),
            vocab_size=padded_vocab,
            max_sequence_length=model.max_position_embeddings,
            pre_process=ends[0],
            post_process=ends[1],
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            vp_stage=vp_stage,
        )
        self.true_vocab = model.vocab_size
        self.padded_vocab = padded_vocab
        if model.rope_scaling is not None:
            self.rotary_pos_emb.inv_freq = scaled_frequencies(self.rotary_pos_emb.inv_freq, model.rope_scaling)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy a token, [b, s], over the true vocabulary.

        Args:
            labels: token ids, [b, s].
            logits: this rank's columns, [s, b, padded vocabulary / t]; padding columns would enter the sum.
        """
        first = tensor_rank() * logits.shape[-1]
        padding_from = max(0, self.true_vocab - first)
        if padding_from < logits.shape[-1]:
            columns = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(columns >= padding_from, float("-inf"))
        return super().compute_language_model_loss(labels, logits)


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, deterministic: bool = False
) -> list[Llama]:
    """The chunks of this rank, in the order of its schedule, with all weights zero.

    The process groups must exist. Zero, so that vocabulary padding, which no checkpoint holds, is zero and stays so.
    """
    config = mcore_config(model, parallel, precision)
    config.deterministic_mode = deterministic  # the embedding's backward pass; Transformer Engine is held to its word
    counts = chunk_layers(model.num_layers, parallel)[pipeline_rank()]
    chunks = []
    for number, count in enumerate(counts):
        vp_stage = number if parallel.chunks > 1 else None
        chunk = Llama(
            config,
            model,
            num_layers=count,
            padded_vocab=parallel.padded_vocab(model.vocab_size),
            ends=(holds_first_layer(vp_stage), holds_last_layer(vp_stage)),
            vp_stage=vp_stage,
        )
        chunks.append(chunk)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    return chunks


def model_segments(chunks: Sequence[Llama], model: ModelConfig) -> dict[torch.nn.Parameter, list[Segment]]:
    """What each local parameter is made of, in Hugging Face coordinates."""
    segments = {}
    for chunk in chunks:
        offset = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
        split = Split(
            model,
            chunk.config.tensor_model_parallel_size,
            tensor_rank(),
            chunk.padded_vocab,
        )
        for name, parameter in chunk.named_parameters():
            segments[parameter] = segments_of(name, offset, split)
    return segments
