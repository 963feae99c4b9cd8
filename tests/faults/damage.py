"""Damage in any file of the newest of two checkpoints: found before a step is trained on it, the older one loaded."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from megalemur.checkpoint.errors import DamagedCheckpoint
from megalemur.checkpoint.load import load_pieces
from megalemur.checkpoint.read import CheckpointReader
from megalemur.checkpoint.search import Search
from megalemur.parallel.state import KINDS, Piece, whole
from tests.faults.campaign import Campaign, Trial
from tests.faults.resume_same_layout import finish
from tests.faults.runs import BIG, write_run
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import train_and_save, whole_state

OLD, NEW = 2, 3


class Shared(NamedTuple):
    """Two runs with a checkpoint of step 2 and one of step 3: a small one, and one that the launcher wrote."""

    small: Path
    big: Path
    state: dict[str, torch.Tensor]
    """What step 2 of the small one holds."""


def prepare(directory: Path) -> Shared:
    """Train both."""
    small, big = directory / "small", directory / "big"
    for path in (small, big):
        path.mkdir()
    for step in (OLD, NEW):
        run_ranks(1, train_and_save, tiny_run(small, f"run.stop_at={step}", num_layers=2))
        finish("one process", write_run(big, f"run.stop_at={step}", **BIG))
    return Shared(small, big, whole_state(at(small, OLD)))


def at(directory: Path, step: int) -> Path:
    """A checkpoint."""
    return directory / "checkpoints" / f"step_{step:06d}"


def trial(shared: Shared, trial: Trial) -> str:
    """Damage one file, load."""
    source = shared.big if trial.real else shared.small
    run = trial.directory / "run"
    # links for what nobody writes to; the file that is damaged becomes a copy
    shutil.copytree(source, run, copy_function=os.link)
    files = sorted(path for path in at(run, NEW).rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    # every file as often as another: by bytes, the small ones would never be hit
    path = trial.chance.choice([path for path, size in zip(files, sizes, strict=True) if size])
    how = damage(path, trial.chance)
    name = path.relative_to(at(run, NEW))
    if trial.real:
        _launched(run, shared.big)
    else:
        _loaded(run, shared.state, str(name), how)
    return f"{'launched, ' if trial.real else ''}{how}, {re.sub('[0-9]+', 'N', name.name)}"


def damage(path: Path, chance) -> str:
    """Flip a bit, cut the file, or zero a block of it."""
    data = bytearray(path.read_bytes())
    how = chance.choice(["bit", "bit", "cut", "zeros"])
    if how == "zeros":
        start = chance.randrange(len(data))
        stop = min(len(data), start + chance.choice([1, 16, 512, 4096]))
        if not any(data[start:stop]):  # zeros already: nothing would change
            how = "bit"
        data[start:stop] = bytes(stop - start)
    if how == "bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    if how == "cut":
        del data[chance.randrange(len(data)) :]
    path.unlink()
    path.write_bytes(data)
    return how


def _loaded(run: Path, expected: dict[str, torch.Tensor], name: str, how: str) -> None:
    """With the real code, in this process."""
    search = Search(run / "checkpoints")
    while True:
        reader = search.next()
        assert isinstance(reader, CheckpointReader)
        pieces = [
            Piece(name, kind, shape, whole(shape), torch.zeros(shape))
            for kind in KINDS
            for name, shape in reader.shapes.items()
        ]
        try:
            load_pieces(reader, pieces, shapes=reader.shapes)
            break
        except DamagedCheckpoint as error:
            search.pass_over(reader, error)
    assert reader.path == at(run, OLD), f"{name}, {how}: {reader.path} was loaded"
    assert len(search.passed_over) == 1 and at(run, NEW).name in str(search.passed_over[0])
    assert reader.state["run"]["step"] == OLD
    for piece in pieces:
        assert torch.equal(piece.tensor, expected[f"{piece.kind}/{piece.name}"]), piece.name


def _launched(run: Path, source: Path) -> None:
    """Through the launcher: the run goes on from the older one, and its next step is that of before."""
    before = (source / "log/metrics.jsonl").read_text()
    run_file = run / "run.yaml"
    run_file.unlink()  # a link
    run_file.write_text((source / "run.yaml").read_text().replace(str(source), str(run)))
    for path in (run / "log").rglob("*"):
        if path.is_file():
            path.unlink()
    (run / "run.log").unlink()
    finish("one process", run_file)
    said = run_file.with_suffix(".log").read_text()
    assert "passed over a checkpoint" in said and f"{at(run, OLD).name}, at step {OLD}" in said, said[-2000:]
    losses = [re.findall(rf'"step":{NEW},.*?"loss":([0-9.]+)', text) for text in (before, read_metrics(run))]
    assert losses[0] == losses[1] != [], losses


def read_metrics(run: Path) -> str:
    """Of a run."""
    return (run / "log/metrics.jsonl").read_text()


CAMPAIGN = Campaign(
    target=10_000,
    what="a bit flipped, a file cut, a block of zeros in any file of the newest of two checkpoints",
    passes="found before a step is trained on it, and the older one is loaded, to the bit",
    prepare=prepare,
    trial=trial,
)
