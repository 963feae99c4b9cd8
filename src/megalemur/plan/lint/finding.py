"""What a rule has to say, and the rule itself."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Level = Literal["error", "warning"]
Texts = Iterator[str]
Check = Callable[..., Texts]


class Finding(NamedTuple):
    """One thing that is wrong."""

    rule: str
    """Name of the rule."""
    level: Level
    """error: the run would fail, or train something else than was meant. warning: it costs, or is meant seldom."""
    text: str
    """A sentence: the setting or file, why, and what to write instead."""


@dataclass(frozen=True)
class Rule:
    """A check with its name. What it needs are the names of its parameters."""

    level: Level
    check: Check

    @property
    def name(self) -> str:
        """The function's."""
        return self.check.__name__

    @property
    def needs(self) -> tuple[str, ...]:
        """Sections of a run file, `gpus_per_node`; of a rule over files: `config`, `files`, `site`."""
        return tuple(inspect.signature(self.check).parameters)

    @property
    def threads(self) -> tuple[str, ...]:
        """Where somebody paid for its absence in public."""
        return tuple(url.rstrip(".,:;)") for url in re.findall(r"https://\S+", self.check.__doc__ or ""))

    @property
    def says(self) -> str:
        """What it fires on: the first sentence of the docstring."""
        text = " ".join(inspect.cleandoc(self.check.__doc__ or "").split())
        return re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(":")

    def findings(self, subject: Mapping[str, Any]) -> Iterator[Finding]:
        """What it says of a subject; nothing where a part that it needs is missing."""
        if all(name in subject for name in self.needs):
            for text in self.check(*(subject[name] for name in self.needs)):
                yield Finding(self.name, self.level, text)
