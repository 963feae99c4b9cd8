"""What the fork server imports before it forks ranks."""

import warnings

warnings.filterwarnings("ignore")

import megatron.core.pipeline_parallel  # noqa: E402, F401
import torch  # noqa: E402, F401

import megalemur.train.setup  # noqa: E402, F401
import megalemur.train.saving  # noqa: E402, F401
