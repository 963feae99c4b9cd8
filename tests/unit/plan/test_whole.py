"""A plan is what memory, time, goodput and lint say, put together; and each of its faces shows that."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from megalemur.cli import exit_codes
from megalemur.cli.main import app
from megalemur.config.load import load_run
from megalemur.plan.better import HEADROOM, look_for_better
from megalemur.plan.cluster import load_cluster
from megalemur.plan.document import PlanDocument, document
from megalemur.plan.expected import expectation
from megalemur.plan.job import Job
from megalemur.plan.memory import memory_of
from megalemur.plan.terminal import breakdown, days_text, facts, print_plan, seconds_text
from megalemur.plan.whole import Assumptions, make_plan

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "launch/runs").glob("*.yaml"))
RUN_70B = ROOT / "launch/runs/llama2_70b_pretrain.yaml"
H100 = load_cluster("h100_sxm", RUN_70B)


def plan_of(*overrides, run=RUN_70B, cluster=H100, assumed=None):
    return make_plan(load_run(run, overrides), cluster, assumed)


def command(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def printed(plan, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan, console)
    return console.export_text()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_every_run_file_plans_lints_and_fits(run):
    plan = plan_of(run=run)
    assert plan.fits and not plan.wrong
    assert math.isclose(sum(plan.step.breakdown.values()), plan.step.seconds)
    assert plan.budget.days * 86400 * plan.saves.kept == pytest.approx(plan.config.run.steps * plan.step.seconds)
    assert plan.budget.gpu_hours == pytest.approx(plan.budget.days * 24 * plan.config.parallel.world_size)
    assert plan.saves.best_kept >= plan.saves.kept or plan.saves.every < plan.saves.best_every


def test_no_torch_is_imported_for_a_plan(tmp_path):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom megalemur.cli.main import app\n"
        "done = CliRunner().invoke(app, ['plan', *sys.argv[1:]])\n"
        "assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'megatron', 'transformers', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 'plotly' not in sys.modules)"
    )
    line = [sys.executable, "-c", code, RUNS[0], "--search", "--html", tmp_path / "plan.html"]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_has_a_code_of_its_own_and_says_by_how_much():
    done = command(RUN_70B, "parallel.pipeline=2")
    plan = plan_of("parallel.pipeline=2")
    assert done.exit_code == exit_codes.DOES_NOT_FIT and not plan.fits
    over = (max(stage.total for stage in plan.memory) - H100.memory_bytes) / 1e9
    assert f"does not fit: {over:.1f} GB too much on stage 0" in done.output
    assert command(RUN_70B).exit_code == exit_codes.DONE


def test_what_lint_calls_an_error_has_the_code_of_bad_settings(monkeypatch):
    from megalemur.plan import whole
    from megalemur.plan.lint.finding import Finding

    monkeypatch.setattr(whole, "lint_config", lambda *_, **__: [Finding("some_rule", "error", "a.b is wrong; write c")])
    done = command(RUN_70B)
    assert done.exit_code == exit_codes.BAD_CONFIG
    assert "a.b is wrong; write c" in done.output and "some_rule" in done.output
    assert json.loads(command(RUN_70B, "--json").output)["findings"][0]["rule"] == "some_rule"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8"], "--gpus belongs to a search"),
        (["--write", "x.yaml"], "--write belongs to a search"),
        (["--ranks", "0"], "belong to a dry run"),
        (["--json", "--dry-run"], "exclude each other"),
        (["--cluster", "no_such"], "no such cluster; there are a100_40gb_sxm"),
        (["parallel.tensr=2"], "did you mean parallel.tensor?"),
        (["precision.fp8=hybrid", "model.backend=transformer_engine", "--cluster", "a100_80gb_sxm"], "has no fp8"),
        (["--html", f"{RUN_70B}/plan.html"], "cannot be written"),
        (["--disk", "0"], "--disk 0: give a finite number, more than 0"),
        (["--restart", "inf"], "--restart inf: give a finite number, 0 or more"),
        (["--failures", "inf"], "--failures inf: give"),
        (["--dry-run", "--ranks", "64"], "there is no rank 64 among 64"),
        (["--dry-run", "--ranks", "0", "--all-classes"], "exclude each other"),
    ],
)
def test_questions_that_make_no_sense_are_refused(arguments, said):
    line = [sys.executable, "-m", "megalemur.cli.main", "plan", str(RUN_70B), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == exit_codes.BAD_CONFIG, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_without_a_run_file_it_is_a_usage_error():
    assert command().exit_code == exit_codes.USAGE


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_the_terminal_shows_every_fact_within_its_width(run, width):
    plan = plan_of(run=run)
    text = printed(plan, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    flat = " ".join(text.split())
    for name, value in facts(plan):
        assert " ".join(f"{name} {value}".split()) in flat
    bars = [line for line in lines if line.startswith("stage ")]
    assert len(bars) == min(len(plan.memory), 8)
    assert f"{plan.memory[0].total / 1e9:.1f} GB" in bars[0]


def test_a_bar_is_as_long_as_its_share_of_the_card():
    plan = plan_of()
    for line, stage in zip(
        (line for line in printed(plan, 120).splitlines() if line.startswith("stage ")), plan.memory, strict=True
    ):
        full, empty = line.count("█"), line.count("·")
        assert abs(full / (full + empty) - stage.total / H100.memory_bytes) < 1 / (full + empty)


def test_a_long_pipeline_is_shortened_and_says_so():
    plan = plan_of("parallel.pipeline=16", "parallel.chunks=1", "parallel.data=1")
    text = printed(plan, 100)
    assert "9 stages in between are left out" in text
    assert [int(n) for n in re.findall(r"^stage (\d+)", text, re.MULTILINE)] == [0, 1, 2, 3, 4, 14, 15]


def test_the_breakdown_is_the_whole_step():
    plan = plan_of()
    rows = breakdown(plan)
    assert sum(seconds for _, seconds in rows) == pytest.approx(plan.step.seconds)
    assert rows[0][0] == "matrix products" and all(seconds > 0 for _, seconds in rows)


def test_times_are_written_in_units_that_suit_them():
    assert [seconds_text(s) for s in (61.77, 2.345, 0.1668)] == ["61.8 s", "2.35 s", "167 ms"]
    assert [days_text(d) for d in (15.4, 0.5, 0.01, 1e-4)] == ["15.4 days", "12 hours", "14.4 minutes", "8.64 seconds"]


def test_assumptions_move_what_hangs_on_them_and_nothing_else():
    usual, worse = plan_of(), plan_of(assumed=Assumptions(failures_per_gpu_year=17.0))
    never = plan_of(assumed=Assumptions(failures_per_gpu_year=0.0))
    assert worse.saves.kept < usual.saves.kept < never.saves.kept
    assert worse.saves.best_every < usual.saves.best_every and never.saves.best_every is None
    assert worse.budget.days > usual.budget.days and worse.step == usual.step
    slow = plan_of("checkpoint.asynchronous=false", assumed=Assumptions(disk_bytes_per_second=1e9))
    assert slow.saves.reliability.save == pytest.approx(slow.checkpoint.whole / 1e9)
    assert slow.saves.reliability.written_behind == 0


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_the_json_is_what_its_schema_says(run):
    schema = json.loads(command("--json-schema").output)
    values = json.loads(command(run, "--json").output)
    assert set(values) == set(schema["properties"]) and set(schema["required"]) <= set(values)
    read = PlanDocument.model_validate_json(json.dumps(values))
    plan = plan_of(run=run)
    assert read == document(plan, look_for_better(plan.config, H100))
    for stage in read.memory:
        parts = ("parameters", "gradients", "optimizer", "activations", "logits", "working", "buffers", "slack")
        assert stage.total == sum(getattr(stage, part) for part in parts)
    for broken in (
        {**values, "fits": "perhaps"},
        {**values, "extra": 1},
        {k: v for k, v in values.items() if k != "time"},
    ):
        with pytest.raises(ValidationError):
            PlanDocument.model_validate(broken)


def test_the_winner_written_and_loaded_is_the_layout(tmp_path):
    target = tmp_path / "not there yet" / "winner.yaml"
    done = command(RUN_70B, "run.steps=7777", "--search", "--gpus", "32", "--write", target)
    assert done.exit_code == exit_codes.DONE, done.output
    better = look_for_better(load_run(RUN_70B), H100, 32)
    written = load_run(target)
    assert Job.of(written) == better.best.job and written.run.steps == 7777
    assert written.parallel.world_size == 32
    plan = make_plan(written, H100)
    assert plan.fullest.total == better.best.peak_bytes <= (1 - HEADROOM) * H100.memory_bytes
    assert plan.step.seconds == pytest.approx(better.best.seconds, rel=0.02)
    (line,) = [line for line in done.output.splitlines() if line.startswith("parallel.tensor=")]
    assert Job.of(load_run(RUN_70B, line.split())) == better.best.job
    again = subprocess.run(
        [sys.executable, "-m", "megalemur.cli.main", "plan", RUN_70B, "--search", "--write", target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == exit_codes.BAD_CONFIG and "cannot be written" in again.stderr
    assert load_run(target) == written


def test_a_search_without_an_answer_says_so_and_writes_nothing(tmp_path):
    target = tmp_path / "winner.yaml"
    done = command(RUN_70B, "--search", "--gpus", "8", "--cluster", "a100_40gb_sxm", "--write", target)
    assert done.exit_code == exit_codes.DOES_NOT_FIT and "none fits 42" in done.output
    assert "written" not in done.output and not target.exists()


def test_a_number_of_processes_that_no_layout_has_is_not_called_too_little_memory():
    done = command(RUN_70B, "--search", "--gpus", "1000")  # 1000 / 2^n is no number of stages for 80 layers
    assert done.exit_code == exit_codes.DOES_NOT_FIT
    assert "no layout of 1,000 processes" in done.output and "larger ones" not in done.output
    assert "Layouts on 1 GPU: " in command(RUN_70B, "--search", "--gpus", "1").output


def test_a_run_of_no_step_has_a_plan():
    plan = plan_of("run.steps=0", "schedule.warmup_steps=0", "checkpoint.save_every=0")
    assert plan.budget.days == plan.tokens == 0 < plan.step.seconds and 0 < plan.saves.kept <= 1


def test_what_never_ends_says_so():
    assert dict(facts(plan_of(assumed=Assumptions(failures_per_gpu_year=1e9))))["to the end"].startswith("never: ")
    assert "days" in dict(facts(plan_of()))["to the end"]


def test_the_search_proposes_what_is_fastest_and_leaves_room():
    better = look_for_better(load_run(RUN_70B), H100)
    candidates = better.found.candidates
    assert better.best.seconds == min(candidate.seconds for candidate in candidates)
    assert all(c.peak_bytes <= (1 - HEADROOM) * H100.memory_bytes for c in candidates)
    cells = better.by_tensor_and_pipeline()
    assert {(c.job.tensor, c.job.pipeline) for c in candidates} == set(cells)
    for (tensor, pipeline), cell in cells.items():
        of_it = [c.seconds for c in candidates if (c.job.tensor, c.job.pipeline) == (tensor, pipeline)]
        assert cell.seconds == min(of_it)
    assert len(better.distinct(3)) == 3 and better.distinct(3)[0] is better.best


def test_training_is_told_what_the_plan_says_where_its_gpu_is_known():
    config = load_run(RUN_70B)
    told = expectation(config, "NVIDIA H100 80GB HBM3")
    assert told.cluster == "h100_sxm" and told.step_seconds == make_plan(config, H100).step.seconds
    assert told.peak_bytes == tuple(stage.traced for stage in memory_of(Job.of(config)))
    assert expectation(config, "NVIDIA H200").cluster == "h200_sxm"
    assert expectation(config, "Radeon") is None
