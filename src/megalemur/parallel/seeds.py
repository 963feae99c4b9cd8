"""Random numbers as a function of (seed, step, coordinates): a resume has no generator state to restore."""

import hashlib

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def step_seed(seed: int, step: int, pp_rank: int, dp_rank: int) -> int:
    """A 31-bit seed for one step of one pipeline stage of one replica.

    Tensor-parallel ranks share it: megatron-core derives their own streams from it, and keeps the common one equal.
    """
    key = f"{seed}/{step}/{pp_rank}/{dp_rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") & 0x7FFFFFFF


def seed_step(seed: int, step: int, pp_rank: int, dp_rank: int) -> None:
    """Set every generator of this process for the given step."""
    model_parallel_cuda_manual_seed(step_seed(seed, step, pp_rank, dp_rank))
