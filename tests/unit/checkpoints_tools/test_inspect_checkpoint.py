"""What a checkpoint holds is shown as it is: facts, tree, statistics, differences, and the same as JSON."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints_tools import inspect_checkpoint, mover
from checkpoints_tools.description import Listed
from checkpoints_tools.exits import DAMAGED
from checkpoints_tools.regions import WEIGHT, Key
from checkpoints_tools.tensor_statistics import Statistics, all_statistics, joined, statistics_of
from checkpoints_tools.tensor_tree import tensor_tree
from megalemur.model.names import hf_shapes
from tests.support.tiny import write_llama
from tests.support.weights import MemoryWeights, random_tensors, tiny_model

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("inspect") / "a", num_layers=3, dtype=torch.bfloat16)


@pytest.fixture
def copied(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "b"))


def change(path, mutate):
    tensors = load_file(path / "model.safetensors")
    mutate(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def run(*arguments):
    return CliRunner().invoke(inspect_checkpoint.app, [str(argument) for argument in arguments])


def test_the_summary_reads_no_tensor(copied):
    weights = copied / "model.safetensors"
    size, header = weights.stat().st_size, 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:  # the tensors become a hole
        file.truncate(header)
        file.truncate(size)
    done = run(copied)
    assert done.exit_code == 0, done.output
    for said in ("hf", "124,736", "30 tensors, bfloat16, 249.47 kB", "8 of size 8, in 4 groups", "generation_config"):
        assert said in done.output, said


def test_layers_that_are_alike_are_one_branch_and_others_are_not(copied):
    done = run(copied)
    assert done.output.count("self_attn.q_proj.weight") == 1 and "model.layers.0 to 2, alike" in done.output
    assert "3 × 61.70 kB" in done.output and "251 × 64  bf16   32.13 kB" in done.output
    assert run(copied, "--all").output.count("self_attn.q_proj.weight") == 3
    change(copied, lambda tensors: tensors.update({Q: tensors[Q].float()}))
    done = run(copied)
    assert done.output.count("self_attn.q_proj.weight") == 3 and ", alike" not in done.output


def test_statistics_are_shown_and_what_is_no_number_is_counted(copied):
    def mutate(tensors):
        tensors[Q][0, :3], tensors[Q][1, 0] = math.nan, -math.inf

    change(copied, mutate)
    done = run(copied, "--statistics")
    (line,) = (line for line in done.output.splitlines() if "q_proj" in line)
    assert "3 NaN" in line and "1 Inf" in line and "norm" in line and done.output.count("NaN") == 1


def test_the_difference_from_another_is_shown_and_is_no_error(original, copied):
    change(copied, lambda tensors: tensors[Q].neg_())
    done = run(original, "--against", copied)
    assert done.exit_code == 0 and "different: 1 tensor of 30" in done.output
    assert "equal: same settings, 30 tensors" in run(original, "--against", original).output


def test_json_holds_all_of_it(original, copied):
    def mutate(tensors):
        tensors[Q][0, 0] = math.nan

    change(copied, mutate)
    done = run(copied, "--json", "--statistics", "--against", original)
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["format"] == "hf" and said["parameters"] == 124_736
    assert said["model"]["num_layers"] == 3 and len(said["tensors"]["weight"]) == 30
    tensor = said["tensors"]["weight"][Q]
    assert (tensor["shape"], tensor["dtype"], tensor["bytes"]) == ([64, 64], "bfloat16", 8192)
    assert tensor["files"] == ["model.safetensors"] and tensor["statistics"]["nans"] == 1
    (one,) = said["against"]["tensors"]
    assert (one["name"], one["differing"], one["max_difference"]) == (Q, 1, None) and not said["against"]["equal"]
    assert "statistics" not in json.loads(run(copied, "--json").stdout)["tensors"]["weight"][Q]


def test_damage_is_said(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = run(copied)
    assert done.exit_code == DAMAGED and "model.safetensors" in done.stderr


def test_control_characters_of_a_path_do_not_reach_the_terminal(original, tmp_path):
    path = shutil.copytree(original, tmp_path / "a\x1b[31mred")
    done = run(path)
    assert "\x1b[31mred" not in done.output and "\\u001b" in done.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_those_of_the_values(dtype, monkeypatch):
    monkeypatch.setattr(mover, "BLOCK_BYTES", 1000)
    model = tiny_model()
    tensors = random_tensors(model, dtype=dtype)
    found = all_statistics(MemoryWeights(model, tensors), workers=3)
    for key, one in found.items():
        values = tensors[key.name].double()
        assert (one.elements, one.nans, one.infinities) == (values.numel(), 0, 0)
        assert (one.minimum, one.maximum) == (values.min().item(), values.max().item())
        assert one.mean == pytest.approx(values.mean().item(), abs=1e-12)
        assert one.norm == pytest.approx(values.norm().item(), rel=1e-12)
    assert found == all_statistics(MemoryWeights(model, tensors), workers=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -3.0], Statistics(2, 0, 0, -3.0, 1.0, -2.0, 10.0)),
        ([math.nan, 2.0, math.inf, -math.inf], Statistics(4, 1, 2, 2.0, 2.0, 2.0, 4.0)),
        ([math.nan], Statistics(1, 1)),
        ([2.0**127, 2.0**127], Statistics(2, 0, 0, 2.0**127, 2.0**127, 2.0**128, 2.0**255)),
    ],
    ids=str,
)
def test_what_is_no_number_is_left_out_and_counted(values, expected):
    found = statistics_of(torch.tensor(values))
    assert found == expected and joined([found, Statistics()]) == found
    assert math.isnan(Statistics(1, 1).mean) and Statistics(4, 1, 2, 2.0, 2.0, 2.0, 4.0).mean == 2.0


def test_optimizer_state_has_branches_of_its_own():
    shapes = hf_shapes(tiny_model())
    tensors = [
        Listed(Key(kind, n), shape, torch.float32) for kind in (WEIGHT, "exp_avg") for n, shape in shapes.items()
    ]
    console = Console(width=200, file=io.StringIO())
    console.print(tensor_tree("Tensors", tensors))
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines if not line.startswith(("│", " ", "T"))] == ["weights", "exp_avg"]
    assert sum("q_proj" in line for line in lines) == 2 and sum("0 to 1, alike" in line for line in lines) == 2
    # a tensor's columns stand one below the other, however deep its name is
    assert len({line.rindex("fp32") for line in lines if "fp32" in line}) == 1
