"""How large a job is, to the first digit: what decides whether a cost is worth a sentence.

Not the planner's time model: one figure for every GPU, so that a rule needs no description of a cluster.
"""

from typing import Any

from megalemur.observe.throughput import flops_per_token

FLOPS_PER_SECOND = 4e14
"""Of one GPU: 40 % of an H100's dense bf16 peak. Older GPUs take longer."""
CHECKPOINT_BYTES = 14
"""A parameter in a whole checkpoint: fp32 master and two moments, 2 bytes of Hugging Face weight."""
WRITE_BYTES_PER_SECOND = 1e9
"""Of one node to a shared file system."""
COSTLY_GPU_HOURS = 1.0
"""What is lost below that is not worth a warning."""
GIB = 2**30


def step_seconds(model: Any, parallel: Any, data: Any) -> float:
    """Seconds of a step on H100s at 40 % of their peak."""
    tokens = data.global_batch_size * data.sequence_length
    flops = flops_per_token(model, data.sequence_length).causal_attention * tokens
    return flops / (parallel.world_size * FLOPS_PER_SECOND)


def gpu_hours(run: Any, model: Any, parallel: Any, data: Any) -> float:
    """GPU-hours of the whole run."""
    return run.steps * step_seconds(model, parallel, data) * parallel.world_size / 3600


def is_costly(run: Any, model: Any, parallel: Any, data: Any, *, share: float = 1.0) -> bool:
    """Whether that share of the run is worth a warning."""
    return share * gpu_hours(run, model, parallel, data) >= COSTLY_GPU_HOURS


def checkpoint_bytes(model: Any) -> int:
    """Bytes of one whole checkpoint."""
    return CHECKPOINT_BYTES * model.parameters


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"
