"""What is known of an opened checkpoint, without reading a tensor: facts for people, and all of it as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from checkpoints_tools.compare import Comparison, TensorComparison
from checkpoints_tools.opened import Opened
from checkpoints_tools.printing import counted, dtype_text, size_text
from checkpoints_tools.regions import WEIGHT, Key
from checkpoints_tools.tensor_statistics import Statistics
from megalemur.config.model import ModelConfig
from megalemur.model.names import hf_shapes


class Listed(NamedTuple):
    """A tensor of a checkpoint."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of(opened: Opened) -> list[Listed]:
    """Every tensor, in the order of the layers."""
    shapes = hf_shapes(opened.model)
    return [Listed(key, shapes[key.name], dtype) for key, dtype in opened.dtypes.items()]


def files_of(opened: Opened) -> list[str]:
    """Files with tensors."""
    return sorted({region.file for found in opened.regions.values() for region in found})


def checkpoint_facts(opened: Opened) -> Iterator[tuple[str, str]]:
    """What the checkpoint is, name and value."""
    tensors = tensors_of(opened)
    kinds = list(dict.fromkeys(one.key.kind for one in tensors))
    yield "format", opened.format
    yield "parameters", f"{opened.model.parameters:,}"
    for kind in kinds:
        of_kind = [one for one in tensors if one.key.kind == kind]
        dtypes = sorted({dtype_text(one.dtype) for one in of_kind})
        name = "weights" if kind == WEIGHT else kind
        yield (
            name,
            f"{counted(len(of_kind), 'tensor')}, {', '.join(dtypes)}, {size_text(sum(o.bytes for o in of_kind))}",
        )
    yield "files", f"{counted(len(files_of(opened)), 'file')} with tensors"
    if opened.small_files:
        yield "beside them", ", ".join(sorted(opened.small_files))
    for name, value in opened.facts.items():
        yield name, _value_text(value)


def model_facts(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """The architecture, name and value, in the words of the settings."""
    for name in ("num_layers", "hidden_size", "ffn_hidden_size"):
        yield name, f"{getattr(model, name):,}"
    groups = "" if model.num_query_groups == model.num_attention_heads else f", in {model.num_query_groups} groups"
    yield "attention heads", f"{model.num_attention_heads} of size {model.head_dim}{groups}"
    yield "vocab_size", f"{model.vocab_size:,}{', head tied to the embedding' if model.tie_embeddings else ''}"
    yield "max_position_embeddings", f"{model.max_position_embeddings:,}"
    scaling = model.rope_scaling
    yield "rope_theta", f"{model.rope_theta:,.0f}"
    if scaling is not None:
        yield (
            "rope_scaling",
            f"llama3: factor {scaling.factor:g}, low {scaling.low_freq_factor:g}, high {scaling.high_freq_factor:g}, "
            f"from {scaling.original_max_position_embeddings:,} positions",
        )
    yield "norm_eps", f"{model.norm_eps:g}"


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value_text, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def as_json(
    opened: Opened, statistics: Mapping[Key, Statistics] | None, comparison: Comparison | None
) -> dict[str, Any]:
    """All that is known, as JSON has words for it."""
    tensors: dict[str, dict[str, Any]] = {}
    for one in tensors_of(opened):
        said: dict[str, Any] = {"shape": list(one.shape), "dtype": dtype_text(one.dtype), "bytes": one.bytes}
        said["files"] = sorted({region.file for region in opened.regions[one.key]})
        if statistics is not None:
            said["statistics"] = _statistics_json(statistics[one.key])
        tensors.setdefault(one.key.kind, {})[one.key.name] = said
    found: dict[str, Any] = {
        "path": str(opened.path),
        "format": opened.format,
        "parameters": opened.model.parameters,
        "model": opened.model.model_dump(mode="json"),
        "facts": dict(opened.facts),
        "notes": list(opened.notes),
        "small_files": {name: len(data) for name, data in sorted(opened.small_files.items())},
        "tensors": tensors,
    }
    if comparison is not None:
        found["against"] = _comparison_json(comparison)
    return found


def _statistics_json(one: Statistics) -> dict[str, Any]:
    return {
        "norm": one.norm,
        "minimum": finite(one.minimum),
        "maximum": finite(one.maximum),
        "mean": finite(one.mean),
        "nans": one.nans,
        "infinities": one.infinities,
    }


def _comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "equal": found.equal(),
        "settings": {one.name: [_plain(one.a), _plain(one.b)] for one in found.settings},
        "alone": [[list(key) for key in keys] for keys in found.alone],
        "not_compared": [list(kinds) for kinds in found.left_out],
        "tensors": [_tensor_json(one) for one in found.tensors if not one.within(0)],
    }


def _tensor_json(one: TensorComparison) -> dict[str, Any]:
    said: dict[str, Any] = {
        "kind": one.key.kind,
        "name": one.key.name,
        "shapes": [list(shape) for shape in one.shapes],
        "dtypes": [dtype_text(dtype) for dtype in one.dtypes],
    }
    if one.same_shape:
        said |= {
            "compared_as": dtype_text(one.compared_as),
            "xxh3_128": list(one.digests),
            "differing": one.differing,
            "max_difference": finite(one.max_difference),
            "rms_difference": finite(one.rms_difference),
        }
    return said


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def finite(value: float) -> float | None:
    """The number, or None where JSON has none."""
    return value if math.isfinite(value) else None
