"""The plan of the house, kept: who imports whom, who owns which part of megatron-core, how large things may grow."""

from pathlib import Path

import pytest

from tests.support.architecture import (
    MAX_FILE_LINES,
    MAY_IMPORT,
    Source,
    badly_named,
    many_parameters,
    oversized,
    sources,
    undocumented,
    wrong_owners,
    wrong_rooms,
)

ROOT = Path(__file__).parents[2]
SOURCES = sources(ROOT)
CHECKERS = (wrong_rooms, wrong_owners, oversized, badly_named, undocumented)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_source_keeps_the_rule(checker):
    problems = [problem for source in SOURCES for problem in checker(source)]
    assert not problems, "\n".join(problems)


def test_every_room_is_known_and_seen():
    rooms = {source.room for source in SOURCES} - {"megalemur"}
    assert rooms <= set(MAY_IMPORT)
    assert {"cli", "train", "model", "data", "optim", "checkpoint"} <= rooms
    assert {"parallel", "observe", "supervise", "config"} <= rooms
    assert len(SOURCES) > 60


def test_more_than_six_parameters_are_for_command_lines_only():
    # typer reads a command's options from the parameters of its function
    wide = [problem for source in SOURCES for problem in many_parameters(source, 6)]
    command_lines = ("src/megalemur/cli/", "data_prep/", "checkpoints_tools/")
    assert [problem for problem in wide if not problem.startswith(command_lines)] == []


FILE = "src/megalemur/train/step.py"
PARAMETERS = ", ".join(f"p{number}" for number in range(9))
BAD = [
    (wrong_rooms, "config", FILE, "from megalemur.parallel import groups"),
    (wrong_rooms, "parallel", FILE, "import megalemur.observe.logs"),
    (wrong_rooms, "model", FILE, "from megalemur.data.feed import build_data"),
    (wrong_rooms, "checkpoint", FILE, "def f():\n    from megalemur.model import names"),
    (wrong_rooms, "train", FILE, "import megalemur.generate.run"),
    (wrong_rooms, "train", FILE, "from megalemur.cli import main"),
    (wrong_rooms, "train", FILE, "from megalemur import cli"),
    (wrong_rooms, "train", FILE, "import data_prep.indexing"),
    (wrong_rooms, "data_prep", FILE, "from checkpoints_tools import convert"),
    (wrong_rooms, "data_prep", FILE, "from megalemur.train import loop"),
    (wrong_rooms, "train", FILE, "from ..cli import main"),
    (wrong_owners, "config", FILE, "import torch.nn"),
    (wrong_owners, "config", FILE, "from megatron import core"),
    (wrong_owners, "supervise", FILE, "import torch"),
    (wrong_rooms, "supervise", FILE, "from megalemur.train.run import train"),
    (wrong_owners, "train", FILE, "from megatron.training import get_args"),
    (wrong_owners, "train", FILE, "from megatron import legacy"),
    (wrong_owners, "model", FILE, "from megatron.core import parallel_state"),
    (wrong_owners, "model", FILE, "import megatron.core.parallel_state as mpu"),
    (wrong_owners, "model", FILE, "from megatron.core.tensor_parallel import random"),
    (wrong_owners, "parallel", FILE, "from megatron.core import tensor_parallel"),
    (wrong_owners, "train", FILE, "from megatron.core.models.gpt import GPTModel"),
    (wrong_owners, "model", FILE, "from megatron.core.distributed import DistributedDataParallel"),
    (wrong_owners, "optim", FILE, "from megatron.core.pipeline_parallel import get_forward_backward_func"),
    (wrong_owners, "checkpoint", FILE, "from megatron.core.dist_checkpointing import load"),
    (wrong_owners, "data", FILE, "from megatron.core.datasets import indexed_dataset"),
    (oversized, "train", FILE, "x = 1\n" * (MAX_FILE_LINES + 1)),
    (oversized, "train", FILE, "def f():\n" + "    x = 1\n" * 60),
    (oversized, "train", FILE, f"def f({PARAMETERS}): ..."),
    (oversized, "train", FILE, f"class C:\n    async def f(self, *, {PARAMETERS}): ..."),
    (badly_named, "train", "src/megalemur/train/utils.py", ""),
    (badly_named, "data_prep", "data_prep/tokenize.py", ""),
    (undocumented, "train", FILE, "import os"),
]


@pytest.mark.parametrize(("checker", "room", "path", "text"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_what_breaks_the_rule_is_found(checker, room, path, text):
    assert list(checker(Source(room, path, text)))


GOOD = [
    (
        wrong_rooms,
        "train",
        "from megalemur.model.llama import Llama\nfrom megalemur.train import step\nimport megalemur",
    ),
    (wrong_rooms, "cli", "from megalemur.train.run import train"),
    (wrong_rooms, "data_prep", "from megalemur.data.writer import IndexedWriter\nimport data_prep.encoder"),
    (wrong_owners, "parallel", "import megatron.core.tensor_parallel.random\nfrom megatron.core import parallel_state"),
    (
        wrong_owners,
        "model",
        "from megatron.core import tensor_parallel\nfrom megatron.core.transformer import spec_utils",
    ),
    (oversized, "train", "def f():\n" + "    x = 1\n" * 59),
    (oversized, "train", f"class C:\n    def f(self, {PARAMETERS[4:]}): ..."),
    (undocumented, "train", '"""What it owns."""'),
]


@pytest.mark.parametrize(("checker", "room", "text"), GOOD, ids=lambda value: getattr(value, "__name__", None))
def test_what_keeps_the_rule_is_let_through(checker, room, text):
    assert list(checker(Source(room, FILE, text))) == []
