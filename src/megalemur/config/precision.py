"""Numbers of which width, and what is computed twice to save memory."""

from typing import Literal

from pydantic import PositiveInt

from megalemur.config.section import Section


class PrecisionConfig(Section):
    """Compute precision and activation recompute. Masters and moments are always fp32."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Parameters and activations. fp32 is for tests and debugging."""
    reduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32: 4 bytes a parameter instead of 2."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """8-bit matrix multiplications. Needs Transformer Engine on Hopper or newer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass. selective: the attention core (see recompute_modules);
    full: whole layers, about a third more compute."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """What `selective` computes again."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """full only. uniform: every layer, checkpoints each recompute_layers; block: the first recompute_layers
    of each chunk, the others keep their activations."""
    recompute_layers: PositiveInt = 1
    """full only: layers a checkpoint (uniform) or layers recomputed a chunk (block)."""
