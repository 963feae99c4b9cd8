"""Jobs for the tests of the time model: Llama presets in small layouts."""

from pathlib import Path
from typing import Any

from megalemur.plan.cluster import Cluster, load_cluster
from megalemur.plan.job import Job, Kernels
from tests.unit.plan.jobs import job_of

ROOT = Path(__file__).parents[3]
H100, A100 = (
    load_cluster(str(ROOT / "launch" / "clusters" / f"{name}.yaml")) for name in ("h100_sxm", "a100_80gb_sxm")
)
ENGINE = Kernels(fused_swiglu=True, fused_norm=True, fused_cross_entropy=True, attention_generation=3)


def job(preset: str = "llama2_70b", *, sequence: int = 4096, micro: int = 1, batch: int = 128, **settings: Any) -> Job:
    """A preset in a layout; without overlap, as a run file that does not ask for it."""
    quiet = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    batches = {"sequence_length": sequence, "micro_batch_size": micro, "global_batch_size": batch}
    return job_of(preset, **{**quiet, **batches, "kernels": ENGINE, **settings})


def with_figures(cluster: Cluster, **figures: float) -> Cluster:
    """A cluster with other figures."""
    return cluster.model_copy(update=figures)
