"""Steps to which nothing happens, under watches drawn tight: whatever they say is a false alarm."""

from pathlib import Path

import orjson

from tests.faults.campaign import Campaign, Trial
from tests.faults.runs import BIG, LAYOUTS, finish, world, write_run
from tests.support.datasets import tokenizer_record, write_dataset
from tests.support.launched import launched
from tests.support.tiny import SHAPE, random_documents, tiny_run

STEPS = 100
"""Of each trial."""
_WATCHED = (
    "watchdog.timeout=10",
    "run.check_replicas_every=1",
    "guard.loss_spike=10",
    "guard.grad_norm_spike=20",
    "optim.learning_rate=3e-4",  # at 1e-3 the large model's gradient norm leaps to six times its median by itself
    "checkpoint.save_every=7",
    "checkpoint.keep=1",
    f"run.steps={2 * STEPS}",
    f"run.stop_at={STEPS}",
)


def trial(_: Path, trial: Trial) -> str:
    """A run that nobody disturbs."""
    chance, vocabulary = trial.chance, SHAPE["vocab_size"]
    for number, name in enumerate(("a", "b")):  # with manifests: without, a warning is due
        documents = random_documents(vocabulary, seed=number)
        write_dataset(trial.directory / name, documents, tokenizer_record(vocab_size=vocabulary))
    layout = chance.choice([name for name in LAYOUTS if world(name) <= (2 if trial.real else 4)])
    dtype = "fp32" if trial.real else chance.choice(["fp32", "bf16"])  # bf16 of this width takes minutes on a CPU
    background = chance.choice(["true", "false"])
    settings = (*LAYOUTS[layout], *_WATCHED, f"precision.dtype={dtype}", f"checkpoint.asynchronous={background}")
    if trial.real:
        said = finish(layout, write_run(trial.directory, *settings, **BIG))
    else:
        with launched(tiny_run(trial.directory, *settings, num_layers=4)) as run:
            assert set(run.codes(600)) == {0}, run.output()
            said = run.output()
    lines = [orjson.loads(line) for line in (trial.directory / "log/metrics.jsonl").read_bytes().splitlines()]
    alarms = [line for line in lines if "event" in line]
    assert f"step {STEPS}/" in said and not alarms, (alarms, said[-2000:])
    assert "WARNING" not in said and "ERROR" not in said, said[-2000:]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    return f"{'launched: ' if trial.real else ''}{layout}, {dtype}"


CAMPAIGN = Campaign(
    target=100,
    what=f"{STEPS} steps to which nothing happens, in layouts of up to 4 ranks; watchdog at 10 s, replicas compared at "
    "every step, spikes watched, saves behind every seventh",
    passes=f"no alarm, no warning, no step skipped: 100 trials are {100 * STEPS:,} clean steps",
    prepare=lambda directory: directory,
    trial=trial,
)
