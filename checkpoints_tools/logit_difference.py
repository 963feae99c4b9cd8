"""How far two checkpoints' logits are apart on the same tokens, over a vocabulary that is never whole in memory."""

from dataclasses import dataclass

import torch

from checkpoints_tools.forward import Prompts, head_columns, last_hidden, refuse_prompts
from checkpoints_tools.mover import Progress, row_blocks
from checkpoints_tools.opened import Weights


@dataclass(frozen=True)
class LogitDifference:
    """Of n tokens; KL divergences are of the second's distribution from the first's, KL(A || B), in nats."""

    tokens: int
    vocabulary: int
    """Ids whose logits were compared: those that both models have."""
    largest_logit: float
    """Of the first, by its absolute value: what a difference may be held against."""
    max_difference: float
    mean_difference: float
    max_kl: float
    mean_kl: float
    same_choice: int
    """Tokens for which both find the same next one most likely."""

    def within(self, max_difference: float, max_kl: float) -> bool:
        """Whether both bounds are kept; NaN keeps none."""
        return self.max_difference <= max_difference and self.max_kl <= max_kl


class _Side:
    """What one model's logits have come to so far: largest, where it is, and the sum of exponentials below it."""

    def __init__(self, tokens: int):
        self.largest = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self.choice = torch.zeros(tokens, dtype=torch.long)
        self.total = torch.zeros(tokens, dtype=torch.float64)

    def add(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """Take a block of the vocabulary; returns what sums that were made before have to be multiplied by."""
        largest, choice = block.max(dim=1)
        self.choice = torch.where(largest > self.largest, choice + first, self.choice)
        before, self.largest = self.largest, torch.maximum(self.largest, largest)
        shrunk = torch.exp(before - self.largest)
        self.total = self.total * shrunk + self.exponentials(block).sum(1)
        return shrunk

    def exponentials(self, block: torch.Tensor) -> torch.Tensor:
        """Of the block's logits, below the largest."""
        return torch.exp(block - self.largest[:, None])

    def log_total(self) -> torch.Tensor:
        """Logarithm of the sum of all exponentials."""
        return self.largest + self.total.log()


class LogitDifferences:
    """Takes blocks of the vocabulary, in their order, of both models. Sums are fp64."""

    def __init__(self, tokens: int):
        self._tokens, self._columns = tokens, 0
        self._a, self._b = _Side(tokens), _Side(tokens)
        self._weighted = torch.zeros(tokens, dtype=torch.float64)
        self._sum = torch.zeros((), dtype=torch.float64)
        self._max, self._largest = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """The next logits of both, [n, columns]."""
        a, b = a.double(), b.double()
        gap = a - b
        # torch.maximum lets NaN through; Python's max would lose it
        self._max, self._sum = torch.maximum(self._max, gap.abs().max()), self._sum + gap.abs().sum()
        self._largest = torch.maximum(self._largest, a.abs().max())
        shrunk = self._a.add(a, self._columns)
        self._b.add(b, self._columns)
        self._weighted = self._weighted * shrunk + (self._a.exponentials(a) * gap).sum(1)
        self._columns += a.shape[1]

    def result(self) -> LogitDifference:
        """Of everything so far."""
        kl = self._weighted / self._a.total - (self._a.log_total() - self._b.log_total())
        kl = kl.clamp(min=0)  # equal distributions round to either side of it
        return LogitDifference(
            tokens=self._tokens,
            vocabulary=self._columns,
            largest_logit=self._largest.item(),
            max_difference=self._max.item(),
            mean_difference=(self._sum / (self._tokens * self._columns)).item(),
            max_kl=kl.max().item(),
            mean_kl=kl.mean().item(),
            same_choice=int((self._a.choice == self._b.choice).sum()),
        )


def compare_logits(
    a: Weights, b: Weights, prompts: Prompts, progress: Progress = lambda count: None
) -> LogitDifference:
    """Run both checkpoints and compare their logits, over the ids that both know.

    Args:
        a: one checkpoint.
        b: another; it may differ in anything.
        prompts: token ids.
        progress: told of the bytes that were read; in the end, `forward.bytes_to_read` of both.

    Raises:
        RequestError: the prompts do not fit one of the models.
        DamagedCheckpoint: a checkpoint cannot be read, or is not what it says.
    """
    for weights in (a, b):
        refuse_prompts(weights.model, prompts)
    hidden = [last_hidden(weights, prompts, progress) for weights in (a, b)]
    found = LogitDifferences(len(hidden[0]))
    width = max(a.model.hidden_size, b.model.hidden_size)
    for first, last in row_blocks((min(a.model.vocab_size, b.model.vocab_size), width), torch.float32.itemsize):
        found.add(*(head_columns(w, x, first, last, progress) for w, x in zip((a, b), hidden, strict=True)))
    return found.result()
