"""docs/reliability.md out of the recorded results of the campaigns."""

from collections import Counter
from pathlib import Path

from tests.faults.campaign import NAMES, RESULTS, Batch, Campaign, load, read_batches

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_HEAD = """# Reliability: what was tried

Each row is a campaign: so many trials of one promise. The table is written from `tests/faults/results/` by
`python -m tests.faults.campaign --write`; a run adds its trials to those of before:

```
make faults CAMPAIGN=kills N=100 SEED=1
```

`make faults` alone makes a tenth of each campaign, an hour in all. "Real" trials have a state of 50 MB or more and go
through the launcher, or, where the row says so, through ranks that were forked; the others use processes forked from a
server and a small state. Everything ran on CPU under gloo; nothing here has run on a GPU.

| campaign | what is done | what must hold | trials of | failed | real | trials a second |
|---|---|---|---|---|---|---|
"""


def render(results: Path = RESULTS) -> str:
    """The whole page."""
    rows = {name: (load(name), read_batches(name, results)) for name in NAMES}
    table = "".join(_row(name, *row) for name, row in rows.items())
    spreads = "".join(_spread(name, batches) for name, (_, batches) in rows.items() if batches)
    failures = "".join(_failures(name, batches) for name, (_, batches) in rows.items())
    return f"{_HEAD}{table}\n## Where the trials hit\n\n{spreads or 'No trial yet.'}\n{failures}"


def _row(name: str, campaign: Campaign, batches: list[Batch]) -> str:
    trials, seconds = sum(batch.trials for batch in batches), sum(batch.seconds for batch in batches)
    failed, real = sum(len(batch.failures) for batch in batches), sum(batch.real for batch in batches)
    count = f"{trials:,} of {campaign.target:,}" + ("" if trials >= campaign.target else ", **not reached yet**")
    rate = f"{trials / seconds:.2g}" if seconds else "-"
    return f"| {name} | {campaign.what} | {campaign.passes} | {count} | {failed:,} | {real:,} | {rate} |\n"


def _spread(name: str, batches: list[Batch]) -> str:
    total = sum((Counter(batch.spread) for batch in batches), Counter())
    days = sorted({batch.when[:10] for batch in batches})
    facts = "; ".join(f"{key} {value}" for key, value in batches[-1].facts.items())
    hit = ", ".join(f"{word} {count:,}" for word, count in sorted(total.items()))
    return f"- **{name}** ({days[0]} to {days[-1]}; {facts}): {hit}\n"


def _failures(name: str, batches: list[Batch]) -> str:
    said = [(batch.seed, failure) for batch in batches for failure in batch.failures]
    if not said:
        return ""
    reasons: dict[tuple[int, str], list[int]] = {}
    for seed, failure in said:
        reasons.setdefault((seed, failure.get("mended", "not explained yet")), []).append(failure["trial"])
    lines = "".join(
        f"- seed {seed}, trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {why}\n"
        for (seed, why), numbers in reasons.items()
    )
    return f"\n## Failed trials of {name}\n\n{lines}"


def write() -> None:
    """Write the page."""
    PAGE.write_text(render())
