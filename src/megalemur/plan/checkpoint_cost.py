"""What a checkpoint of a job weighs, and how long writing it takes: arithmetic, as in docs/checkpoints.md."""

from dataclasses import dataclass

from megalemur.config.run import RunConfig
from megalemur.config.state_bytes import STATE_BYTES, share_bytes

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class CheckpointCost:
    """Bytes of one checkpoint, and seconds to write it."""

    whole: int
    """Hugging Face weights, masters and moments."""
    weights: int
    """Hugging Face weights alone: what keep_weights_every leaves behind."""
    rank: int
    """Masters and moments that a rank of the fullest stage writes; as much host memory holds them while a save runs in
    the background."""
    whole_seconds: float
    """To write everything, at the given bandwidth of the file system."""
    weights_seconds: float


def checkpoint_cost(config: RunConfig, *, disk_bytes_per_second: float, source_width: int = 2) -> CheckpointCost:
    """Size and duration of a save.

    Args:
        config: the run.
        disk_bytes_per_second: what the file system takes from all ranks together.
        source_width: bytes a weight of the checkpoint that the run starts from, for checkpoint.export_dtype=source.

    Raises:
        ValueError: the bandwidth is not above zero.
    """
    if not disk_bytes_per_second > 0:
        raise ValueError(f"a disk that takes {disk_bytes_per_second} bytes a second never finishes; give more than 0")
    model, chosen = config.model, config.checkpoint.export_dtype
    scratch = _WIDTH[config.precision.dtype]
    width = _WIDTH.get(chosen, source_width if config.checkpoint.start_from is not None else scratch)
    weights = model.parameters * width
    whole = weights + model.parameters * STATE_BYTES
    return CheckpointCost(
        whole=whole,
        weights=weights,
        rank=share_bytes(model, config.parallel),
        whole_seconds=whole / disk_bytes_per_second,
        weights_seconds=weights / disk_bytes_per_second,
    )
