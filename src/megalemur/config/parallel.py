"""How the model is split. Holds nothing else."""

from pydantic import NonNegativeInt, PositiveInt

from megalemur.config.section import Section


class ParallelConfig(Section):
    """Layout of the processes: tensor x pipeline x context x data, one process a GPU (or one on a CPU)."""

    tensor: PositiveInt = 1
    """Processes that split every layer (TP). Keep inside one node."""
    pipeline: PositiveInt = 1
    """Processes that split the depth (PP)."""
    chunks: PositiveInt = 1
    """Model chunks a pipeline stage; above 1 the interleaved schedule runs (smaller bubble, more messages)."""
    context: PositiveInt = 1
    """Processes that split the sequence (CP). Above 1 needs Transformer Engine."""
    data: PositiveInt = 1
    """Replicas (DP). World size is tensor x pipeline x context x data."""
    sequence: bool | None = None
    """Sequence parallelism: norms and residuals split along the sequence inside TP. Unset: on when tensor > 1."""
    first_stage_layers: PositiveInt | None = None
    """Layers on the first pipeline stage, when its embedding should be paid for. Unset: an even share."""
    last_stage_layers: PositiveInt | None = None
    """Layers on the last pipeline stage, when its output layer should be paid for. Unset: an even share."""
    distributed_optimizer: bool = True
    """Masters and moments are split over DP (ZeRO-1): 6 + 12/DP instead of 18 bytes a parameter."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs. Bits differ from the plain order."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs. Needs distributed_optimizer and
    overlap_grad_reduce."""
    overlap_p2p: bool = False
    """Pipeline messages overlap with compute (interleaved schedule only). CUDA only: wrong under gloo."""
    pad_vocab_to: PositiveInt = 128
    """Each tensor-parallel rank's share of the vocabulary is padded to a multiple of this many rows (whole tiles for
    the matrix units). Padding is masked out of the loss and never stored."""
    bucket_parameters: NonNegativeInt = 0
    """Parameters in one gradient bucket; 0 lets megatron-core choose max(40 M, 1 M x DP)."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline * self.context * self.data

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding in this layout, padding included."""
        multiple = self.pad_vocab_to * self.tensor
        return -(-vocab_size // multiple) * multiple

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1 if self.sequence is None else self.sequence
