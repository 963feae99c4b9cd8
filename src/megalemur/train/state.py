"""How far a run is: the part of trainer/state.json that train owns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunState:
    """Counters since the very beginning of the run."""

    step: int = 0
    """Steps taken, skipped ones included."""
    updates: int = 0
    """Optimizer updates applied: what the bias correction counts."""
    samples: int = 0
    """Samples drawn."""
    tokens: int = 0
    """Tokens that counted in a loss."""
    skipped_in_a_row: int = 0
    """Steps since the last update that was applied: a restart does not give the guard its patience back."""
    rejected_from: int = 0
    """Samples drawn when the first of those steps began; without meaning while there are none."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint."""

    def to_json(self) -> dict[str, int]:
        """For trainer/state.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        """From trainer/state.json.

        Raises:
            ValueError: missing, extra or negative counters.
        """
        names = set(cls().to_json())
        if set(values) != names or any(not isinstance(v, int) or v < 0 for v in values.values()):
            raise ValueError(f"trainer/state.json: run wants whole numbers {sorted(names)}, found {dict(values)}")
        return cls(**values)
