"""One bit flipped on one rank in what must be equal on several: found and named."""

from pathlib import Path

from megalemur.checkpoint.exchange import Peers
from megalemur.train.replicas import ReplicaCheck, circles_of
from tests.faults.campaign import Campaign, Trial
from tests.support.poison import flip
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run
from tests.support.training import start, take_steps

_P = "parallel."
_CASES = {
    "replicated optimizer, 2 replicas": (f"{_P}data=2", f"{_P}distributed_optimizer=false"),
    "replicated optimizer, 4 replicas": (f"{_P}data=4", f"{_P}distributed_optimizer=false"),
    "distributed optimizer, parameters": (f"{_P}data=2",),
    "norms over TP2 x PP2": (f"{_P}tensor=2", f"{_P}pipeline=2"),
}


def flip_one(config, culprit: int, number: int, wanted: str) -> tuple[str, list[str], list[str]]:
    """(what was flipped, what was said before, what was said behind it). `number` chooses tensor, element and bit."""
    run = start(config)
    take_steps(run, 1)
    circles = circles_of(run.config, run.place, run.engine.chunks, run.engine.optimizer, run.segments)
    check = ReplicaCheck(run.place, lambda: circles, every=1, steps_taken=0)
    before = [event.text for event in check.compare()]
    mine = sorted((held.name, k, j) for k, circle in enumerate(circles) for j, held in enumerate(circle.held))
    chosen = [entry for entry in mine if wanted in entry[0]]
    name, k, j = chosen[number % len(chosen)]
    if run.place.rank == culprit:
        tensor = circles[k].held[j].tensor
        flip(tensor, number // 7 % tensor.numel(), number // 3 % (8 * tensor.element_size()))
    said = [event.text for event in check.compare()]
    return Peers(run.place.cpu_group).all_gather(name)[culprit], before, said


def trial(_: Path, trial: Trial) -> str:
    """One flip."""
    case = trial.chance.choice(list(_CASES))
    layout = _CASES[case]
    ranks = 4 if "4" in case or "TP2" in case else 2
    wanted = "norm.weight" if "norms" in case else ""
    culprit, number = trial.chance.randrange(ranks), trial.chance.randrange(1 << 40)
    dtype = trial.chance.choice(["fp32", "bf16"])
    config = tiny_run(trial.directory, *layout, f"precision.dtype={dtype}", num_layers=4)
    results = run_ranks(ranks, flip_one, config, culprit, number, wanted, timeout=300)
    name, before, said = results[0]
    assert all(result == results[0] for result in results), "all ranks know the same"
    assert before == [], "a false alarm"
    assert len(said) == 1 and name in said[0] and f"rank {culprit} (" in said[0], (name, culprit, said)
    return f"{case}, {dtype}"


CAMPAIGN = Campaign(
    target=1000,
    what="one bit flipped on one rank in a parameter, master or moment that others hold too",
    passes="found by the next comparison, rank and tensor named, no alarm before",
    prepare=lambda directory: directory,
    trial=trial,
    real_every=0,
)
