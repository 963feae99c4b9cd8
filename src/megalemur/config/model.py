"""What a Llama is. Holds nothing that changes with the number of GPUs."""

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from megalemur.config.presets import PRESETS
from megalemur.config.section import Section


class RopeScaling(Section):
    """Llama-3 rotary scaling (Llama 3.1 model card): low frequencies stretched by `factor`, high ones kept."""

    factor: PositiveFloat
    """Stretch of wavelengths longer than original_max_position_embeddings / low_freq_factor."""
    low_freq_factor: PositiveFloat
    """Wavelengths above original_max_position_embeddings / this are stretched in full."""
    high_freq_factor: PositiveFloat
    """Wavelengths below original_max_position_embeddings / this are kept as they are."""
    original_max_position_embeddings: PositiveInt
    """Tokens: the context length before scaling."""


class ModelConfig(Section):
    """Architecture of a Llama 2 or 3. `preset: llama2_70b` fills in every field that is not given."""

    preset: str | None = None
    """Name of the preset that the other fields started from; see `megalemur schema`."""
    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU layer (gate and up each)."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt
    """Key/value heads; fewer than num_attention_heads is grouped-query attention."""
    vocab_size: PositiveInt
    """True vocabulary size, in tokens. Padding for tensor parallelism is added per layout and never stored."""
    max_position_embeddings: PositiveInt = 4096
    """Tokens: the longest sequence that the model is declared for; written to the Hugging Face config."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 scaling of the rotary frequencies; none for Llama 2 and Llama 3.0."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights when training from scratch."""
    backend: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Kernels. torch: own RMSNorm and scaled_dot_product_attention. transformer_engine: its fused modules.
    auto: torch, until Transformer Engine has been proven on a GPU (docs/gpu.md)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        if not isinstance(values["preset"], str) or values["preset"] not in PRESETS:
            raise ValueError(f"no such preset {values['preset']!r}; use one of {', '.join(PRESETS)}")
        return {**PRESETS[values["preset"]], **values}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one transformer layer."""
        h, kv = self.hidden_size, self.num_query_groups * self.head_dim
        return 2 * h * h + 2 * h * kv + 3 * h * self.ffn_hidden_size + 2 * h

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, padding not counted."""
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * self.parameters_per_layer + self.hidden_size * (1 + tables * self.vocab_size)
