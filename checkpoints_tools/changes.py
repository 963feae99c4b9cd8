"""Changes laid over tensors while they are read: another dtype, another vocabulary, no optimizer's state."""

from collections.abc import Mapping
from threading import Lock

import torch

from checkpoints_tools.errors import ConversionError
from checkpoints_tools.mover import row_blocks
from checkpoints_tools.opened import Weights
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.config.model import ModelConfig
from megalemur.model.names import EMBEDDING, HEAD, hf_shapes

TABLES = (EMBEDDING, HEAD)
"""Tensors with a row for each token."""


class WeightsAlone:
    """What a model computes with, without the optimizer's state."""

    def __init__(self, source: Weights):
        self._source, self.model = source, source.model
        self.dtypes = {key: dtype for key, dtype in source.dtypes.items() if key.kind == WEIGHT}

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows as they are."""
        return self._source.read(key, first, last)


class Cast:
    """Weights in another dtype; the optimizer's state stays fp32."""

    def __init__(self, source: Weights, dtype: torch.dtype):
        self._source, self.model = source, source.model
        self.dtypes = {key: dtype if key.kind == WEIGHT else old for key, old in source.dtypes.items()}

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows, cast.

        Raises:
            ConversionError: fp16 cannot hold a value.
        """
        rows = self._source.read(key, first, last)
        cast = rows.to(self.dtypes[key])
        if cast.dtype == torch.float16 and rows.dtype != torch.float16 and not cast.isfinite().all():
            raise ConversionError(f"{key.name}: values beyond ±65504 or not finite do not fit fp16; use --dtype bf16")
        return cast


class Resized:
    """Weights with more rows for the vocabulary, or without some that are padding."""

    def __init__(self, source: Weights, vocab_size: int, fill: "Fill", *, known: int | None = None):
        """Nothing is read yet.

        Args:
            source: weights alone; moments of rows that nobody trained do not exist.
            vocab_size: rows that there will be.
            fill: what the rows beyond the known ones are.
            known: rows of the source that are kept; None: all that there is room for. The rest was padding.
        """
        assert all(key.kind == WEIGHT for key in source.dtypes)
        self._source, self._fill, self.dtypes = source, fill, dict(source.dtypes)
        self._known = min(vocab_size, source.model.vocab_size, *([] if known is None else [known]))
        self.model: ModelConfig = source.model.model_copy(update={"vocab_size": vocab_size, "preset": None})

    def read(self, key: Key, first: int, last: int) -> torch.Tensor:
        """Rows of the source, then filled ones."""
        if key.name not in TABLES:
            return self._source.read(key, first, last)
        parts = []
        if first < self._known:
            parts.append(self._source.read(key, first, min(last, self._known)))
        if last > self._known:
            start = max(first, self._known)
            parts.append(self._fill.rows(self._source, key, self._known, start - self._known, last - self._known))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Fill:
    """New rows of zeros."""

    def rows(self, source: Weights, key: Key, known: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) behind the `known` ones, in the dtype of the source."""
        return torch.zeros(last - first, source.model.hidden_size, dtype=source.dtypes[key])


class MeanFill(Fill):
    """New rows that are the mean of the known ones: a token that nobody has seen is as likely as an average one."""

    def __init__(self) -> None:
        self._means: dict[Key, torch.Tensor] = {}
        self._lock = Lock()

    def rows(self, source: Weights, key: Key, known: int, first: int, last: int) -> torch.Tensor:
        """The mean, again and again."""
        with self._lock:
            if key not in self._means:
                self._means[key] = _mean_row(source, key, known)
        return self._means[key].to(source.dtypes[key]).expand(last - first, -1).contiguous()


class GivenFill(Fill):
    """New rows out of a file."""

    def __init__(self, rows: Mapping[str, torch.Tensor]):
        """Table's name to rows, [number of new tokens, hidden size]."""
        self._rows = rows

    def refuse_unfit(self, model: ModelConfig, count: int) -> None:
        """Compare with what will be asked for: `count` new rows.

        Raises:
            ConversionError: a table is missing, or has another shape.
        """
        wanted = (count, model.hidden_size)
        for name in [name for name in hf_shapes(model) if name in TABLES]:
            found = self._rows.get(name)
            if found is None or tuple(found.shape) != wanted:
                said = "is not there" if found is None else f"is {list(found.shape)}"
                raise ConversionError(f"--rows: {name} {said}; {list(wanted)} (new tokens, hidden size) is wanted")

    def rows(self, source: Weights, key: Key, known: int, first: int, last: int) -> torch.Tensor:
        """Those rows."""
        return self._rows[key.name][first:last].to(source.dtypes[key]).contiguous()


def _mean_row(source: Weights, key: Key, known: int) -> torch.Tensor:
    total = torch.zeros(source.model.hidden_size, dtype=torch.float64)
    for first, last in row_blocks((known, source.model.hidden_size), source.dtypes[key].itemsize):
        total += source.read(key, first, last).sum(dim=0, dtype=torch.float64)
    return total / known


def refuse_cut(source: Weights, vocab_size: int, tokens: int | None) -> None:
    """Let only padding go.

    Args:
        source: weights before the change.
        vocab_size: rows that will be left.
        tokens: tokens of the tokenizer; None: there is none, and only rows of zeros count as padding.

    Raises:
        ConversionError: a row that goes is a token's.
    """
    if tokens is not None and vocab_size < tokens:
        raise ConversionError(
            f"--vocab-size {vocab_size} would cut tokens off: the tokenizer has {tokens}; use {tokens} or more"
        )
    if tokens is not None:
        return
    for key in [Key(WEIGHT, name) for name in TABLES if Key(WEIGHT, name) in source.dtypes]:
        rows = source.read(key, vocab_size, source.model.vocab_size)
        used = rows.ne(0).any(dim=1).nonzero()
        if len(used):
            last = vocab_size + int(used[-1]) + 1
            raise ConversionError(
                f"--vocab-size {vocab_size} would cut rows off that are not zero, and there is no tokenizer that says "
                f"they are no tokens: the last row of {key.name} in use is {last - 1}; use {last} or more, or name the "
                "tokenizer with --tokenizer"
            )
