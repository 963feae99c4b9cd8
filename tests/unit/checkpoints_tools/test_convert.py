"""The command: what it prints, what it refuses, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints_tools.convert import app
from checkpoints_tools.errors import ConversionError
from checkpoints_tools.sizes import parse_size
from tests.support.meta_release import write_meta
from tests.support.tiny import tiny_run, write_llama

ROOT = Path(__file__).parents[3]


def convert(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_walk_there_and_back(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    there = convert(tmp_path / "a", tmp_path / "b", "--to", "megalemur", "--dtype", "bf16", "--vocab-size", "256")
    assert there.exit_code == 0, there.output
    assert "read back and found equal" in there.output.replace("\n", " ")
    said = json.loads((tmp_path / "b/conversion.json").read_text())["source"]["changes"]
    assert said["dtype"] == "bf16" and said["rows_filled"] == 5
    assert convert(tmp_path / "b", tmp_path / "c", "--to", "hf").exit_code == 0
    assert not list(tmp_path.glob("*.converting"))


def test_run_by_path_from_anywhere(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    command = [sys.executable, str(ROOT / "checkpoints_tools/convert.py"), "a", "b", "--to", "hf"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "b/conversion.json").exists()


def test_help_comes_without_torch():
    lines = "import sys; from checkpoints_tools import convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lines], cwd=ROOT, check=False).returncode == 0


def test_a_dry_run_shows_every_tensor_and_writes_nothing(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    shown = convert(tmp_path / "a", tmp_path / "b", "--to", "hf", "--dtype", "bf16", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "251 x 64" in shown.output and "GB are free" in shown.output.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "b").mkdir(), "is there already"),
        (lambda root: (root / "b.converting").mkdir(), "--resume"),
        (lambda root: (root / "a/config.json").write_text("{"), "cannot be used"),
        (lambda root: (root / "a/model.safetensors").unlink(), "no checkpoint in a known format"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, change, said):
    write_llama(tmp_path / "a", num_layers=1)
    change(tmp_path)
    ended = convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert ended.exit_code == 1 and said in ended.output, ended.output
    assert "Traceback" not in ended.output


def test_a_damaged_source_has_an_exit_code_of_its_own(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    file = tmp_path / "a/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    ended = convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert ended.exit_code == 13 and "model.safetensors" in ended.output


def _without(name):
    def change(tensors):
        del tensors[name]

    return change


UNFIT = {
    "a tensor that is missing": (_without("model.norm.weight"), r"model.norm.weight (weight) is missing"),
    "a tensor too much": (lambda tensors: tensors.update({"x": torch.ones(2)}), "x (weight): no Llama"),
    "another shape": (lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}), "model.norm.weight"),
}


@pytest.mark.parametrize(("change", "said"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("form", ["hf", "hf-bin"])
def test_tensors_that_do_not_make_up_the_model_end_as_damage_does(tmp_path, change, said, form):
    source = write_llama(tmp_path / "a", num_layers=1)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    if form == "hf":
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    else:
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
    ended = convert(source, tmp_path / "b", "--to", "megalemur")
    assert ended.exit_code == 13 and said in ended.output.replace("\n", " "), ended.output
    assert not (tmp_path / "b").exists() and "Traceback" not in ended.output


def test_parts_of_a_release_that_do_not_fit_end_as_damage_does(tmp_path):
    source = write_llama(tmp_path / "a", num_layers=1, vocab_size=252)
    deeper = write_meta(tmp_path / "deeper", source, parts=2, n_layers=2)
    fewer = write_meta(tmp_path / "fewer", source, parts=4)
    (fewer / "consolidated.01.pth").unlink()
    for meta, said in ((deeper, "n_layers is 2"), (fewer, "consolidated.01.pth is missing")):
        ended = convert(meta, tmp_path / "b", "--to", "hf")
        assert ended.exit_code == 13 and said in ended.output, ended.output


def test_another_conversions_leftovers_are_not_gone_on_with(tmp_path):
    write_llama(tmp_path / "a", num_layers=1)
    draft = tmp_path / "b.converting"
    draft.mkdir()
    (draft / "journal.jsonl").write_text(f"{'0' * 32}\n")
    ended = convert(tmp_path / "a", tmp_path / "b", "--to", "hf", "--resume")
    assert ended.exit_code == 1 and "another source or with other options" in ended.output.replace("\n", " ")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    write_llama(tmp_path / "a", num_layers=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    ended = convert(tmp_path / "a", tmp_path / "b", "--to", "hf")
    assert ended.exit_code == 1 and "GB free" in ended.output.replace("\n", " ")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5M", 1_500_000), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 potatoes", "1e9"])
def test_no_sizes(text):
    with pytest.raises(ConversionError, match="--x"):
        parse_size(text, "--x")


def test_a_checkpoint_in_the_middle_of_a_run_keeps_its_moments_and_gives_its_weights(tmp_path):
    """Written by two tensor-parallel ranks; the weights that come out are those that went in."""
    from tests.support.ranks import run_ranks
    from tests.support.training import train_and_save, whole_state

    config = tiny_run(tmp_path, "parallel.tensor=2", "run.stop_at=3", num_layers=2)
    path = run_ranks(2, train_and_save, config)[0][1]
    kept = convert(path, tmp_path / "b", "--to", "megalemur")
    assert kept.exit_code == 0, kept.output
    before, after = whole_state(path), whole_state(tmp_path / "b")
    assert before.keys() == after.keys() and any(name.startswith("exp_avg/") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert "not taken along" not in kept.output
    out = convert(path, tmp_path / "c", "--to", "hf")
    assert out.exit_code == 0 and "(exp_avg, exp_avg_sq, master) was not taken along" in out.output
    weights = load_file(tmp_path / "c/model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[f"master/{name}"].to(tensor.dtype)), name
