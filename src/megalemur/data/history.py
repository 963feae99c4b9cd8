"""The history of a run's data: its seed, its blends, each with the sample at which it began, and what was skipped.

Everything the order of samples is a function of. A source is known by its key (the digest of its files). Refuses to
change what is already in the past.
"""

from fractions import Fraction
from math import gcd, lcm
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from megalemur.data.errors import DataError

_STRICT = ConfigDict(frozen=True, extra="forbid")


class Share(BaseModel):
    """One source of a blend."""

    model_config = _STRICT

    key: str
    """What the source is known by."""
    name: str
    """What people call it; no part of the order."""
    weight: str = Field(pattern=r"^\d+(\.\d+)?([eE][-+]?\d{1,3})?$")
    """Decimal text of a number above 0, exact; relative to the other sources of the blend."""

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: str) -> str:
        if Fraction(weight) <= 0:
            raise ValueError(f"weight {weight} is not above 0")
        return weight


class Blend(BaseModel):
    """Sources and weights from one sample on."""

    model_config = _STRICT

    begins: NonNegativeInt
    """Sample number from which this blend deals."""
    shares: tuple[Share, ...]
    """Its sources; their order means nothing."""

    @model_validator(mode="after")
    def _known_once(self) -> "Blend":
        if not self.shares:
            raise ValueError("a blend needs a source")
        for share in self.shares:
            twins = [other.name for other in self.shares if other.key == share.key]
            if len(twins) > 1:
                raise ValueError(f"{' and '.join(twins)} hold the same data; keep one, with the sum of their weights")
        return self

    def integer_weights(self) -> dict[str, int]:
        """Key to smallest whole weight, sorted by key: equal for blends that deal alike."""
        exact = {share.key: Fraction(share.weight) for share in self.shares}
        scale = lcm(*(weight.denominator for weight in exact.values()))
        whole = {key: int(exact[key] * scale) for key in sorted(exact)}
        shrink = gcd(*whole.values())
        return {key: weight // shrink for key, weight in whole.items()}


class History(BaseModel):
    """What the order of samples is a function of.

    Two ways to count: the n-th sample that a run draws (from 0, restarts not seen) is sample number `number(n)` of the
    deal; they differ by the skipped ranges, which the deal contains and the run passes over.
    """

    model_config = _STRICT

    format: Literal[1] = 1
    """Version of this record."""
    seed: int
    """Seed of all permutations."""
    sequence_length: PositiveInt
    """Tokens a sample: another length cuts other samples."""
    blends: tuple[Blend, ...]
    """Rising in `begins`; the first begins at 0."""
    skipped: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Ranges [a, b) of sample numbers that are passed over; rising, apart."""

    @model_validator(mode="after")
    def _in_order(self) -> "History":
        begins = [blend.begins for blend in self.blends]
        if not begins or begins[0] != 0 or sorted(set(begins)) != begins:
            raise ValueError(f"blends begin at samples {begins}; they must begin at 0 and rise")
        edges = [edge for span in self.skipped for edge in span]
        if any(a >= b for a, b in self.skipped) or sorted(edges) != edges:
            raise ValueError(f"skipped ranges {list(self.skipped)} must be [a, b) with a < b, rising and apart")
        return self

    @classmethod
    def begin(cls, seed: int, sequence_length: int, shares: tuple[Share, ...]) -> "History":
        """A new run's history."""
        return cls(seed=seed, sequence_length=sequence_length, blends=(Blend(begins=0, shares=shares),))

    def number(self, drawn: int) -> int:
        """Sample number of the run's `drawn`-th sample."""
        for a, b in self.skipped:
            if drawn < a:
                break
            drawn += b - a
        return drawn

    def with_blend(self, drawn: int, shares: tuple[Share, ...]) -> "History":
        """The history in which a run that has drawn `drawn` samples goes on with these sources and weights.

        The same weights as now change nothing. Blends that had been planned for later are forgotten.

        Raises:
            ValueError: the shares are no blend.
        """
        begins = self.number(drawn)
        new = Blend(begins=begins, shares=shares)
        past = [blend for blend in self.blends if blend.begins < begins]
        current = [blend for blend in self.blends if blend.begins <= begins][-1]
        if current.integer_weights() == new.integer_weights():
            past, new = [blend for blend in past if blend is not current], current
        return History(**{**dict(self), "blends": (*past, new)})

    def with_skip(self, drawn: int, first: int, last: int) -> "History":
        """The history in which a run that has drawn `drawn` samples will pass over its samples first to last - 1.

        Args:
            drawn: samples drawn so far.
            first: first sample to pass over, in the run's count before this skip; at least `drawn`.
            last: one past the last one.

        Raises:
            ValueError: the range is empty or reaches into the past.
        """
        if not drawn <= first < last:
            raise ValueError(
                f"samples [{first}, {last}) cannot be skipped after {drawn} were drawn; give a range that begins at "
                f"{drawn} or later and is not empty"
            )
        joined: list[tuple[int, int]] = []
        for a, b in sorted([*self.skipped, (self.number(first), self.number(last - 1) + 1)]):
            if joined and a <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
            else:
                joined.append((a, b))
        return History(**{**dict(self), "skipped": tuple(joined)})

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back to an equal history."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Any, *, origin: str) -> "History":
        """A history from JSON values.

        Args:
            values: what `to_json` gave.
            origin: where they come from, for the message.

        Raises:
            DataError: they are no history of this version.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the record"
            raise DataError(f"{origin}: data history: {where}: {first['msg']}; restore the file") from None
