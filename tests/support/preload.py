"""What the fork server imports before it forks ranks."""

import gc
import warnings

warnings.filterwarnings("ignore")

import numpy.ma  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch  # noqa: E402, F401

import megalemur.cli.main  # noqa: E402
import megalemur.plan.lint.run  # noqa: E402
import megalemur.supervise.run  # noqa: E402
import megalemur.train.run  # noqa: E402
import megalemur.train.saving  # noqa: E402
import megalemur.train.setup  # noqa: E402, F401

# a collection in a forked rank would write to the header of every object, and copy the pages on which they are
gc.collect()
gc.freeze()
