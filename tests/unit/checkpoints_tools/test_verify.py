"""The command that compares two checkpoints: what it says, and how it ends."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints_tools import verify
from checkpoints_tools.conversion import Request, convert
from checkpoints_tools.exits import DAMAGED, DIFFERENT, WRONG
from checkpoints_tools.formats import open_any
from tests.support.tiny import write_llama
from tests.support.weights import MISTAKES, mistaken, random_tensors
from tests.unit.checkpoints_tools.test_prompts import byte_tokenizer

ROOT = Path(__file__).parents[3]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = write_llama(tmp_path_factory.mktemp("verify") / "a", num_layers=2, vocab_size=260)
    model = open_any(path).model
    save_file(random_tensors(model), path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_bytes(byte_tokenizer())
    return path


@pytest.fixture
def pair(original, tmp_path):
    return original, Path(shutil.copytree(original, tmp_path / "b"))


def run(*arguments):
    return CliRunner().invoke(verify.app, [str(argument) for argument in arguments])


def change(path, mutate):
    tensors = load_file(path / "model.safetensors")
    changed = mutate(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})


def test_equal_checkpoints_are_one_line(pair):
    done = run(*pair)
    assert done.exit_code == 0, done.output
    assert "equal: same settings, 21 tensors with the same bits" in done.output


def test_logits_of_equal_checkpoints_are_equal(pair):
    done = run(*pair, "--logits", "--max-difference", 0, "--max-kl", 0)
    assert done.exit_code == 0 and "texts, cut by tokenizer.json" in done.output
    assert done.output.count("0, within the bound 0") == 1 and "0 nats, within the bound 0" in done.output


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found_by_tensors_and_by_logits_alone(pair, mistake):
    model = open_any(pair[0]).model
    change(pair[1], lambda tensors: mistaken(mistake, model, tensors))
    done = run(*pair)
    assert done.exit_code == DIFFERENT and "Tensors that differ" in done.output and "different:" in done.output
    alone = run(*pair, "--tolerance", "inf", "--logits", "--max-kl", 1e-3)
    assert alone.exit_code == DIFFERENT and "equal within inf" in alone.output and "BEYOND" in alone.output


def test_differences_up_to_the_tolerance_count_as_none(pair):
    change(pair[1], lambda tensors: tensors[Q].view(-1)[:3].add_(1e-4))
    done = run(*pair)
    assert done.exit_code == DIFFERENT and Q[:20] in done.output
    done = run(*pair, "--tolerance", 1e-3, "--logits", "--max-kl", 1e-6)
    assert done.exit_code == 0 and "1 tensor of 21 differ by 0.0001 at most" in done.output


def test_a_cast_is_said(pair):
    change(pair[1], lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    done = run(*pair, "--logits", "--max-kl", 1e-2)
    assert done.exit_code == 0 and "same values, after the cast" in done.output
    assert "21 tensors: float32 in A and bfloat16 in B, values compared as bfloat16" in done.output
    assert run(*pair, "--logits", "--max-kl", 1e-12).exit_code == DIFFERENT


def test_other_settings_are_shown_and_change_the_logits(pair):
    config = pair[1] / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.01'))
    done = run(*pair, "--logits")
    assert done.exit_code == DIFFERENT and "norm_eps" in done.output and "1 setting" in done.output
    assert run(*pair, "--logits", "--max-difference", 1e-4).output.count("BEYOND") == 1


def test_prompts_of_a_file_are_run(pair, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n---\ndefgh\n")
    done = run(*pair, "--logits", "--prompts", prompts, "--max-tokens", 4)
    assert done.exit_code == 0 and "260 logits of each of 7 tokens" in done.output


@pytest.mark.parametrize("cut", [1, 10_000])
def test_a_damaged_checkpoint_ends_with_its_own_code(pair, cut):
    weights = pair[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut])
    done = run(*pair)
    assert done.exit_code == DAMAGED and "model.safetensors" in done.stderr and "Traceback" not in done.output


def test_a_flipped_bit_that_our_own_format_knows_of_is_damage_and_no_difference(pair, tmp_path):
    opened = open_any(pair[0])
    convert(opened, opened, Request(tmp_path / "native", "megalemur"))
    assert run(pair[0], tmp_path / "native").exit_code == 0
    (weights,) = (tmp_path / "native").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    done = run(pair[0], tmp_path / "native")
    assert done.exit_code == DAMAGED and weights.name in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--max-kl", 1], ["--max-difference", 1], ["--prompts", __file__], ["--logits", "--prompts", sys.executable]],
    ids=str,
)
def test_what_cannot_be_run_so_is_said(pair, arguments):
    done = run(*pair, *arguments)
    assert done.exit_code == WRONG and done.stderr.startswith("error: ")


def test_what_is_no_checkpoint_is_said(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(pair[0], tmp_path / "empty").exit_code == WRONG
    assert run(pair[0], tmp_path / "nowhere").exit_code == 2


def test_help_needs_no_torch():
    for name in ("verify", "inspect_checkpoint", "average_checkpoints"):
        code = (
            f"import runpy, sys; sys.argv = ['{name}', '--help']\n"
            f"try: runpy.run_path('checkpoints_tools/{name}.py', run_name='__main__')\n"
            "finally: assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
