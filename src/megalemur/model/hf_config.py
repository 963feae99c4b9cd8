"""config.json of a Hugging Face Llama, as transformers 4 and 5 spell it: read, written, compared. Free of torch.

A Mistral without a sliding window is a Llama by another name. Refuses what this Llama cannot compute: other
architectures, biases, other activations, unknown rotary types.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalemur.config.model import ModelConfig, RopeScaling
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import parse_json, readable_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

CARRIED_FILES = (
    GENERATION_FILE,
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files beside the weights that go wherever the model goes."""

DERIVED_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Tensors that older Llama files carry and transformers does not load either: the rotary frequencies of the config."""

DTYPES = ("float16", "bfloat16", "float32")

# transformers' LlamaConfig and MistralConfig: what a key that is not in the file means
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_DEFAULTS = {"llama": _LLAMA, "mistral": _MISTRAL}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_MISTRAL_WINDOW = 4096  # of a file that does not say
_MAX_LAYERS = 10_000  # a table of all tensors is made before any file is compared with it
_DEFAULT_THETA = 10000.0
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# ModelConfig's name: config.json's
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
# what a file cannot contradict: how to compute, and how random weights are drawn
_NOT_COMPARED = {"preset", "backend", "init_std"}


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What a config.json says."""

    path: Path
    """The file, for messages."""
    model: ModelConfig
    """The architecture; backend is left at its default."""
    original: Mapping[str, Any]
    """Every key of the file, for writing it again."""
    dtype: str | None
    """float16, bfloat16 or float32; None when the file does not say."""


def read_hf_config(directory: Path) -> HuggingFaceConfig:
    """Read `directory/config.json`.

    Raises:
        ValueError: no such file, no strict JSON, or a model that this Llama is not; lists every reason.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        data = read_plain(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    return parse_hf_config(data, path)


def parse_hf_config(data: bytes, path: Path) -> HuggingFaceConfig:
    """The config.json in `data`; `path` is for messages.

    Raises:
        ValueError: no strict JSON, or a model that this Llama is not; lists every reason.
    """
    try:
        original = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    if not isinstance(original, dict):
        raise ValueError(f"{path} cannot be used: it is no JSON object")
    _raise_all(path, _refusals(original))
    _raise_all(path, _rope_refusals(original))
    try:
        model = _model_of(original)
    except ValidationError as error:
        _raise_all(path, (f"{'.'.join(map(str, e['loc']))}: {e['msg']} ({e['input']!r})" for e in error.errors()))
        raise
    _raise_all(path, _shape_refusals(original, model))
    return HuggingFaceConfig(path, model, original, _dtype_of(original))


def hf_config_json(model: ModelConfig, *, dtype: str, source: Mapping[str, Any] | None = None) -> bytes:
    """config.json for `model`, which transformers 4 and 5 both understand.

    The rotary settings are always written as transformers 4 spells them, which 5 reads too. transformers 5's
    `rope_parameters` is added from scratch and kept where the source has it; added to a source without it, it would
    become a stray attribute under transformers 4, and the config would no longer equal the source's.

    Args:
        model: the architecture.
        dtype: float16, bfloat16 or float32: what the weight files hold.
        source: keys of the config.json that the model came from; those that ModelConfig does not know are kept.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    values: dict[str, Any] = dict(_FROM_SCRATCH if source is None else source)
    values |= {key: getattr(model, name) for name, key in _KEYS.items() if source is None or name not in _NOT_COMPARED}
    values |= {"rope_theta": model.rope_theta, "rope_scaling": _rope_scaling(model, values)}
    if source is None:
        rope = values["rope_scaling"] or {"rope_type": "default"}
        values["rope_parameters"] = {**rope, "rope_theta": model.rope_theta}
        values["head_dim"] = model.head_dim
    elif values.get("rope_parameters") is not None:
        # where rope_scaling is set, transformers 5 reads it instead
        values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": model.rope_theta}
    # torch_dtype is for transformers before 4.56
    values |= {"torch_dtype": dtype, "dtype": dtype}
    return readable_json(values)


def generation_config_json(*, bos_token_id: int | None = 1, eos_token_id: int | None = 2) -> bytes:
    """generation_config.json for a model from scratch: greedy until told otherwise."""
    values = {"_from_model_config": True, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    return readable_json(values)


def check_model_matches(config: ModelConfig, hf: HuggingFaceConfig) -> None:
    """Compare a run's model with the file that it starts from; backend, preset and init_std are the run's own.

    Raises:
        ValueError: lists every setting that differs, with both values.
    """
    differences = [
        f"model.{name}={_short(getattr(config, name))}, the file has {_short(getattr(hf.model, name))}"
        for name in ModelConfig.model_fields
        if name not in _NOT_COMPARED and getattr(config, name) != getattr(hf.model, name)
    ]
    if differences:
        listing = "".join(f"\n  - {difference}" for difference in differences)
        raise ValueError(f"the run's model is not the one in {hf.path}; change these settings:{listing}")


_FROM_SCRATCH: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "use_cache": True,
}


def _short(value: Any) -> Any:
    return value.model_dump() if isinstance(value, RopeScaling) else value


def _raise_all(path: Path, problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        raise ValueError(
            f"{path} describes a model that cannot be trained here:" + "".join(f"\n  - {p}" for p in found)
        )


def _get(values: Mapping[str, Any], key: str) -> Any:
    """A key's value, or what its absence means to transformers. null counts as absent."""
    value = values.get(key)
    return _DEFAULTS.get(str(values.get("model_type")), _LLAMA).get(key) if value is None else value


def _model_of(values: Mapping[str, Any]) -> ModelConfig:
    fields = {name: _get(values, key) for name, key in _KEYS.items()}
    if fields["num_query_groups"] is None:
        fields["num_query_groups"] = fields["num_attention_heads"]
    rope = _rope_of(values)
    scaling = RopeScaling(**{key: rope[key] for key in _LLAMA3_KEYS}) if rope["rope_type"] == "llama3" else None
    return ModelConfig(**fields, rope_theta=rope["rope_theta"], rope_scaling=scaling)


def _refusals(values: Mapping[str, Any]) -> Iterator[str]:
    """Whatever makes this another model than a Llama."""
    kind, architectures = values.get("model_type"), values.get("architectures")
    if kind not in _ARCHITECTURES:
        yield f"model_type is {kind!r}; only {' and '.join(map(repr, _ARCHITECTURES))} are known"
    elif architectures is not None and architectures != [_ARCHITECTURES[kind]]:
        yield f"architectures is {architectures!r}; only {[_ARCHITECTURES[kind]]} is known"
    window = values.get("sliding_window", _MISTRAL_WINDOW) if kind == "mistral" else None
    if window is not None:
        yield f"sliding_window is {window!r}; a Mistral that sees only the last tokens is no Llama (v0.2 has null)"
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            yield f"{key} is true; layers with biases are not supported"
    if values.get("hidden_act") not in (None, "silu"):
        yield f"hidden_act is {values['hidden_act']!r}; only 'silu' (SwiGLU) is known"
    if values.get("quantization_config") is not None:
        yield "quantization_config is set; start from the weights before quantization"
    for key in ("dtype", "torch_dtype"):
        if values.get(key) not in (None, *DTYPES):
            yield f"{key} is {values[key]!r}; use one of {', '.join(DTYPES)}"
    if values.get("partial_rotary_factor") not in (None, 1):
        yield f"partial_rotary_factor is {values['partial_rotary_factor']!r}; only whole heads are rotated"


def _shape_refusals(values: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    heads, given = model.num_attention_heads, values.get("head_dim")
    if model.num_layers > _MAX_LAYERS:
        yield f"num_hidden_layers={model.num_layers} is beyond any model (at most {_MAX_LAYERS})"
    if model.hidden_size % heads:
        yield f"num_attention_heads={heads} does not divide hidden_size={model.hidden_size}"
    elif given is not None and given != model.head_dim:
        yield f"head_dim={given} is not hidden_size / num_attention_heads = {model.hidden_size} / {heads}"
    elif model.head_dim % 2:
        yield f"head_dim={model.head_dim} is odd and cannot be rotated"
    if heads % model.num_query_groups:
        yield f"num_key_value_heads={model.num_query_groups} does not divide num_attention_heads={heads}"


def _rope_refusals(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the rotary settings, in whichever spelling."""
    blocks = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    for key, block in blocks.items():
        if not isinstance(block, dict):
            yield f"{key} is {block!r}, which is no JSON object"
            return
        kind = _rope_type(block)
        if kind not in ("default", "llama3"):
            yield f"{key} has rope_type {kind!r}; only 'default' and 'llama3' are known"
            continue
        missing = [name for name in _LLAMA3_KEYS if kind == "llama3" and block.get(name) is None]
        if missing:
            yield f"{key} of type llama3 lacks {', '.join(missing)}"
        if block.get("partial_rotary_factor") not in (None, 1):
            yield f"{key}.partial_rotary_factor is {block['partial_rotary_factor']!r}; only whole heads are rotated"
    yield from _contradictions(values, blocks)


def _contradictions(values: Mapping[str, Any], blocks: Mapping[str, Any]) -> Iterator[str]:
    """transformers 4 reads one spelling and 5 another: they must say the same."""
    thetas = {"rope_theta": values.get("rope_theta")}
    if "rope_scaling" in blocks and blocks["rope_scaling"].get("rope_theta") is None:
        thetas["rope_theta"] = _rope_of(values)["rope_theta"]
    thetas |= {f"{key}.rope_theta": block.get("rope_theta") for key, block in blocks.items()}
    said = {key: value for key, value in thetas.items() if value is not None}
    if len(set(said.values())) > 1:
        yield f"{' and '.join(f'{key}={value}' for key, value in said.items())} contradict each other"
    if len(blocks) == 2:
        one, other = ({"rope_type": _rope_type(block)} | _llama3_part(block) for block in blocks.values())
        if one != other:
            yield f"rope_scaling {one} and rope_parameters {other} contradict each other"
    outer, rope = values.get("original_max_position_embeddings"), _rope_of(values)
    inner = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "llama3" and outer is not None and outer != inner:
        yield f"original_max_position_embeddings is {outer} outside and {inner} inside the rotary settings"


def _rope_type(block: Mapping[str, Any]) -> Any:
    return block.get("rope_type", block.get("type", "default"))


def _llama3_part(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: block.get(key) for key in _LLAMA3_KEYS} if _rope_type(block) == "llama3" else {}


def _rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 5 spells them."""
    block = values.get("rope_scaling") or values.get("rope_parameters") or {}
    said = [t for t in (block.get("rope_theta"), values.get("rope_theta")) if t is not None]
    theta = said[0] if said else _DEFAULT_THETA
    return {**block, "rope_type": _rope_type(block), "rope_theta": theta}


def _rope_scaling(model: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """transformers 4's word for the scaling; the file's own block where it has one, for its order and number types."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if model.rope_scaling is None:
        return values.get("rope_scaling") if _rope_type(given) == "default" else None
    wanted = model.rope_scaling.model_dump()
    if _llama3_part(given) == wanted:
        return {key: value for key, value in given.items() if key != "rope_theta" or values.get("rope_scaling")}
    return {"rope_type": "llama3", **wanted}


def _dtype_of(values: Mapping[str, Any]) -> str | None:
    # transformers 5 takes `dtype` where both are given
    return values.get("dtype") or values.get("torch_dtype")
