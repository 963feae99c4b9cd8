"""Meta's releases: params.json and consolidated.NN.pth, one file for each tensor-parallel rank. Read, never written.

Facts, from Meta's own model code and transformers' conversion of it. The rows of wq and wk alternate between the two
halves of a head that are rotated together, where Hugging Face has the halves one behind the other. Llama 1 and 2 split
the embedding by columns, Llama 3 by rows. wo and w2 are split by columns, everything else by rows. Norms are not split:
each part holds them, and they are compared. params.json says neither the context length nor, in part, the rotary
scaling: see `_context` and `_scaling`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints_tools import llama3_tokenizer
from checkpoints_tools.copies import first_difference
from checkpoints_tools.errors import ConversionError, UnfitSource
from checkpoints_tools.foreign import StoredTensor, read_archive
from checkpoints_tools.opened import Opened
from checkpoints_tools.regions import WEIGHT, Key, Region
from checkpoints_tools.stored import region_of, stored_tensors, stub_notes
from megalemur.checkpoint.errors import DamagedCheckpoint, UnreadableCheckpoint
from megalemur.config.model import ModelConfig
from megalemur.config.plain_files import read_plain
from megalemur.config.strict_json import parse_json, readable_json
from megalemur.model.hf_config import GENERATION_FILE, generation_config_json, hf_config_json, parse_hf_config
from megalemur.model.names import EMBEDDING, HEAD, NORM, hf_shapes
from megalemur.parallel.boxes import Box

NAME = "meta"
PARAMS, TOKENIZER = "params.json", "tokenizer.model"
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_ROPE_FREQUENCIES = "rope.freqs"

# Hugging Face's name inside a layer: Meta's
_ROWS = {
    "self_attn.v_proj.weight": "attention.wv.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
_ROTATED = {"self_attn.q_proj.weight": "attention.wq.weight", "self_attn.k_proj.weight": "attention.wk.weight"}
_COLUMNS = {"self_attn.o_proj.weight": "attention.wo.weight", "mlp.down_proj.weight": "feed_forward.w2.weight"}
_NORMS = {"input_layernorm.weight": "attention_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}
_LAYER = {**_ROWS, **_ROTATED, **_COLUMNS, **_NORMS}
_OUTSIDE = {EMBEDDING: "tok_embeddings.weight", NORM: "norm.weight", HEAD: "output.weight"}

_LLAMA3_VOCABULARY = 128_256
_LLAMA3_TOKENS = {"bos_token_id": 128_000, "eos_token_id": 128_001}


class _Part(NamedTuple):
    """One rank's file."""

    file: Path
    tensors: Mapping[str, StoredTensor]

    def get(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UnfitSource(f"{self.file}: {name} is missing")
        return self.tensors[name]

    def rows(self, name: str) -> int:
        shape = self.get(name).shape
        if len(shape) != 2:
            raise UnfitSource(f"{self.file}: {name} has shape {list(shape)}, where a matrix is expected")
        return shape[0]


def recognises(path: Path) -> bool:
    """Whether the directory holds a release of Meta's."""
    return (path / PARAMS).exists() and (path / "consolidated.00.pth").exists()


def open_meta(path: Path, model: ModelConfig | None = None) -> Opened:
    """The model in a release.

    Args:
        path: the directory with params.json.
        model: what the model is, where its context length or rotary scaling is another than is taken for granted.

    Raises:
        ConversionError, UnfitSource, DamagedCheckpoint: no Llama, or files that do not fit together.
    """
    params = _params(path / PARAMS)
    archives = {file.name: read_archive(file) for file in _files(path)}
    parts = [_Part(path / file, stored_tensors(archive, path / file)) for file, archive in archives.items()]
    found, notes = _model(path / PARAMS, params, parts)
    if model is not None:
        found = _agreed(path, found, model)
        notes = []
    if all(_ROPE_FREQUENCIES in part.tensors for part in parts):
        _same_everywhere(parts, _ROPE_FREQUENCIES)
        notes.append(f"{_ROPE_FREQUENCIES} is not read: it follows from the rotary settings")
    if len(parts) > 1:
        notes.append(f"norms lie in all {len(parts)} parts, which agree")
    config, small_files = _settings(path, found, parts[0])
    return Opened(
        NAME,
        path,
        found,
        _regions(found, parts),
        config=config,
        small_files=small_files,
        facts={"parts": len(parts)},
        notes=[*notes, *stub_notes(archives)],
    )


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if _FILE.fullmatch(file.name))
    numbers = [int(_FILE.fullmatch(file.name)[1]) for file in files]  # type: ignore[index]
    if numbers != list(range(len(files))):
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        raise UnfitSource(f"{path}: consolidated.{missing[0]:02d}.pth is missing")
    return files


def _params(file: Path) -> dict[str, Any]:
    try:
        params = parse_json(read_plain(file, 1 << 20))
    except OSError as error:
        raise UnreadableCheckpoint(file, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnfitSource(f"{file} is no JSON: {error}") from None
    params = params.get("model", params) if isinstance(params, dict) else params
    if not isinstance(params, dict):
        raise UnfitSource(f"{file} is no JSON object")
    sizes = {name: params.get(name) for name in ("dim", "n_layers", "n_heads")}
    sizes |= {name: params[name] for name in ("n_kv_heads", "multiple_of") if params.get(name) is not None}
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UnfitSource(f"{file}: {name} is {str(value)[:100]}, which is no size of a model")
    for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"):
        value = params.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e12):
            raise UnfitSource(f"{file}: {name} is {str(value)[:100]}, which is no such number")
    return params


def _model(file: Path, params: Mapping[str, Any], parts: Sequence[_Part]) -> tuple[ModelConfig, list[str]]:
    """The model, and what of it params.json does not say."""
    layers = len({name.split(".")[1] for name in parts[0].tensors if re.match(r"layers\.\d+\.", name)})
    if layers != params["n_layers"]:
        raise UnfitSource(f"{file}: n_layers is {params['n_layers']}, and {parts[0].file.name} holds {layers}")
    ffn = sum(part.rows("layers.0.feed_forward.w1.weight") for part in parts)
    _check_ffn(file, params, ffn)
    vocabulary = _vocabulary(file, params, parts)
    context, scaling = _context(params, vocabulary), _scaling(params)
    values = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "max_position_embeddings": context,
        "rms_norm_eps": params.get("norm_eps") or 1e-5,
        "rope_theta": params.get("rope_theta") or 10000.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": _OUTSIDE[HEAD] not in parts[0].tensors,
    }
    try:
        model = parse_hf_config(readable_json(values), file).model
    except ValueError as error:
        raise UnfitSource(str(error)) from None
    notes = [f"{PARAMS} does not say the context length; taken to be {context} tokens"]
    if scaling is not None and params.get("rope_scaling_factor") is None:
        notes.append(f"{PARAMS} does not say the rotary scaling's factor; taken to be {scaling['factor']:g}")
    return model, notes


def _check_ffn(file: Path, params: Mapping[str, Any], ffn: int) -> None:
    """Meta's rule: two thirds of 4 dim, times a multiplier, rounded up."""
    if params.get("multiple_of") is None:
        return
    wanted, unit = int(2 * 4 * params["dim"] / 3), params["multiple_of"]
    if params.get("ffn_dim_multiplier") is not None:
        wanted = int(params["ffn_dim_multiplier"] * wanted)
    wanted = -(-wanted // unit) * unit
    if wanted != ffn:
        raise UnfitSource(f"{file}: dim, multiple_of and ffn_dim_multiplier make {wanted}, and w1 has {ffn} rows")


def _vocabulary(file: Path, params: Mapping[str, Any], parts: Sequence[_Part]) -> int:
    """Rows of the embedding, which is split by columns or by rows; -1 in params.json means that the tokenizer knows."""
    name = _OUTSIDE[EMBEDDING]
    if _by_columns(params["dim"], parts):
        counts = {part.rows(name) for part in parts}
        if len(counts) > 1:
            raise UnfitSource(f"{file.parent}: the parts' {name} have {sorted(counts)} rows")
        (rows,) = counts
    else:
        rows = sum(part.rows(name) for part in parts)
    said = params.get("vocab_size", -1)
    if said not in (-1, None, rows):
        raise UnfitSource(f"{file}: vocab_size is {str(said)[:100]}, and {name} has {rows} rows")
    return rows


def _by_columns(dim: int, parts: Sequence[_Part]) -> bool:
    """Whether the embedding is split by columns: a part then has fewer than the model is wide."""
    name, (_, *columns) = _OUTSIDE[EMBEDDING], parts[0].get(_OUTSIDE[EMBEDDING]).shape or (0,)
    if columns not in ([dim], [dim // len(parts)]):
        shape = list(parts[0].get(name).shape)
        raise UnfitSource(
            f"{parts[0].file}: {name} has shape {shape}: neither the {dim} columns of an embedding that is split by "
            f"rows, nor the {dim / len(parts):g} of one that is split by columns over {len(parts)} parts"
        )
    return columns != [dim]


def _context(params: Mapping[str, Any], vocabulary: int) -> int:
    """Tokens, as Meta's model cards have it: Llama 3.1 and later, Llama 3, Code Llama, Llama 2."""
    if params.get("use_scaled_rope"):
        return 131_072
    if vocabulary >= _LLAMA3_VOCABULARY:
        return 8192
    return 16_384 if (params.get("rope_theta") or 10000.0) > 10000.0 else 4096


def _scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """As Meta's code has it: frequencies from 1 to 4 over 8192 tokens; factor 8, or 32 for the small ones of 3.2."""
    if not params.get("use_scaled_rope"):
        return None
    factor = params.get("rope_scaling_factor") or (8.0 if params["dim"] >= 4096 else 32.0)
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _agreed(path: Path, found: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model that the files hold, with what they do not say."""
    unsaid = {name: getattr(model, name) for name in ("max_position_embeddings", "rope_scaling")}
    agreed = found.model_copy(update=unsaid)
    free = {"preset", "backend", "init_std"}
    odd = [name for name in ModelConfig.model_fields if getattr(agreed, name) != getattr(model, name)]
    for name in odd:
        if name not in free:
            raise ConversionError(f"{path}: {name} is {getattr(agreed, name)}, and {getattr(model, name)} was expected")
    return agreed


def _settings(path: Path, model: ModelConfig, part: _Part) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Keys of a config.json, and the small files, as Hugging Face has them."""
    dtype = part.get(_OUTSIDE[EMBEDDING]).dtype
    word = str(dtype).removeprefix("torch.") if dtype in (torch.float16, torch.bfloat16) else "float32"
    config: dict[str, Any] = parse_json(hf_config_json(model, dtype=word))
    if model.vocab_size >= _LLAMA3_VOCABULARY:
        config |= _LLAMA3_TOKENS
    tokens = {name: config[name] for name in _LLAMA3_TOKENS}
    small_files = {GENERATION_FILE: generation_config_json(**tokens)}
    # Llama 1 and 2 keep one tokenizer beside the directories of the models
    for file in (path / TOKENIZER, path.absolute().parent / TOKENIZER):
        try:
            small_files |= _tokenizer(read_plain(file), file, model)
            break
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UnreadableCheckpoint(file, f"cannot be read: {error.strerror}") from error
    return config, small_files


def _tokenizer(data: bytes, file: Path, model: ModelConfig) -> dict[str, bytes]:
    """As Hugging Face has it: SentencePiece models as they are, Llama 3's as tokenizer.json."""
    if not llama3_tokenizer.recognises(data):
        return {TOKENIZER: data}
    return llama3_tokenizer.hugging_face_files(
        data,
        file,
        release_3_1=model.rope_scaling is not None,
        rows=model.vocab_size,
        context=model.max_position_embeddings,
    )


def _regions(model: ModelConfig, parts: Sequence[_Part]) -> dict[Key, list[Region]]:
    found: dict[Key, list[Region]] = {}
    used: set[str] = set()
    for name, shape in hf_shapes(model).items():
        layer = re.fullmatch(r"(?:model\.)(layers\.\d+\.)(.+)", name)
        inside = layer[2] if layer else name
        theirs = layer[1] + _LAYER[inside] if layer else _OUTSIDE[name]
        used.add(theirs)
        found[Key(WEIGHT, name)] = list(_of(model, parts, inside, (theirs, shape)))
    for part in parts:
        odd = sorted(part.tensors.keys() - used - {_ROPE_FREQUENCIES})
        if odd:
            raise UnfitSource(f"{part.file}: {odd[0][:200]} is nothing that a Llama has")
    return found


def _of(
    model: ModelConfig, parts: Sequence[_Part], inside: str, tensor: tuple[str, tuple[int, ...]]
) -> Iterator[Region]:
    """Regions of one tensor: `inside` is Hugging Face's name in a layer, `tensor` Meta's name and the whole shape."""
    name, shape = tensor
    if len(shape) == 1:
        _same_everywhere(parts, name)
        yield region_of(parts[0].get(name), (parts[0].file, name), Box((0,), shape))
        return
    by_columns = inside in _COLUMNS or (inside == EMBEDDING and _by_columns(model.hidden_size, parts))
    extent, rest = divmod(shape[1 if by_columns else 0], len(parts))
    if rest:
        raise UnfitSource(f"{parts[0].file}: {name} of shape {list(shape)} cannot be split over {len(parts)} parts")
    for number, part in enumerate(parts):
        stored, what, start = part.get(name), (part.file, name), number * extent
        expected = (shape[0], extent) if by_columns else (extent, shape[1])
        if stored.shape != expected:
            raise UnfitSource(
                f"{part.file}: {name} has shape {list(stored.shape)}; {list(expected)} is expected of one of "
                f"{len(parts)} parts"
            )
        if by_columns:
            yield region_of(stored, what, Box((0, start), (shape[0], start + extent)))
        elif inside in _ROTATED:
            yield from _rotated(stored, what, start, model.head_dim)
        else:
            yield region_of(stored, what, Box((start, 0), (start + extent, shape[1])))


def _rotated(stored: StoredTensor, what: tuple[Path, str], start: int, head: int) -> Iterator[Region]:
    """Row 2i + j of a head at Meta is row j head/2 + i of it at Hugging Face."""
    rows, columns = stored.shape
    if rows % head:
        raise UnfitSource(f"{what[0]}: {what[1]} has {rows} rows, which are no whole heads of {head}")
    half = head // 2
    for first in range(0, rows, head):
        for j in (0, 1):
            top = start + first + j * half
            yield region_of(stored, what, Box((top, 0), (top + half, columns)), first=first + j, step=2)


def _same_everywhere(parts: Sequence[_Part], name: str) -> None:
    """Whether all parts have the same vector, as every rank of a run does.

    Raises:
        UnfitSource: they have other shapes or dtypes, or are no vectors row by row.
        DamagedCheckpoint: names the part and the first element that differs from part 0's.
    """
    first, *others = [(part.file, part.get(name)) for part in parts]
    for file, stored in others:
        if stored.shape != first[1].shape:
            shapes = sorted({part.get(name).shape for part in parts})
            raise UnfitSource(f"{first[0].parent}: the parts' {name} have shapes {list(map(list, shapes))}")
        if stored.dtype != first[1].dtype or not (stored.is_contiguous and first[1].is_contiguous):
            raise UnfitSource(f"{file}: {name} is stored in another way than in {first[0].name}")
        index = first_difference(first, (file, stored))
        if index is not None:
            raise DamagedCheckpoint(
                file, f"{name}[{index}] differs from {first[0].name}'s, and all parts hold the same {name}"
            )
