"""How much of the training state a process writes, and copies to host memory for it: arithmetic over a run file."""

from megalemur.config.layers import stage_layers
from megalemur.config.model import ModelConfig
from megalemur.config.parallel import ParallelConfig

STATE_BYTES = 12
"""fp32 master and two fp32 moments of a parameter."""


def share_bytes(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Masters and moments that a process of the fullest pipeline stage writes: its even share of the stage.

    Copies on several processes are written once and shared out, with the distributed optimizer or without it. Single
    tensors are not cut for that, so small models are shared out less evenly.
    """
    table, last = model.vocab_size * model.hidden_size, parallel.pipeline - 1
    stages = [count * model.parameters_per_layer for count in stage_layers(model.num_layers, parallel)]
    stages[0] += table
    stages[last] += model.hidden_size + (0 if model.tie_embeddings else table)
    return STATE_BYTES * -(-max(stages) // (parallel.tensor * parallel.data * parallel.context))
