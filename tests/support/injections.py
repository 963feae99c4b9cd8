"""Faults inside ranks of the real launcher: a poisoned step, a flipped bit, death at an effect on the disk."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.support.poison import bits, flip, poison
from tests.unit.checkpoint.small import kill_at_effect

_ROOT = Path(__file__).parents[2]
_NAME = "MEGALEMUR_TEST_INJECTION"


def environment(kind: str, **arguments: Any) -> dict[str, str]:
    """For a launcher whose ranks are to meet an injection.

    Args:
        kind: `poison`, `flip` or `die`.
        arguments: of the class of that name below.
    """
    before = os.environ.get("PYTHONPATH")
    path = [str(_ROOT / "tests/support/injected"), str(_ROOT), *([before] if before else [])]
    return {_NAME: json.dumps([kind, arguments]), "PYTHONPATH": ":".join(path)}


def install(loop: ModuleType) -> None:
    """In a rank, behind the import of megalemur.train.loop."""
    kind, arguments = json.loads(os.environ[_NAME])
    original = loop.run_loop

    def run_loop(run: Any, observers: Any, stop: Any) -> bool:
        return original(run, [_KINDS[kind](run, **arguments), *observers], stop)

    loop.run_loop = run_loop


class _Injection:
    def __init__(self, run: Any, rank: int):
        self.run, self.here = run, run.place.rank == rank

    def after_step(self, report: Any) -> None:
        """Most wait for a step."""

    def at_save(self, step: int, path: Path, seconds: float) -> None:
        """Nothing."""

    def at_end(self) -> None:
        """Nothing."""


class Poison(_Injection):
    """Makes something of one step NaN or infinite; every rank writes down whether a bit of its state changed in it."""

    def __init__(self, run: Any, rank: int, step: int, where: str, value: str):
        super().__init__(run, rank)
        self.step, self.where, self.value = step, where, float(value)
        self.before: list[torch.Tensor] = []
        self.handle: Any = None

    def after_step(self, report: Any) -> None:
        """Poison behind the step before, look and heal behind the step."""
        if report.step == self.step - 1:
            self.before = bits(self.run)
            self.handle = poison(self.run, self.where, self.value) if self.here else None
        if report.step == self.step:
            if self.handle is not None:
                self.handle.remove()
            same = all(torch.equal(a, b) for a, b in zip(self.before, bits(self.run), strict=True))
            place = self.run.config.log.directory / f"same-{self.run.place.rank}.json"
            place.write_text(json.dumps({"same": same, "skipped": report.skipped}))


class Flip(_Injection):
    """Flips a bit of a master behind a step; writes down which one."""

    def __init__(self, run: Any, rank: int, step: int, wanted: str, number: int, bit: int):
        super().__init__(run, rank)
        self.step, self.wanted, self.number, self.bit = step, wanted, number, bit

    def after_step(self, report: Any) -> None:
        """Once."""
        if report.step != self.step or not self.here:
            return
        pieces = [p for p in self.run.pieces() if p.kind == "master" and p.name.endswith(self.wanted)]
        piece = pieces[self.number % len(pieces)]
        flip(piece.tensor, self.number // 7 % piece.tensor.numel(), self.bit)
        (self.run.config.log.directory / "flipped.json").write_text(json.dumps(piece.name))


class Die(_Injection):
    """Ends the process before or behind its n-th effect on the disk, counted from the beginning of the loop."""

    def __init__(self, run: Any, rank: int, effect: int, behind: bool):
        super().__init__(run, rank)
        if self.here:
            kill_at_effect(effect, behind=behind)


_KINDS = {"poison": Poison, "flip": Flip, "die": Die}
