"""Memory as papers count it, to hold their tables against. The planner's own figures are in memory.py."""

from typing import NamedTuple

from megalemur.plan.job import Job


class PaperMemory(NamedTuple):
    """Bytes on one rank of the first pipeline stage."""

    parameters_and_optimizer: float
    activations: float


def korthikanti_2022(job: Job) -> PaperMemory:
    """Memory as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", figure 1.

    18 bytes a parameter (fp16 weight, fp32 gradient, master and two moments, all with their copies: 2 + 4 + 12), 12 h²
    parameters a layer, embeddings left out. Activations of unfused layers with attention dropout, 16-bit: s b h (10 +
    24/t + 5 a s / (h t)) a layer (equation 2); with sequence parallelism the 10 is split too (equation 4); selective
    recompute drops the last term (equation 6). The first stage holds all L layers' worth, times 1 + (p - 1) / (p m)
    with m chunks (section 4.2.3).
    """
    parameters = 12 * job.num_layers * job.hidden_size**2
    t, h = job.tensor, job.hidden_size
    whole = 34 / t if job.sequence_parallel else 10 + 24 / t
    scores = 5 * job.num_attention_heads * job.sequence_length / (h * t)
    a_layer = job.sequence_length * job.micro_batch_size * h * (whole + (scores if job.recompute == "none" else 0))
    waiting = 1 + (job.pipeline - 1) / (job.pipeline * job.chunks) if job.chunks > 1 else 1
    return PaperMemory(18 * parameters / (t * job.pipeline), a_layer * job.num_layers * waiting)
