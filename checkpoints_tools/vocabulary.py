"""Another vocabulary: tokenizer files, embedding rows and config.json changed together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_tools.changes import TABLES, Fill, GivenFill, MeanFill, Resized, WeightsAlone, refuse_cut
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.opened import Opened, Weights
from checkpoints_tools.tokens import TOKENIZER_FILES, add_tokens, count_tokens, wanted_tokens
from megalemur.config.plain_files import read_plain


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    vocab_size: int | None = None
    add_tokens: str | None = None
    fill: str = "mean"
    """mean, zero, or a safetensors file with the rows."""
    tokenizer: Path | None = None

    @property
    def is_none(self) -> bool:
        """Nothing is."""
        return self.vocab_size is None and self.add_tokens is None and self.tokenizer is None


def change(weights: Weights, source: Opened, wish: Wish) -> tuple[Weights, Opened, dict[str, Any]]:
    """The weights with another vocabulary, what goes along with them, and what was done, for the certificate.

    Raises:
        ConversionError: tokens would be cut off, there is no tokenizer to add to, or the rows given do not fit.
    """
    if wish.is_none:
        return weights, source, {}
    files = dict(source.small_files)
    if wish.tokenizer is not None:
        files = {name: data for name, data in files.items() if name not in TOKENIZER_FILES}
        files |= _tokenizer_in(wish.tokenizer)
    known, done = count_tokens(files), dict[str, Any]()
    if wish.add_tokens is not None:
        files, ids = add_tokens(files, wanted_tokens(wish.add_tokens))
        done["tokens"] = ids
    tokens = count_tokens(files)
    old = source.model.vocab_size
    if known is not None and known > old:
        raise ConversionError(f"the tokenizer has {known} tokens and the model {old} rows: it is not this model's")
    new = wish.vocab_size if wish.vocab_size is not None else max(old, tokens or 0)
    if new < old or (tokens is not None and new < tokens):
        refuse_cut(weights, new, tokens)
    # rows behind the tokenizer's tokens are padding; a token that is added gets a row of its own all the same
    kept = min(old, new, known if wish.add_tokens is not None and known is not None else old)
    if new != old or kept < new:
        done |= {"vocab_size": new, "rows_kept": kept, "rows_filled": new - kept, "fill": wish.fill}
        weights = Resized(WeightsAlone(weights), new, _fill(wish.fill, weights, new - kept), known=kept)
    return weights, replace(source, small_files=files, config=_config(source.config, done.get("tokens", {}))), done


def _tokenizer_in(folder: Path) -> dict[str, bytes]:
    try:
        found = {name: read_plain(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}
    except OSError as error:
        raise ConversionError(f"--tokenizer {folder}: {error.filename}: {error.strerror}") from None
    if count_tokens(found) is None:
        raise ConversionError(f"--tokenizer {folder}: holds neither tokenizer.model nor tokenizer.json")
    return found


def _config(config: Mapping[str, Any] | None, ids: Mapping[str, int]) -> Mapping[str, Any] | None:
    if config is None or "<pad>" not in ids or config.get("pad_token_id") is not None:
        return config
    return {**config, "pad_token_id": ids["<pad>"]}


def _fill(word: str, weights: Weights, count: int) -> Fill:
    if word in ("mean", "zero"):
        return MeanFill() if word == "mean" else Fill()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(word, framework="pt") as file:
            names = set(file.keys()) & set(TABLES)
            sizes = {name: file.get_slice(name).get_shape() for name in names}
            if any(shape != [count, weights.model.hidden_size] for shape in sizes.values()):
                names = set()  # said below, without reading what does not fit
            fill = GivenFill({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"--fill {word}: mean, zero, or a safetensors file with rows; {error}") from None
    fill.refuse_unfit(weights.model, count)
    return fill
