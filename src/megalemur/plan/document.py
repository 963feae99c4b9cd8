"""A plan for machines: the JSON document and its schema. docs/plan.md says how to read it.

Numbers are SI: bytes, seconds, tokens. Fields are only ever added; one that changes its meaning raises `version`.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from megalemur.plan.better import Better
from megalemur.plan.memory import StageMemory
from megalemur.plan.search import Candidate, overrides
from megalemur.plan.whole import Plan


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StagePart(_Part):
    """Memory of a rank of one pipeline stage at its fullest moment, bytes."""

    stage: int
    layers: tuple[int, ...]
    """In each chunk."""
    parameter_count: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass."""
    logits: int
    working: int
    """Of the operation that runs at the peak."""
    buffers: int
    slack: int
    """Assumed: allocator and CUDA context."""
    total: int
    """Sum of all the above."""
    fits: bool
    in_flight: int
    """Micro-batches (times chunks) whose activations are held at the peak."""
    peak_backward: bool
    """Whether the peak is in a backward operation."""
    peak_chunk: int
    peak_micro_batch: int
    peak_unit: str
    """Part of that chunk: embedding, layer, output layer …; update: the peak is in the optimizer, behind the operation
    that is named."""


class TimePart(_Part):
    """A step, seconds."""

    seconds: float
    breakdown: dict[str, float]
    """By kind on the critical stage; sums to seconds."""
    critical_stage: int
    tokens_per_second_per_gpu: float
    mfu_full_attention: float
    mfu_causal_attention: float


class SavesPart(_Part):
    """What failures and saves cost."""

    mean_seconds_between_failures: float | None
    """None: nothing fails."""
    save_seconds: float
    """Training stands still for one save."""
    written_behind_seconds: float
    restart_seconds: float
    every_steps: int | None
    goodput: float
    best_every_steps: int | None
    best_goodput: float


class CheckpointPart(_Part):
    """One checkpoint."""

    whole_bytes: int
    weights_bytes: int
    rank_bytes: int
    whole_seconds: float


class LayoutPart(_Part):
    """A layout that the search found."""

    seconds: float
    peak_bytes: int
    overrides: list[str]
    """section.key=value, to write behind the run file."""


class SearchPart(_Part):
    """What the search found."""

    gpus: int
    tried: int
    fitting: int
    best: list[LayoutPart]
    """The fastest, best first; at most 20."""
    pareto: list[LayoutPart]
    """No other layout is both faster and smaller; from the fastest to the smallest."""


class FindingPart(_Part):
    """What lint says."""

    rule: str
    level: Literal["error", "warning"]
    text: str


class PlanDocument(_Part):
    """All that `megalemur plan --json` writes."""

    version: Literal[1] = 1
    run: str
    cluster: str
    gpu: str
    gpu_memory_bytes: int
    gpus: int
    parameters: int
    tokens: int
    """Of the whole run."""
    tokens_per_step: int
    tokens_per_day: float
    fits: bool
    memory: list[StagePart]
    time: TimePart
    days: float
    gpu_hours: float
    checkpoint: CheckpointPart
    saves: SavesPart
    findings: list[FindingPart]
    """Errors first."""
    search: SearchPart | None = None


def document(plan: Plan, better: Better | None = None) -> PlanDocument:
    """The document of a plan, and of a search beside it."""
    step, cost = plan.step, plan.checkpoint
    return PlanDocument(
        run=plan.config.run.name,
        cluster=plan.cluster.name,
        gpu=plan.cluster.gpu,
        gpu_memory_bytes=plan.cluster.memory_bytes,
        gpus=plan.job.world_size,
        parameters=plan.config.model.parameters,
        tokens=plan.tokens,
        tokens_per_step=plan.job.tokens_per_step,
        tokens_per_day=plan.tokens_per_day,
        fits=plan.fits,
        memory=[_stage(stage) for stage in plan.memory],
        time=TimePart(**{name: getattr(step, name) for name in TimePart.model_fields}),
        days=plan.budget.days,
        gpu_hours=plan.budget.gpu_hours,
        checkpoint=CheckpointPart(
            whole_bytes=cost.whole, weights_bytes=cost.weights, rank_bytes=cost.rank, whole_seconds=cost.whole_seconds
        ),
        saves=_saves(plan),
        findings=[FindingPart(**finding._asdict()) for finding in plan.findings],
        search=None if better is None else _search(better),
    )


def _stage(stage: StageMemory) -> StagePart:
    op = stage.peak_op
    peak = {"peak_backward": op.backward, "peak_chunk": op.chunk, "peak_micro_batch": op.micro_batch}
    same = {name: getattr(stage, name) for name in StagePart.model_fields if name not in peak}
    return StagePart(**same, **peak)


def _saves(plan: Plan) -> SavesPart:
    saves, reliability = plan.saves, plan.saves.reliability
    mean = reliability.between_failures
    return SavesPart(
        mean_seconds_between_failures=None if mean == float("inf") else mean,
        save_seconds=reliability.save,
        written_behind_seconds=reliability.written_behind,
        restart_seconds=reliability.restart,
        every_steps=saves.every,
        goodput=saves.kept,
        best_every_steps=saves.best_every,
        best_goodput=saves.best_kept,
    )


def _layout(candidate: Candidate) -> LayoutPart:
    return LayoutPart(seconds=candidate.seconds, peak_bytes=candidate.peak_bytes, overrides=overrides(candidate.job))


def _search(better: Better) -> SearchPart:
    candidates = better.found.candidates
    return SearchPart(
        gpus=better.gpus,
        tried=better.found.tried,
        fitting=len(candidates),
        best=[_layout(candidate) for candidate in candidates[:20]],
        pareto=[_layout(candidate) for candidate in better.front],
    )


def plan_schema() -> dict[str, Any]:
    """JSON schema of the document."""
    return PlanDocument.model_json_schema()
