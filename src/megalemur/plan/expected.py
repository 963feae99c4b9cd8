"""What a plan says of a run on the GPUs that it has found itself on, for training to hold its own figures against."""

from megalemur.config.run import RunConfig
from megalemur.observe.expectation import Expectation
from megalemur.plan.cluster import cluster_with
from megalemur.plan.constants import fitted
from megalemur.plan.job import Job
from megalemur.plan.memory import memory_of
from megalemur.plan.step_time import predict


def expectation(config: RunConfig, gpu: str) -> Expectation | None:
    """Step time and memory peaks as planned.

    Args:
        config: the run.
        gpu: as CUDA names it.

    Returns:
        None where nothing is known of such a GPU, or the plan says that it cannot run this.
    """
    cluster = cluster_with(gpu)
    job = Job.of(config)
    if cluster is None or (job.precision == "fp8" and cluster.peak_teraflops_fp8 is None):
        return None
    step = predict(job, cluster, fitted(), exact=True)
    # what tensors take, which is what torch counts: context and fragmentation are in no counter of its own
    return Expectation(step.seconds, tuple(stage.traced for stage in memory_of(job)), cluster.name)
