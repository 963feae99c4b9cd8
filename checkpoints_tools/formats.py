"""The formats by name, and which one a directory is in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools import (
    hf,
    hf_bin,
    megatron_dist,
    megatron_legacy,
    megatron_legacy_write,
    megatron_write,
    meta,
    native,
)
from checkpoints_tools.errors import ConversionError, RequestError
from checkpoints_tools.layout import Layout, Options
from checkpoints_tools.opened import Opened, Weights
from megalemur.config.model import ModelConfig
from megalemur.model.hf_config import read_hf_config


@dataclass(frozen=True)
class Format:
    """How to read one, and to write it where that can be done."""

    what: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, ModelConfig | None], Opened]
    """The model is for formats whose files do not say all of it; others take it from themselves."""
    lay_out: Callable[[Weights, Opened, Options], Layout] | None = None


FORMATS: Mapping[str, Format] = {
    native.NAME: Format(
        "a checkpoint of megalemur", native.recognises, lambda path, _: native.open_native(path), native.lay_out
    ),
    hf.NAME: Format(
        "a Hugging Face directory with safetensors", hf.recognises, lambda path, _: hf.open_hf(path), hf.lay_out
    ),
    megatron_dist.NAME: Format(
        "a torch_dist checkpoint of Megatron-LM, Megatron-Bridge or NeMo",
        megatron_dist.recognises,
        megatron_dist.open_megatron,
        megatron_write.lay_out,
    ),
    megatron_legacy.NAME: Format(
        "a checkpoint of Megatron-LM with a file for each rank (--ckpt-format torch)",
        megatron_legacy.recognises,
        megatron_legacy.open_megatron_legacy,
        megatron_legacy_write.lay_out,
    ),
    hf_bin.NAME: Format(
        "a Hugging Face directory with pytorch_model.bin", hf_bin.recognises, lambda path, _: hf_bin.open_hf_bin(path)
    ),
    meta.NAME: Format("a release of Meta's", meta.recognises, meta.open_meta),
}
"""Name to format, in the order in which a directory is tried: one of ours is a Hugging Face directory besides."""


def written_formats() -> list[str]:
    """Names of those that can be written."""
    return [name for name, format_ in FORMATS.items() if format_.lay_out is not None]


def open_any(path: Path, *, name: str | None = None, model: ModelConfig | None = None) -> Opened:
    """Open a checkpoint in whatever format it is.

    Args:
        path: its directory.
        name: of the format; None: it is recognised.
        model: what the files themselves do not say of the model.

    Raises:
        ConversionError, DamagedCheckpoint: it is in no known format, or not what that format says.
    """
    if not path.is_dir():
        raise ConversionError(f"{path} is {'no directory' if path.exists() else 'not there'}")
    if name is None:
        name = next((name for name, format_ in FORMATS.items() if format_.recognises(path)), None)
    if name is None:
        known = "".join(f"\n  - {name}: {format_.what}" for name, format_ in FORMATS.items())
        raise ConversionError(f"{path} holds no checkpoint in a known format:{known}")
    return FORMATS[name].open(path, model)


def model_in(folder: Path | None) -> ModelConfig | None:
    """The model of a config.json that somebody names for a checkpoint without one; None where nobody does.

    Raises:
        RequestError: there is none, or it is no Llama.
    """
    if folder is None:
        return None
    try:
        return read_hf_config(folder).model
    except ValueError as error:
        raise RequestError(f"--hf-config: {error}") from None
