"""The mean of checkpoints is the mean of their values, whoever reads it in whatever pieces."""

import json
import math
import os
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints_tools import average, average_checkpoints, conversion, convert, mover
from checkpoints_tools.average import Average
from checkpoints_tools.compare import compare
from checkpoints_tools.errors import ConversionError, RequestError
from checkpoints_tools.exits import DAMAGED, WRONG
from checkpoints_tools.regions import WEIGHT, Key
from megalemur.model.names import hf_shapes
from tests.support.tiny import write_llama
from tests.support.weights import MemoryWeights, random_tensors, tiny_model

MODEL = tiny_model(num_layers=1)
Q = Key(WEIGHT, "model.layers.0.self_attn.q_proj.weight")


def checkpoints(count, dtype=torch.float32):
    return [MemoryWeights(MODEL, random_tensors(MODEL, dtype=dtype, seed=seed)) for seed in range(count)]


def exact(values, shares):
    """The mean in rational numbers, rounded once to a double."""
    return float(
        sum(Fraction(v) * Fraction(s) for v, s in zip(values, shares, strict=True)) / sum(map(Fraction, shares))
    )


@pytest.mark.parametrize("shares", [None, [1, 2, 5], [0.1, 0.7, 0.2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_value_is_as_near_to_the_exact_mean_as_its_dtype_allows(shares, dtype):
    parts = checkpoints(3, dtype)
    mean = Average(parts, shares)
    assert mean.model == MODEL and mean.dtypes == parts[0].dtypes
    rows = [part.read(Q, 0, 2).view(-1).tolist() for part in parts]
    means = [exact(values, shares or [1, 1, 1]) for values in zip(*rows, strict=True)]
    expected = torch.tensor(means, dtype=torch.float64)
    step = torch.finfo(dtype).eps * 2.0 ** expected.abs().log2().floor()
    assert ((mean.read(Q, 0, 2).view(-1).double() - expected).abs() <= 0.5000001 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shares", [None, [1.0] * 7, [0.3, 0.1, 5, 7, 0.2, 1, 1]], ids=str)
def test_the_mean_of_equal_checkpoints_is_the_checkpoint(dtype, shares):
    (one,) = checkpoints(1, dtype)
    assert compare(Average([one] * 7, shares), one, workers=2).equal()


def test_the_result_depends_neither_on_blocks_nor_on_threads(monkeypatch):
    mean = Average(checkpoints(3, torch.bfloat16), [3, 1, 2])
    whole = {key: mean.read(key, 0, hf_shapes(MODEL)[key.name][0]) for key in mean.dtypes}
    monkeypatch.setattr(mover, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(average, "_PIECE", 200)
    assert compare(mean, MemoryWeights(MODEL, {key.name: t for key, t in whole.items()}), workers=5).equal()


def test_the_dtype_may_be_another_and_optimizer_state_is_left_out():
    tensors = random_tensors(MODEL)
    parts = [MemoryWeights(MODEL, tensors, exp_avg=tensors), checkpoints(2, torch.bfloat16)[1]]
    mean = Average(parts, dtype=torch.float16)
    assert {*mean.dtypes.values()} == {torch.float16} and {key.kind for key in mean.dtypes} == {WEIGHT}
    assert mean.read(Q, 3, 5).dtype == torch.float16 and Average(parts, [1, 3], torch.float16).shares == [0.25, 0.75]
    with pytest.raises(ConversionError, match=r"embed_tokens.weight is float32 in checkpoint 1 and bfloat16 in 2"):
        Average(parts)


@pytest.mark.parametrize(
    ("count", "shares", "why"),
    [
        (1, None, "two checkpoints at least"),
        (3, [1, 2], "there are 2 for 3"),
        (2, [1, 0], "0 is no weight"),
        (2, [1, -1], "-1 is no weight"),
        (2, [1, math.nan], "nan is no weight"),
        (2, [1, math.inf], "inf is no weight"),
    ],
)
def test_what_is_no_mean_is_refused(count, shares, why):
    with pytest.raises(RequestError, match=why):
        Average(checkpoints(count), shares)


def test_another_model_is_refused():
    other = tiny_model(num_layers=1, rope_theta=500000.0)
    with pytest.raises(
        ConversionError, match=r"checkpoints 2 and 3 are not of one model:\n  - rope_theta: 10000.0 and"
    ):
        Average([*checkpoints(2), MemoryWeights(other, random_tensors(other))])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad):
    tensors = random_tensors(MODEL)
    tensors[Q.name][40, 3] = bad
    mean = Average([*checkpoints(1), MemoryWeights(MODEL, tensors)])
    assert mean.read(Q, 0, 40).isfinite().all()
    with pytest.raises(ConversionError, match=rf"{Q.name}: rows \[40, 64\) of the mean are not all finite"):
        mean.read(Q, 40, 64)
    with pytest.raises(ConversionError, match="not all finite in float16"):
        large = {name: tensor * 1e6 for name, tensor in random_tensors(MODEL).items()}
        Average([MemoryWeights(MODEL, large)] * 2, dtype=torch.float16).read(Q, 0, 64)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("average")
    return [write_llama(root / str(seed), num_layers=1, seed=seed) for seed in range(3)]


def run(*arguments):
    return CliRunner().invoke(average_checkpoints.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_command_writes_the_mean_with_its_certificate(directories, tmp_path, workers):
    done = run(*directories, "--output", tmp_path / "mean", "--to", "hf", "--weights", "1,1,2", "--workers", workers)
    assert done.exit_code == 0, done.output
    found, *parts = (load_file(path / "model.safetensors") for path in (tmp_path / "mean", *directories))
    for name, tensor in found.items():
        a, b, c = (part[name].double() for part in parts)
        assert torch.equal(tensor, ((a + b + 2 * c) / 4).float()), name
    said = json.loads((tmp_path / "mean" / "conversion.json").read_text())
    shares = [part["share"] for part in said["source"]["changes"]["mean_of"]]
    assert shares == [0.25, 0.25, 0.5] and "mean of 3 checkpoints" in done.output


def test_a_mean_in_our_own_format_of_checkpoints_in_two_formats(directories, tmp_path):
    first = run(*directories[:2], "--output", tmp_path / "native", "--to", "megalemur")
    assert first.exit_code == 0, first.output
    done = run(tmp_path / "native", directories[2], "--output", tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    a, b, c = (load_file(path / "model.safetensors")["model.norm.weight"].double() for path in directories)
    found = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found, ((((a + b) / 2).float().double() + c) / 2).bfloat16())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_damage_in_any_source_is_found_while_it_is_read(directories, tmp_path, which):
    sources = [tmp_path / f"source{number}" for number in range(3)]
    for one, source in zip(directories, sources, strict=True):
        assert CliRunner().invoke(convert.app, [str(one), str(source), "--to", "megalemur"]).exit_code == 0
    good = run(*sources, "--output", tmp_path / "good", "--to", "hf")
    assert good.exit_code == 0, good.output
    (file,) = sources[which].glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = run(*sources, "--output", tmp_path / "mean", "--to", "hf")
    assert done.exit_code == DAMAGED and str(file) in done.stderr, done.output
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_source_that_changes_while_it_is_read_makes_no_mean(directories, tmp_path, which, monkeypatch):
    sources = [shutil.copytree(one, tmp_path / one.name) for one in directories]
    finish = conversion.finish_files

    def change_and_finish(layout, draft):
        finish(layout, draft)
        os.utime(sources[which] / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(conversion, "finish_files", change_and_finish)
    done = run(*sources, "--output", tmp_path / "mean", "--to", "hf")
    assert done.exit_code == WRONG and f"error: {sources[which]} changed while being read" in done.stderr, done.output
    assert not (tmp_path / "mean").exists()


def test_a_dry_run_writes_nothing(directories, tmp_path):
    done = run(*directories, "--output", tmp_path / "mean", "--to", "hf", "--dry-run")
    assert done.exit_code == 0 and "3 files" in done.output and not list(tmp_path.iterdir())


def test_what_cannot_be_averaged_leaves_nothing(directories, tmp_path):
    out = ("--output", tmp_path / "mean", "--to", "hf")
    other = write_llama(tmp_path / "other", num_layers=1, vocab_size=200)
    cut = tmp_path / "cut"
    shutil.copytree(directories[0], cut)
    (cut / "model.safetensors").write_bytes((directories[0] / "model.safetensors").read_bytes()[:-8])
    bad = tmp_path / "bad"
    shutil.copytree(directories[0], bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    for arguments, code, why in (
        ([directories[0], other], WRONG, "vocab_size: 251 and 200"),
        ([directories[0]], WRONG, "two checkpoints at least"),
        ([*directories, "--weights", "1,x,2"], WRONG, "--weights 1,x,2"),
        ([directories[0], cut], DAMAGED, "model.safetensors"),
        ([directories[0], bad], WRONG, "model.norm.weight: rows"),
    ):
        done = run(*arguments, *out)
        assert done.exit_code == code and why in done.stderr, done.output
        assert not (tmp_path / "mean").exists()
