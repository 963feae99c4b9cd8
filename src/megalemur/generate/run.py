"""Continues a prompt with the model of a checkpoint, in one process."""

from pathlib import Path

import torch

from megalemur.checkpoint.load import load_pieces, refuse_table
from megalemur.checkpoint.opening import SmallFiles
from megalemur.checkpoint.read import HuggingFaceReader
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig
from megalemur.config.precision import PrecisionConfig
from megalemur.generate.sample import Sampling, choose
from megalemur.generate.tokenizer import load_tokenizer, stop_ids
from megalemur.model.hf_config import CONFIG_FILE, DERIVED_TENSORS, parse_hf_config
from megalemur.model.llama import Llama, build_chunks, model_segments
from megalemur.model.logits import Decoder
from megalemur.model.names import hf_shapes
from megalemur.parallel.groups import join, leave
from megalemur.parallel.seeds import seed_step
from megalemur.parallel.state import MASTER, Owned, pieces_of


def load_model(checkpoint: Path, precision: PrecisionConfig) -> tuple[Llama, ModelConfig]:
    """The model of a checkpoint or Hugging Face directory, whole, on this process's device. Groups must exist."""
    data = SmallFiles(checkpoint).get(CONFIG_FILE)
    if data is None:
        raise ValueError(f"{checkpoint} holds no {CONFIG_FILE}")
    hf = parse_hf_config(data, checkpoint / CONFIG_FILE)
    reader = HuggingFaceReader(checkpoint, derived=DERIVED_TENSORS)
    refuse_table(reader, hf_shapes(hf.model))  # before a model of whatever size the config claims is made
    parallel = ParallelConfig()
    seed_step(0, 0, 0, 0)
    (chunk,) = build_chunks(hf.model, parallel, precision)
    segments = model_segments([chunk], hf.model)
    owned = [Owned(p, 0, p.numel(), {MASTER: p.data}) for p in chunk.parameters()]
    load_pieces(reader, pieces_of(owned, segments), shapes=hf_shapes(hf.model))
    return chunk.eval(), hf.model


def generate_text(checkpoint: Path, prompt: str, *, max_tokens: int, sampling: Sampling, seed: int = 0) -> str:
    """The prompt's continuation, without the prompt.

    Args:
        checkpoint: our checkpoint or a Hugging Face Llama directory, with its tokenizer.
        prompt: text.
        max_tokens: tokens to add at most; ends before at the end-of-sequence token and at the model's context.
        sampling: how a token is chosen.
        seed: of the sampling.

    Raises:
        ValueError, CheckpointError: no tokenizer, no model that is a Llama, or a prompt longer than the context.
    """
    tokenizer = load_tokenizer(checkpoint)
    stops = stop_ids(checkpoint, tokenizer)
    place = join(ParallelConfig(), timeout_seconds=600)
    try:
        bf16 = place.device.type == "cuda"
        chunk, model = load_model(checkpoint, PrecisionConfig(dtype="bf16" if bf16 else "fp32"))
        ids = tokenizer.encode(prompt)
        room = model.max_position_embeddings - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"the prompt is {len(ids)} tokens; it must have 1 to {model.max_position_embeddings - 1} "
                "(model.max_position_embeddings less one)"
            )
        added = continue_ids(chunk, ids, min(max_tokens, room), sampling=sampling, seed=seed, stops=stops)
    finally:
        leave()
    return tokenizer.decode(added)


def continue_ids(
    chunk: Llama, ids: list[int], max_tokens: int, *, sampling: Sampling, seed: int, stops: frozenset[int]
) -> list[int]:
    """Up to `max_tokens` ids that follow `ids`; keys and values of earlier tokens are kept."""
    device = next(chunk.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    decoder = Decoder(chunk, max_length=len(ids) + max_tokens)
    logits = decoder.feed(torch.tensor([ids], device=device))
    added: list[int] = []
    while True:
        token = int(choose(logits, sampling, generator)[0])
        if token in stops:
            return added
        added.append(token)
        if len(added) == max_tokens:
            return added
        logits = decoder.feed(torch.tensor([[token]], device=device))
