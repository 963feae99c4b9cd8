"""From logits to the next token. Shapes: b batch, v vocabulary."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; higher is more even."""
    top_k: int = 0
    """Choose among the k likeliest; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (Holtzman et al. 2020)."""


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> torch.Tensor:
    """Next token ids, [b], from logits [b, v]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        likeliest = scaled.topk(min(sampling.top_k, scaled.shape[-1]), dim=-1)
        scaled = torch.full_like(scaled, float("-inf")).scatter(-1, likeliest.indices, likeliest.values)
    if sampling.top_p < 1:
        scaled = _keep_mass(scaled, sampling.top_p)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


def _keep_mass(logits: torch.Tensor, mass: float) -> torch.Tensor:
    ordered, positions = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # the token that crosses the mass stays, so that one always remains
    beyond = probabilities.cumsum(dim=-1) - probabilities >= mass
    beyond[:, 0] = False
    return torch.empty_like(logits).scatter(-1, positions, ordered.masked_fill(beyond, float("-inf")))
