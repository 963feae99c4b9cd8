"""What the fork server imports before it forks ranks."""

import warnings

warnings.filterwarnings("ignore")

import numpy  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch  # noqa: E402, F401

import megalemur.train.saving  # noqa: E402
import megalemur.train.setup  # noqa: E402, F401
