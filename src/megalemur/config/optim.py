"""The optimizer and the schedule of its learning rate."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megalemur.config.section import Section


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019), decay not applied to norms and biases."""

    kind: Literal["fused_adamw", "adamw"] = "fused_adamw"
    """fused_adamw: torch's fused kernel on CPU and CUDA, the state layout of the fused Adams. adamw: torch.optim.AdamW.
    Chosen here, never by what happens to be importable."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay a step, times the learning rate; matrices only."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 never clips."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then cosine, constant, or warm-up-stable-decay (WSD)."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd: constant, then a linear decay over the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0; step k of the warm-up runs at (k + 1) / warmup_steps of the peak."""
    decay_steps: PositiveInt | None = None
    """cosine: steps at which the minimum is reached (unset: run.steps). wsd: length of the final decay
    (unset: a tenth of run.steps)."""
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Floor, as a fraction of the peak."""
