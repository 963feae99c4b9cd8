"""What Megatron's own settings say about a model, and what they must say: `args` of Megatron-LM, the model section of
Megatron-Bridge and NeMo. Refuses what this Llama cannot compute."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoints_tools.errors import ConversionError
from megalemur.config.model import ModelConfig, RopeScaling

# ModelConfig's name: those that Megatron-LM, megatron-core's config and its model providers have for it
_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("ffn_hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}
_MCORE_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""megatron-core's own constants; only the factor is a setting."""

# setting: values that a Llama may have; absent or null is fine
_LLAMA: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_percent": (1, 1.0),
    "rotary_seq_len_interpolation_factor": (1,),
    "num_experts": (),
    "num_moe_experts": (),
    "mtp_num_layers": (0,),
    "window_size": (),
}

# a table of all tensors is made before any file is compared with it
_MAX_LAYERS, _MAX_HEADS = 10_000, 4096

_COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
)
"""What a model computes; the vocabulary apart, which is often known with its padding only."""

HOW_TO_GIVE_IT = "give the config.json of the model, or of one with the same architecture (--hf-config DIRECTORY)"


def model_of_settings(settings: Mapping[str, Any], where: Path) -> ModelConfig:
    """The architecture that Megatron's settings describe.

    Args:
        settings: by the names of Megatron-LM's arguments or of a model provider's fields.
        where: the file, for messages.

    Raises:
        ConversionError: settings that are missing, or that make another model than a Llama; lists every reason.
    """
    found = {name: _first(settings, names) for name, names in _NAMES.items()}
    missing = [" or ".join(_NAMES[name]) for name, value in found.items() if value is None]
    refusals = [*(f"{name} is missing" for name in missing), *_refusals(settings)]
    if refusals:
        listing = "".join(f"\n  - {refusal}" for refusal in refusals)
        raise ConversionError(f"{where}: the settings describe no Llama that is known here; {HOW_TO_GIVE_IT}:{listing}")
    try:
        model = ModelConfig(
            **found,
            num_query_groups=_groups(settings, found["num_attention_heads"]),
            rope_scaling=_scaling(settings),
            tie_embeddings=_tied(settings),
        )
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} ({e['input']!r})" for e in error.errors())
        raise ConversionError(f"{where}: {said}") from None
    for problem in _misshapen(model, settings.get("kv_channels")):
        raise ConversionError(f"{where}: {problem}")
    return model


def model_and_notes(
    settings: Mapping[str, Any], where: Path, rows: int, given: ModelConfig | None = None
) -> tuple[ModelConfig, list[str]]:
    """The architecture of a checkpoint, and what a reader should know about it.

    Args:
        settings: as `model_of_settings` has them; empty where a checkpoint has none.
        where: the file, for messages.
        rows: of the embedding, padding included: the vocabulary where its true size is not recorded.
        given: taken in the place of the settings.

    Raises:
        ConversionError: as `model_of_settings`, when no model is given.
    """
    if given is not None:
        return given, _differences(settings, where, given)
    model = model_of_settings({"padded_vocab_size": rows, **settings}, where)
    if settings.get("vocab_size") is None or model.vocab_size > rows:
        note = f"the true size of the vocabulary is not recorded: all {rows} rows are kept, padding among them"
        return model.model_copy(update={"vocab_size": rows}), [note]
    return model, []


def _differences(settings: Mapping[str, Any], where: Path, given: ModelConfig) -> list[str]:
    """What the settings say otherwise than a model that was given; a true vocabulary is no difference."""
    if not settings:
        return []
    try:
        said = model_of_settings({"padded_vocab_size": given.vocab_size, **settings}, where)
    except ConversionError as error:
        return [f"the model that was given is taken, since {error}"]
    names = [name for name in _COMPARED if getattr(said, name) != getattr(given, name)]
    listing = ", ".join(f"{name} {getattr(said, name)!r} (given: {getattr(given, name)!r})" for name in names)
    return [f"{where} says otherwise than the model that was given: {listing}"] if names else []


def arguments_of(model: ModelConfig, padded_vocab: int) -> dict[str, Any]:
    """Megatron-LM's arguments for a model: those that `--use-checkpoint-args` takes, and that a load compares.

    Raises:
        ConversionError: rotary scaling that Megatron has no arguments for.
    """
    scaling = model.rope_scaling
    if scaling is not None and scaling.model_dump(exclude={"factor"}) != _MCORE_ROPE:
        raise ConversionError(
            f"Megatron's rotary scaling has one setting, the factor; {scaling.model_dump(exclude={'factor'})} would be "
            f"computed as {_MCORE_ROPE}, and nothing would say so. Keep this model in the format hf or megalemur"
        )
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "seq_length": model.max_position_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole_if_it_is(model.rope_theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": 8.0 if scaling is None else scaling.factor,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
    }


def _whole_if_it_is(number: float) -> float:
    """--rotary-base takes whole numbers."""
    return int(number) if number == int(number) else number


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _refusals(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, allowed in _LLAMA.items():
        value = settings.get(name)
        if value is not None and value not in allowed:
            wanted = f"a Llama has {allowed[0]!r}" if allowed else "a Llama has none"
            yield f"{name} is {value!r}; {wanted}"


def _misshapen(model: ModelConfig, head_width: Any) -> Iterator[str]:
    heads, groups, hidden = model.num_attention_heads, model.num_query_groups, model.hidden_size
    if model.num_layers > _MAX_LAYERS or heads > _MAX_HEADS:
        yield f"{model.num_layers} layers of {heads} heads: at most {_MAX_LAYERS} of {_MAX_HEADS} are looked for"
    elif hidden % heads or heads % groups:
        yield f"hidden size {hidden}, {heads} heads and {groups} groups do not divide each other"
    elif head_width is not None and head_width != model.head_dim:
        yield f"kv_channels is {head_width!r}; {heads} heads of hidden size {hidden} are {model.head_dim} wide"


def _groups(settings: Mapping[str, Any], heads: int) -> Any:
    """Megatron-LM keeps a number of groups that is not used (its default is 1) beside group_query_attention=False."""
    groups = settings.get("num_query_groups")
    return heads if groups is None or settings.get("group_query_attention") is False else groups


def _tied(settings: Mapping[str, Any]) -> Any:
    untied = settings.get("untie_embeddings_and_output_weights")
    return settings.get("share_embeddings_and_output_weights", False) if untied is None else not untied


def _scaling(settings: Mapping[str, Any]) -> RopeScaling | None:
    if settings.get("old_context_len") is not None:  # NeMo's name for the original context, with its own three others
        return RopeScaling(
            factor=settings.get("scale_factor"),
            low_freq_factor=settings.get("low_freq_factor"),
            high_freq_factor=settings.get("high_freq_factor"),
            original_max_position_embeddings=settings.get("old_context_len"),
        )
    if not _first(settings, ("use_rope_scaling", "rope_scaling")):
        return None
    return RopeScaling(factor=settings.get("rope_scaling_factor") or 8.0, **_MCORE_ROPE)
