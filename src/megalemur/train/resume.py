"""What a resume changes about its run: refused before anything is built, or recorded in trainer/state.json.

The table of what is free, recorded and refused is config/resume.py's.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError

from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.manifest import STATE
from megalemur.checkpoint.read import CheckpointReader
from megalemur.config.load import parse_resolved
from megalemur.config.resume import FACTS, Difference, Policy, compare, refusals
from megalemur.config.run import RunConfig

_log = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
_MOVES_LOSSES = ("data.", "optim.", "schedule.", "precision.", "model.")
"""Settings whose change may move losses and gradient norms for good: the guard then has to learn them anew."""


class Change(BaseModel):
    """A setting or fact that a resume changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: NonNegativeInt
    """Steps taken before it: the next one is the first with the new value."""
    setting: str
    old: JsonValue
    new: JsonValue


class Changes(NamedTuple):
    """All changes of a run since its beginning."""

    kept: tuple[Change, ...] = ()
    """Those that the checkpoint knows of."""
    new: tuple[Change, ...] = ()
    """Those of this resume."""

    @property
    def move_losses(self) -> bool:
        """Whether this resume may move losses and gradient norms for good."""
        return any(change.setting.startswith(_MOVES_LOSSES) for change in self.new)

    def to_json(self) -> list[dict[str, Any]]:
        """For trainer/state.json."""
        return [change.model_dump(mode="json") for change in (*self.kept, *self.new)]


def changes_at_resume(config: RunConfig, reader: CheckpointReader, facts: Mapping[str, Any]) -> Changes:
    """Compare the run and this process with what a checkpoint says about its own. Reads small files only.

    Args:
        config: the run that is to be resumed.
        reader: of the checkpoint.
        facts: of this process, as checkpoints record them (FACTS).

    Raises:
        ValueError: lists everything that a resume may not change.
        DamagedCheckpoint: the checkpoint's run file or state cannot be read.
    """
    differences = [*_of_settings(config, reader), *_of_facts(facts, reader.manifest.record)]
    refused = refusals(differences, config.checkpoint.allow_changes)
    if refused:
        listing = "".join(f"\n  - {sentence}" for sentence in refused)
        raise ValueError(
            f"resuming {reader.path} would change what a resume may not change:{listing}\n"
            f"set these back, or start a new run from its weights: checkpoint.start_from={reader.path} with another "
            "checkpoint.directory"
        )
    step = reader.manifest.step
    new = [
        Change(step=step, setting=difference.setting, old=difference.old, new=difference.new)
        for difference in differences
        if difference.rule.policy is not Policy.FREE
    ]
    return Changes(_kept(reader), tuple(new))


def report_changes(changes: Changes) -> None:
    """Say what this resume changes."""
    for change in changes.new:
        _log.info("from step %d on: %s: %s, was %s", change.step + 1, change.setting, change.new, change.old)


def _of_settings(config: RunConfig, reader: CheckpointReader) -> Iterator[Difference]:
    if RUN_FILE not in reader.manifest.files:
        _log.warning("%s carries no %s: its settings cannot be compared", reader.path, RUN_FILE)
        return
    try:
        old = parse_resolved(reader.file(RUN_FILE).decode())
    except ValueError as error:
        raise DamagedCheckpoint(reader.path / RUN_FILE, f"is no run file: {error}") from error
    found = compare(old, config)
    if found.unknown:
        _log.warning("%s has settings that this release does not know: %s", reader.path, ", ".join(found.unknown))
    if found.unset:
        _log.warning("%s lacks settings that have no default: %s", reader.path, ", ".join(found.unset))
    yield from found.differences


def _of_facts(now: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Difference]:
    for name, rule in FACTS.items():
        if name in record and record[name] != now[name]:
            yield Difference(name, record[name], now[name], rule)


def _kept(reader: CheckpointReader) -> tuple[Change, ...]:
    try:
        return tuple(Change.model_validate(change) for change in reader.state.get("changes", ()))
    except (ValidationError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(reader.path / STATE, f"cannot be used: changes: {error}") from error
