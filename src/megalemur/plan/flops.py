"""Model FLOPs of a job, in the conventions of observe/throughput.py, for models with two matrices in the feed-forward
too."""

from megalemur.observe.throughput import FlopsPerToken
from megalemur.plan.job import Job


def flops_per_token(job: Job) -> FlopsPerToken:
    """FLOPs a token, forward and backward: 6 (matrices + output layer) + 12 or 6 L q s, q the width of all heads.

    Recompute and padding are work, not use, and count nothing.
    """
    layer = job.layer_parameters - 2 * job.hidden_size  # the norms' weights multiply no matrix
    vocab = job.vocab_size - job.vocab_padding
    matrices = 6 * (job.num_layers * layer + vocab * job.hidden_size)
    scores = 6 * job.num_layers * job.num_attention_heads * job.head_dim * job.sequence_length
    return FlopsPerToken(full_attention=matrices + 2 * scores, causal_attention=matrices + scores)
