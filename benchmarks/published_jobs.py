"""The published runs as jobs: what each row's source says of its kernels, and what plausible settings a gap may hide.

Errors are averaged within a configuration first (one job at several GPU counts), then within a family (one source),
then over families. A setting that a source does not state is scored at the midpoint of the predictions of all plausible
settings; where these span more than 10 % about their midpoint, the slowest are left out first: published runs are
tuned.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from megalemur.plan.cluster import Cluster, load_cluster
from megalemur.plan.constants import Constants
from megalemur.plan.job import Job, Kernels
from megalemur.plan.schedule import warm_up
from megalemur.plan.step_time import TimeModel

PUBLISHED = Path(__file__).parent / "published"
WIDEST = 0.1
"""Largest half-width of the range of predictions for one row, as a share of its midpoint."""

_ENGINE = Kernels(
    fused_swiglu=True,
    fused_norm=True,
    fused_cross_entropy=True,
    attention_generation=3,
    tensor_overlap="full",
)
_UNFUSED = Kernels(flash_attention=False, fused_norm=True, dropout=True, biases=True, split_messages=True)
_CLUSTERS = {
    "H100": "h100_sxm",
    "A100": "a100_80gb_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
    "GB200": "gb200_nvl72",
}


Errors = dict[str, dict[tuple[object, ...], list[float]]]
"""Relative errors of rows, by family and configuration."""


@dataclass(frozen=True)
class Row:
    """A published step, and the jobs that it may have been."""

    source: str
    model: str
    gpus: int
    seconds: float
    cluster: str
    jobs: tuple[Job, ...]

    @property
    def family(self) -> str:
        """Rows of one family share software and hardware."""
        return self.source

    @property
    def configuration(self) -> tuple[object, ...]:
        """Rows of one configuration differ in the number of replicas only."""
        return self.source, self.model, self.jobs[0].precision, self.jobs[0].recompute, self.cluster


@dataclass(frozen=True)
class Trial:
    """A job that was tried, and whether it ran or was out of memory."""

    model: str
    cluster: str
    job: Job
    ran: bool


def _table(name: str | Path) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows(name: str | Path) -> list[Row]:
    """The rows of a table of times in benchmarks/published, or anywhere else with its whole path."""
    return [_row(values) for values in _table(name)]


def trials(name: str) -> list[Trial]:
    """The rows of a table that says which jobs ran."""
    return [
        Trial(
            model=values["model"],
            cluster=_CLUSTERS[values["gpu"]],
            job=_job(values, int(values["micro_batch"]), int(values["virtual_chunks"]), values["recompute"]),
            ran=values["ran"] == "1",
        )
        for values in _table(name)
    ]


def _row(values: dict[str, str]) -> Row:
    jobs = tuple(_plausible(values))
    if len(jobs) > 1:
        jobs = tuple(job for job in jobs if _fits(job))
    assert jobs, f"{values['source']}, {values['model']}: no plausible setting fits into memory"
    return Row(
        source=values["source"],
        model=values["model"],
        gpus=int(values["gpus"]),
        seconds=float(values["step_seconds"]),
        cluster=_CLUSTERS[values["gpu"]],
        jobs=jobs,
    )


def _plausible(values: dict[str, str]) -> Iterator[Job]:
    """Jobs for all values of what is not stated."""
    batch = int(values["global_batch"]) // int(values["dp"])
    depth, layers = int(values["pp"]), int(values["num_layers"])
    for micro in _choices(values["micro_batch"], (1, 2, 4, 8)):
        if batch % micro:
            continue
        for chunks in _choices(values["virtual_chunks"], range(1, layers // depth + 1) if depth > 1 else (1,)):
            stated = values["virtual_chunks"] != "?"
            if (layers % (depth * chunks) and not stated) or (chunks > 1 and batch // micro % depth):
                continue
            # SC21 ran the interleaved schedule; megatron-core's README says that pipeline messages were overlapped,
            # which only that schedule does
            if not stated and depth > 1 and chunks == 1:
                continue
            for recompute in ("none", "selective") if values["recompute"] == "?" else (values["recompute"],):
                yield _job(values, micro, chunks, recompute)


def _choices(given: str, plausible: Iterable[int]) -> tuple[int, ...]:
    return tuple(plausible) if given == "?" else (int(given),)


def _spread(layers: int, depth: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """Layers on each [stage][chunk]. Llama-3.1-405B's 126 spread as 128: embedding and output layer are two of them."""
    parts = depth * chunks
    counts = [layers // parts] * parts if layers % parts == 0 else [(layers + 2) // parts] * parts
    if layers % parts:
        assert (layers + 2) % parts == 0, f"{layers} layers do not spread over {parts} chunks"
        counts[0] -= 1
        counts[-1] -= 1
    return tuple(tuple(counts[chunk * depth + stage] for chunk in range(chunks)) for stage in range(depth))


def _is_early(values: dict[str, str]) -> bool:
    """GPT on A100 by Megatron-LM of 2021 and 2022: no fused attention, no distributed optimizer. Llamas came later."""
    return values["gpu"] == "A100" and values["gated"] == "0" and "llm-foundry" not in values["source"]


def _kernels(values: dict[str, str]) -> Kernels:
    """What a row's layers ran on."""
    source = values["source"]
    if "llm-foundry" in source:
        return Kernels(fused_norm=True, fused_cross_entropy=True, biases=True)
    if "Hagemann" in source:
        # torch's silu and product; no message of their software is asynchronous
        kernels = Kernels(fused_norm="RMSNorm kernel" in source, tensor_overlap="none")
        return replace(kernels, flash_attention="FlashAttention" in source)
    if _is_early(values):
        return replace(_UNFUSED, tensor_overlap="backward" if "Korthikanti" in source else "none")
    if values["gpu"] == "A100":
        return replace(_ENGINE, attention_generation=2, fused_cross_entropy=False, tensor_overlap="backward")
    older = ("NeMo 24." in source or "megatron-core 0.8" in source) and "cuDNN" not in values["note"]
    return replace(_ENGINE, attention_generation=2 if older else 3)


def _job(values: dict[str, str], micro: int, chunks: int, recompute: str) -> Job:
    source, tensor = values["source"], int(values["tp"])
    hagemann, korthikanti = "Hagemann" in source, "Korthikanti" in source
    early, kernels = _is_early(values), _kernels(values)
    heads, hidden, vocab = int(values["heads"]), int(values["hidden_size"]), int(values["vocab"])
    padding = -vocab % (128 * tensor)
    return Job(
        num_layers=int(values["num_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=int(values["ffn_size"]),
        num_attention_heads=heads,
        num_query_groups=int(values["kv_groups"]),
        head_dim=hidden // heads,
        vocab_size=vocab + padding,
        vocab_padding=padding,
        gated=values["gated"] == "1",
        tie_embeddings=values["model"].startswith(("sc21", "recompute", "mcore", "gpt3", "mt-nlg", "mpt")),
        sequence_length=int(values["sequence"]),
        micro_batch_size=micro,
        global_batch_size=int(values["global_batch"]),
        tensor=tensor,
        pipeline=int(values["pp"]),
        chunks=chunks,
        context=int(values["cp"]),
        data=int(values["dp"]),
        sequence_parallel=tensor > 1
        and (not early or korthikanti)
        and not values["note"].startswith("no sequence parallelism"),
        layers=_spread(int(values["num_layers"]), int(values["pp"]), chunks),
        distributed_optimizer=not early,
        overlap_grad_reduce=not early and not hagemann,
        overlap_param_gather=not early and not hagemann,
        overlap_p2p=not early and chunks > 1,
        precision=values["precision"],  # type: ignore[arg-type]
        # NVIDIA's recipes reduce gradients in bf16 (grad_reduce_in_fp32 is off); Megatron-LM accumulates bf16's in fp32
        grads_in_fp32="Megatron-LM" in source,
        recompute=recompute,  # type: ignore[arg-type]
        kernels=kernels,
    )


def _fits(job: Job) -> bool:
    """Whether the first stage can fit into 80 GB: published runs did not run out of memory.

    Only as exact as choosing among micro-batches needs: 34 bytes an activation element and layer (Korthikanti et al.
    2022, equations 2 and 4; without their scores where attention is fused or recomputed).
    """
    parameters = sum(job.layers[0]) * job.layer_parameters + job.vocab_size * job.hidden_size
    state = parameters / job.tensor * (6 + 12 / job.data if job.distributed_optimizer else 16)
    flight = warm_up(0, pipeline=job.pipeline, chunks=job.chunks, micro_batches=job.micro_batches) + 1
    element = job.tokens_per_rank * job.hidden_size
    width = job.tensor if job.sequence_parallel else 1
    layer = element * (10 / width + 24 / job.tensor)
    if job.recompute == "full":
        scores = 5 * job.num_attention_heads / job.tensor * job.micro_batch_size * job.sequence_length**2
        held = flight * max(job.layers[0]) * 2 * element + layer + scores
    else:
        held = flight * max(job.layers[0]) * layer
    logits = job.tokens_per_rank * job.vocab_size / job.tensor * 6 if job.pipeline == 1 else 0
    return state + held + logits < 76e9


def predicted(row: Row, model: TimeModel) -> float:
    """Seconds at the midpoint of the plausible settings' range, narrowed to the faster settings if it is too wide."""
    times = sorted(model.predict(job).seconds for job in row.jobs)
    widest = times[0] * (1 + WIDEST) / (1 - WIDEST)
    times = [seconds for seconds in times if seconds <= widest]
    return (times[0] + times[-1]) / 2


def errors(table: list[Row], constants: Constants) -> Errors:
    """Relative errors of the predictions, by family and configuration; above 0 where a step was shorter than said."""
    clusters: dict[str, Cluster] = {row.cluster: load_cluster(row.cluster) for row in table}
    models = {name: TimeModel(cluster, constants) for name, cluster in clusters.items()}
    found: Errors = {}
    for row in table:
        error = predicted(row, models[row.cluster]) / row.seconds - 1
        found.setdefault(row.family, {}).setdefault(row.configuration, []).append(error)
    return found


def mean_error(found: Errors) -> float:
    """Mean absolute error: within configurations, then within families, then over families."""
    return fmean(fmean(fmean(map(abs, errors)) for errors in family.values()) for family in found.values())


def configuration_error(found: Errors) -> float:
    """Mean absolute error within configurations, then over all configurations alike."""
    return fmean(fmean(map(abs, errors)) for family in found.values() for errors in family.values())


def worst_error(found: Errors) -> float:
    """Largest absolute error of a row."""
    return max(abs(error) for family in found.values() for errors in family.values() for error in errors)
