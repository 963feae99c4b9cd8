import json
import subprocess
import sys

import pytest

from megalemur.cli.main import _expectation
from megalemur.config.load import parse_run

RUN = """
run: {name: test, steps: 10}
model: {preset: tiny}
optim: {learning_rate: 1e-3}
data: {sequence_length: 128, global_batch_size: 4, sources: [{name: code, path: code}]}
checkpoint: {directory: checkpoints}
log: {directory: log}
"""
COMMANDS = ["train", "plan", "lint", "show-config", "schema", "doctor", "generate", "quickstart"]


def megalemur(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megalemur.cli.main", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_no_help_imports_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom megalemur.cli.main import app\n"
        "for command in sys.argv[1:]:\n"
        "    result = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, (command, result.output)\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'megatron', 'transformers', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_help():
    text = megalemur("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_an_unknown_command_is_a_usage_error():
    assert megalemur("trian").returncode == 2


def test_every_problem_of_a_run_file_is_printed_without_a_traceback(run_file):
    done = megalemur("train", str(run_file), "parallel.tensr=2", "model.num_attention_heads=7")
    assert done.returncode == 11
    assert "parallel.tensr: no such setting; did you mean parallel.tensor?" in done.stderr
    assert "model.num_attention_heads=7 does not divide" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_run_file_is_named():
    done = megalemur("show-config", "absent.yaml")
    assert (done.returncode, "absent.yaml" in done.stderr, "Traceback" in done.stderr) == (11, True, False)


def test_schema_is_json_that_knows_the_sections():
    schema = json.loads(megalemur("schema").stdout)
    assert {"run", "model", "parallel", "data"} <= schema["properties"].keys()


def test_show_config_prints_what_the_run_resolves_to(run_file):
    done = megalemur("show-config", str(run_file), "parallel.data=2", "optim.learning_rate=2e-3")
    assert done.returncode == 0, done.stderr
    resolved, tables = done.stdout.split("\nRun test", 1)
    assert parse_run(resolved) == parse_run(RUN, ["parallel.data=2", "optim.learning_rate=2e-3"])
    assert "tokens a step" in tables and "collectives" in tables
    assert "not installed" not in done.stderr


def test_generate_refuses_a_directory_without_a_model(tmp_path):
    done = megalemur("generate", str(tmp_path), "--prompt", "x")
    assert done.returncode == 11
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_plan_for_the_run_to_compare_with_is_made_on_rank_0_and_can_fail(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("megalemur.parallel.device.gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    found = _expectation(parse_run(RUN))
    assert (found.cluster == "h100_sxm") if rank == "0" else found is None

    def fails(config, gpu):
        raise ZeroDivisionError("of the planner")

    monkeypatch.setattr("megalemur.plan.expected.expectation", fails)
    assert _expectation(parse_run(RUN)) is None
    assert ("no plan to compare with: ZeroDivisionError" in capsys.readouterr().err) == (rank == "0")


def test_without_a_gpu_there_is_no_plan_to_compare_with(monkeypatch):
    monkeypatch.setattr("megalemur.parallel.device.gpu_name", lambda: None)
    assert _expectation(parse_run(RUN)) is None
